"""One decoding cycle on the device: draft a tree, verify it with one target forward, accept a path, commit it.

Everything is tensors of fixed shape: a tree has total_tokens + 1 nodes, a commit is padded to depth + 2 rows, and
how many of them count is a tensor. State is written in place. So the whole cycle can be one compiled function or
one CUDA graph, and the host learns of it by one small copy, `CycleTensors.report`. `length` (P) is the number of
tokens before the root: the target's cache holds their keys and values, the head's cache their P pairs
(g_t, x[t + 1]). Source: EAGLE-3 (arXiv 2503.01840) and EAGLE-2 (arXiv 2406.16858).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_lab.accept import Sampling, accept, choose
from eagle_lab.attention import ATTENTIONS, View, view
from eagle_lab.cache import GrowingCache, KeyValueCache
from eagle_lab.clock import Span
from eagle_lab.draft import DraftHead
from eagle_lab.masks import MASK_BUILDERS, build_all
from eagle_lab.models import Pair
from eagle_lab.runtime import piece
from eagle_lab.strategy import Strategy
from eagle_lab.tree import candidate_depths, largest, pool_size, select_nodes


@dataclass(frozen=True)
class TreeShape:
    """Sizes of the draft tree; `total_tokens` counts draft nodes, the root not."""

    top_k: int = 10
    depth: int = 7
    total_tokens: int = 63

    def __post_init__(self) -> None:
        for name in ("top_k", "depth", "total_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        pool = pool_size(self.top_k, self.depth)
        if self.total_tokens > pool:
            raise ValueError(
                f"total_tokens is {self.total_tokens}, but top_k={self.top_k} and depth={self.depth} give only {pool} "
                f"candidates; lower total_tokens or raise top_k or depth."
            )

    @property
    def width(self) -> int:
        """Rows of a commit: the root and one node for each of depth + 1 levels."""
        return self.depth + 2

    @property
    def reach(self) -> int:
        """Cache slots beyond the prefix that a cycle writes."""
        return max(self.total_tokens + 1, self.top_k * self.depth, self.width)


@dataclass
class State:
    """What a cycle reads and leaves behind; B rows. All tensors keep their shapes and places from cycle to cycle.

    length int64 [B]; root int64 [B], the last committed token; hidden [B, H], the head's output at the last pair;
    active bool [B], False for a finished row, which repeats its last cycle and commits nothing; uniforms float64
    [B, positions], one number a position for sampling. Only the host has: visible_length, the largest `length`, so
    that attention reads no more of the cache than it must, and window, which fixes what it reads, for runtimes that
    want one shape.
    """

    length: Tensor
    root: Tensor
    hidden: Tensor
    active: Tensor
    target_cache: KeyValueCache
    head_cache: KeyValueCache | GrowingCache | None
    uniforms: Tensor
    visible_length: int = 0
    window: int | None = None

    @property
    def start(self) -> int:
        """The prefix as the host knows it; under a fixed window nothing may depend on it."""
        return self.visible_length if self.window is None else 0

    def reads(self, beyond: int) -> int:
        """Slots that a forward with so many rows after the prefix attends to."""
        return self.visible_length + beyond if self.window is None else self.window

    def view(self, name: str, mask: Tensor, beyond: int, dtype: torch.dtype) -> View:
        """Who sees what where the prefix is seen whole and the rest by `mask` bool [B, n, m]."""
        window, exact = self.reads(beyond), self.window is None and self.length.shape[0] == 1
        limit = self.visible_length if self.window is None else window
        return view(name, mask, self.length, limit, exact, window, dtype)


@dataclass(frozen=True)
class CycleTensors:
    """One cycle's outcome on the device: tokens and depths int64 [B, n + 1], parents int64 [B, n], scores float32
    [B, n], path int64 [B, width], count int64 [B] (rows of `path` that are real), committed int64 [B, width]
    (tokens along `path`), bonus int64 [B]; report int64 [B, 2 + width]: count, bonus and committed, for the host."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    path: Tensor
    count: Tensor
    committed: Tensor
    bonus: Tensor
    report: Tensor


def run_target(
    pair: Pair, ids: Tensor, positions: Tensor, seen: View, cache: KeyValueCache, last_only: bool = False
) -> tuple[Tensor, Tensor]:
    """One forward of transformers' own model, its keys and values written where `cache` was placed.

    Args: ids and positions int64 [B, T]. Returns: logits [B, T or 1, V] and tapped hidden states [B, T, taps · H].
    """
    # transformers hands on to the attention what it does not know itself
    extra: dict[str, Any] = {} if seen.bias is not None else {"view": seen}
    if cache.is_lent:
        extra |= {"slots": cache.slots, "window": cache.window}
    out = pair.target(
        input_ids=ids,
        position_ids=positions,
        attention_mask=pair.masks(seen.bias, positions, cache),
        past_key_values=None if cache.is_lent else cache,
        use_cache=not cache.is_lent,
        logits_to_keep=1 if last_only else 0,
        **extra,
    )
    taps = [pair.tapped[index].to(pair.device) for index in pair.head.config.taps]
    return out.logits, torch.cat(taps, dim=-1)


def run_head(
    pair: Pair, ids: Tensor, g: Tensor, positions: Tensor, seen: View, state: State, attention: str
) -> Tensor:
    """The head over pairs, keys and values written where `state.head_cache` was placed; → h [B, T, H]."""
    cache = state.head_cache
    assert cache is not None
    scale = pair.head.config.head_size**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ATTENTIONS[attention](query, *cache.update(key, value, 0), seen, scale)

    return pair.head(ids, g, positions, attend)


def best_children(head: DraftHead, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row of draft logits [..., V]: target ids int64 and log-probabilities float32."""
    logits = logits.float()
    values, ids = largest(logits, k)
    # not above 0: the sum has the largest logit in it
    return head.target_ids(ids), values - logits.logsumexp(-1, keepdim=True)


def grow(
    head: DraftHead, logits: Tensor, h: Tensor, score: Tensor, seen: Tensor, first: Tensor
) -> tuple[Tensor, ...]:
    """Children of a frontier, and the best of them as the next one.

    Args: logits [B, k, V], h [B, k, H] and score [B, k] of the frontier; seen bool [B, k, m], the drafted nodes that each attends to;
    first int64 [], the candidate index of the first child. Returns: the children's tokens and scores [B, k²]; of the
    next frontier: tokens, candidate indices and scores [B, k], hidden states and what they see.
    """
    k = score.shape[1]
    ids, values = best_children(head, logits, k)
    child_scores = (score[..., None] + values).flatten(1)
    best, chosen = child_scores.topk(k, dim=-1)
    row = (chosen // k)[..., None]
    g = h.gather(1, row.expand(-1, -1, h.shape[-1]))
    tokens = ids.flatten(1)
    kept = (tokens.gather(1, chosen), chosen + first, best, g, seen.gather(1, row.expand_as(seen)))
    return tokens, child_scores, *kept


def expand(
    pair: Pair, state: State, shape: TreeShape, attention: str, span: Span, name: str = "eager"
) -> tuple[Tensor, Tensor, Tensor]:
    """Grow the tree from `state.hidden`; → tokens, scores and parents of all candidates, each [B, pool].

    Scores are cumulative log-probabilities in float32; parents are candidate indices, -1 for the root. `name` is the
    runtime: some have the repeated parts compiled.
    """
    k, rows, device = shape.top_k, state.root.shape[0], state.root.device
    head, cache, drafted = pair.head, state.head_cache, shape.top_k * shape.depth
    draft, growing = piece(name, run_head), piece(name, grow)
    assert cache is not None
    with span("select"):
        frontier, score = best_children(head, head.logits(state.hidden), k)
        tokens, scores, parents = [frontier], [score], [torch.full_like(frontier, -1)]
        first = torch.arange(k, device=device)
        starts = k + k * k * torch.arange(
            shape.depth, device=device
        )  # candidate index of each step's first child
        index = first.expand(rows, k)  # candidate index of each frontier node
        slots = state.length[:, None] + first
        g = state.hidden[:, None].expand(-1, k, -1)
        seen = torch.zeros(
            rows, k, drafted, dtype=torch.bool, device=device
        )  # drafted nodes that each attends to
        own = torch.eye(k, dtype=torch.bool, device=device).expand(rows, k, k)
    for step in range(shape.depth):
        with span("draft"):
            seen[:, :, step * k : (step + 1) * k] = own
            cache.place(slots + step * k, state.reads(drafted), state.start + step * k)
            positions = (state.length + step)[:, None].expand(rows, k)
            h = draft(
                pair, frontier, g, positions, state.view(attention, seen, drafted, g.dtype), state, attention
            )
            logits = head.logits(h)
        with span("select"):
            parents.append(index.repeat_interleave(k, dim=1))
            children, child_scores, frontier, index, score, g, seen = growing(
                head, logits, h, score, seen, starts[step]
            )
            tokens.append(children)
            scores.append(child_scores)
    return torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(parents, 1)


def cycle(
    pair: Pair, state: State, shape: TreeShape, strategy: Strategy, sampling: Sampling, span: Span
) -> CycleTensors:
    """One cycle over all rows; `state` is left ready for the next. Only a mask builder that loops on the host waits."""
    rows, nodes, device = state.root.shape[0], shape.total_tokens + 1, state.root.device
    pool_tokens, pool_scores, pool_parents = expand(
        pair, state, shape, strategy.attention, span, strategy.runtime
    )
    with span("select"):
        kept, parents = select_nodes(pool_scores, pool_parents, shape.total_tokens)
        tokens = torch.cat((state.root[:, None], pool_tokens.gather(1, kept)), 1)
        levels = candidate_depths(shape.top_k, shape.depth, device).expand(rows, -1).gather(1, kept)
        depths = torch.cat((torch.zeros_like(levels[:, :1]), levels), 1)
    with span("tree_mask"):
        mask = build_all(MASK_BUILDERS[strategy.mask], parents, shape.depth + 1)
    with span("target"):
        slots = state.length[:, None] + torch.arange(nodes, device=device)
        state.target_cache.place(slots, state.reads(nodes), state.start)
        seen = state.view(strategy.attention, mask, nodes, pair.dtype)
        logits, taps = run_target(pair, tokens, state.length[:, None] + depths, seen, state.target_cache)
    with span("accept"):
        choice = choose(logits, sampling, _uniforms(state, depths, sampling))
        path, count = accept(tokens, parents, mask, depths, choice, shape.width)
        followed = choice.gather(1, path)
        last = (count - 1)[:, None]
        bonus = followed.gather(1, last)[:, 0]
        committed = tokens.gather(1, path)
    with span("commit"):
        commit(pair, state, path, followed, taps, last, strategy.attention, strategy.runtime)
        state.root.copy_(torch.where(state.active, bonus, state.root))
        state.length.add_(count * state.active)
        report = torch.cat((count[:, None], bonus[:, None], committed), 1)
    scores = pool_scores.gather(1, kept)
    return CycleTensors(tokens, parents, depths, scores, path, count, committed, bonus, report)


def _uniforms(state: State, depths: Tensor, sampling: Sampling) -> Tensor | None:
    # the token chosen at a node of depth d stands at position length + d + 1
    if sampling.temperature == 0:
        return None
    return state.uniforms.gather(1, state.length[:, None] + depths + 1)


def commit(
    pair: Pair,
    state: State,
    path: Tensor,
    followed: Tensor,
    taps: Tensor,
    last: Tensor,
    attention: str,
    name: str,
) -> None:
    """Move the path's keys and values to the end of the prefix and feed its pairs to the head.

    Args: path int64 [B, width]; followed int64 [B, width], the target's token after each of its nodes; taps
    [B, n + 1, taps · H]; last int64 [B, 1], the row of the last real node. Rows after it are padding: their keys and
    values land past the new prefix, where the next cycle overwrites or masks them.
    """
    width, cache = path.shape[1], state.head_cache
    assert cache is not None
    steps = torch.arange(width, device=path.device)
    slots = state.length[:, None] + steps
    state.target_cache.commit(state.length[:, None] + path, slots)
    g = pair.head.fuse(taps.gather(1, path[..., None].expand(-1, -1, taps.shape[-1])))
    cache.place(slots, state.reads(width), state.start)
    causal = (steps[None, :] <= steps[:, None]).expand(path.shape[0], -1, -1)
    seen = state.view(attention, causal, width, g.dtype)
    h = piece(name, run_head)(pair, followed, g, slots, seen, state, attention)
    chosen = h.gather(1, last[..., None].expand(-1, 1, h.shape[-1]))[:, 0]
    # a finished row keeps its hidden state too: it repeats one cycle until the others are done
    state.hidden.copy_(torch.where(state.active[:, None], chosen, state.hidden))


def plain_step(pair: Pair, state: State, strategy: Strategy, sampling: Sampling, span: Span) -> Tensor:
    """The target's own next token for each row; → report int64 [B, 3]: 1, the new token, the token committed."""
    with span("target"):
        slots, mask = state.length[:, None], torch.ones_like(state.root, dtype=torch.bool)[:, None, None]
        state.target_cache.place(slots, state.reads(1), state.start)
        seen = state.view(strategy.attention, mask, 1, pair.dtype)
        logits, _ = run_target(pair, state.root[:, None], slots, seen, state.target_cache)
    with span("accept"):
        uniform = None if sampling.temperature == 0 else state.uniforms.gather(1, slots + 1)[:, 0]
        token = choose(logits[:, 0], sampling, uniform)
        report = torch.stack((torch.ones_like(token), token, state.root), 1)
        state.root.copy_(torch.where(state.active, token, state.root))
        state.length.add_(state.active)
    return report
