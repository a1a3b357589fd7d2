"""One decoding cycle on the device: draft a tree, verify it with one target forward, accept a path, commit it.

Everything is tensors of fixed shape: a tree has total_tokens + 1 nodes, a commit is padded to depth + 2 rows, and
how many of them count is a tensor. State is written in place. So the whole cycle can be one compiled function or
one CUDA graph, and the host learns of it by one small copy, `CycleTensors.report`.
Source: EAGLE-3 (arXiv 2503.01840) and EAGLE-2 (arXiv 2406.16858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_lab.decode.attention import Visibility
from eagle_lab.decode.expand import Candidates, expand, joined, selects_on_gpu
from eagle_lab.decode.forward import HEAD, TARGET, State, run_head, run_target
from eagle_lab.decode.masks import MASK_BUILDERS, build_all
from eagle_lab.decode.sampling import Sampling, accept, choose
from eagle_lab.decode.strategy import Strategy
from eagle_lab.decode.tree import COUNTED, TreeShape, candidate_depths, select_by_counting, select_nodes
from eagle_lab.models.pair import Pair
from eagle_lab.runtime.clock import Span
from eagle_lab.runtime.prepare import compiled_if


@dataclass(frozen=True)
class CycleTensors:
    """One cycle's outcome on the device: tokens and depths int64 [B, n + 1], parents int64 [B, n], scores float32
    [B, n], path int64 [B, width], count int64 [B] (rows of `path` that are real), committed int64 [B, width]
    (tokens along `path`), bonus int64 [B]; report int64 [B, 2 + width]: count, bonus and committed, for the host;
    where numbers weren't finite the count is -fault (see `State`)."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    path: Tensor
    count: Tensor
    committed: Tensor
    bonus: Tensor
    report: Tensor


def cycle(
    pair: Pair, state: State, shape: TreeShape, strategy: Strategy, sampling: Sampling, span: Span
) -> CycleTensors:
    """One cycle over all rows; `state` is left ready for the next. Only a mask builder that loops on the host waits."""
    name, rows, nodes = strategy.runtime, len(state.root), shape.total_tokens + 1
    recorded = expand(pair, state, shape, strategy.attention, span, name)
    with span("select"):
        tokens, parents, depths, scores = compiled_if(name, select, rows)(
            state, recorded, shape, selects_on_gpu(name, state)
        )
    with span("tree_mask"):
        mask = build_all(MASK_BUILDERS[strategy.mask], parents, shape.depth + 1)
    with span("target"):
        slots, positions, visible = compiled_if(name, positions_and_visibility, rows)(
            state, depths, mask, strategy.attention, pair.dtype
        )
        state.target_cache.set_slots(slots, state.slots_read(nodes), state.start)
        logits, taps = run_target(pair, tokens, positions, visible, state.target_cache)
    with span("accept"):
        accepted = compiled_if(name, verify, rows)(
            state, tokens, parents, mask, depths, scores, logits, sampling, shape.width
        )
    with span("commit"):
        # outside the region: a compiler may copy the whole cache to move a few of its rows
        state.target_cache.commit(accepted.source, accepted.slots)
        compiled_if(name, feed, rows)(pair, state, accepted, taps, strategy.attention)
    return CycleTensors(
        tokens, parents, depths, scores,
        accepted.path, accepted.length, accepted.committed, accepted.bonus, accepted.report,
    )  # fmt: skip


def select(
    state: State, recorded: Sequence[Candidates], shape: TreeShape, by_counting: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates as a tree: tokens and depths int64 [B, n + 1], parents int64 and scores float32 [B, n]."""
    pool = joined(recorded)
    choose_nodes = select_by_counting if by_counting and pool.scores.shape[1] <= COUNTED else select_nodes
    kept, parents = choose_nodes(pool.scores, pool.parents, shape.total_tokens)
    tokens = torch.cat((state.root[:, None], pool.tokens.gather(1, kept)), 1)
    levels = candidate_depths(shape.top_k, shape.depth, kept.device).expand(kept.shape[0], -1).gather(1, kept)
    depths = torch.cat((torch.zeros_like(levels[:, :1]), levels), 1)
    return tokens, parents, depths, pool.scores.gather(1, kept)


def positions_and_visibility(
    state: State, depths: Tensor, mask: Tensor, attention: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Visibility]:
    """Where the tree's nodes go and what they see: slots and positions int64 [B, n + 1], and the forward's visibility."""
    nodes, prefix = depths.shape[1], state.length[:, None]
    slots = prefix + torch.arange(nodes, device=prefix.device)
    return slots, prefix + depths, state.visibility(attention, mask, nodes, dtype)


class Accepted(NamedTuple):
    """What the target accepts, int64: path [B, width], length [B] (rows of it that are real), followed [B, width], the
    target's token after each node of the path, committed [B, width], the path's tokens, bonus [B], report (see
    `CycleTensors`), and the cache slots of the path's nodes, source [B, width], and where they go, slots [B, width]."""

    path: Tensor
    length: Tensor
    followed: Tensor
    committed: Tensor
    bonus: Tensor
    report: Tensor
    source: Tensor
    slots: Tensor


def verify(
    state: State,
    tokens: Tensor,
    parents: Tensor,
    mask: Tensor,
    depths: Tensor,
    scores: Tensor,
    logits: Tensor,
    sampling: Sampling,
    width: int,
) -> Accepted:
    """Follow the target's tokens through the tree; arguments as for `accept`, scores [B, n] and logits [B, n + 1, V]."""
    uniforms, prefix = None, state.length[:, None]
    if sampling.temperature != 0:
        # the token chosen at a node of depth d stands at position length + d + 1
        uniforms = state.uniforms.gather(1, prefix + depths + 1)
    choice, finite = choose(logits, sampling, uniforms)
    path, count = accept(tokens, parents, mask, depths, choice, width)
    followed, committed = choice.gather(1, path), tokens.gather(1, path)
    bonus = followed.gather(1, (count - 1)[:, None])[:, 0]
    state.fault.bitwise_or_(~finite.gather(1, path).all(1) * TARGET + scores.isnan().any(1) * HEAD)
    report = torch.cat((_told(state, count)[:, None], bonus[:, None], committed), 1)
    slots = prefix + torch.arange(width, device=prefix.device)
    return Accepted(path, count, followed, committed, bonus, report, prefix + path, slots)


def _told(state: State, count: Tensor) -> Tensor:
    # in what the host reads anyway: a flag of its own would be one more copy
    return torch.where(state.fault > 0, -state.fault, count)


def feed(pair: Pair, state: State, accepted: Accepted, taps: Tensor, attention: str) -> None:
    """Feed the committed pairs to the head and move the state on; taps [B, n + 1, taps · H].

    Rows after the last real node are padding: their keys and values land past the new prefix, where the next cycle
    overwrites or masks them.
    """
    path, slots, cache = accepted.path, accepted.slots, state.head_cache
    width = path.shape[1]
    assert cache is not None
    steps = torch.arange(width, device=path.device)
    g = pair.head.fuse(taps.gather(1, path[..., None].expand(-1, -1, taps.shape[-1])))
    cache.set_slots(slots, state.slots_read(width), state.start)
    causal = (steps[None, :] <= steps[:, None]).expand(path.shape[0], -1, -1)
    visible = state.visibility(attention, causal, width, g.dtype)
    h = run_head(pair, accepted.followed, g, slots, visible, cache, attention)
    chosen = h.gather(1, (accepted.length - 1)[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]
    # a finished row keeps its hidden state too: it repeats one cycle until the others are done
    state.hidden.copy_(torch.where(state.active[:, None], chosen, state.hidden))
    state.root.copy_(torch.where(state.active, accepted.bonus, state.root))
    state.length.add_(accepted.length * state.active)


def plain_step(pair: Pair, state: State, strategy: Strategy, sampling: Sampling, span: Span) -> Tensor:
    """The target's own next token for each row; → report int64 [B, 3]: 1 or -fault, the new token, the token committed."""
    with span("target"):
        slots, mask = state.length[:, None], torch.ones_like(state.root, dtype=torch.bool)[:, None, None]
        state.target_cache.set_slots(slots, state.slots_read(1), state.start)
        visible = state.visibility(strategy.attention, mask, 1, pair.dtype)
        logits, _ = run_target(pair, state.root[:, None], slots, visible, state.target_cache)
    with span("accept"):
        return compiled_if(strategy.runtime, _plain_token, len(state.root))(state, logits, sampling)


def _plain_token(state: State, logits: Tensor, sampling: Sampling) -> Tensor:
    uniform = None if sampling.temperature == 0 else state.uniforms.gather(1, state.length[:, None] + 1)[:, 0]
    token, finite = choose(logits[:, 0], sampling, uniform)
    state.fault.bitwise_or_(~finite * TARGET)
    report = torch.stack((_told(state, torch.ones_like(token)), token, state.root), 1)
    state.root.copy_(torch.where(state.active, token, state.root))
    state.length.add_(state.active)
    return report
