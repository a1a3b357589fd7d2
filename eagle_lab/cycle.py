"""One decoding cycle on the device: draft a tree, verify it with one target forward, accept a path, commit it.

Everything is tensors of fixed shape: a tree has total_tokens + 1 nodes, a commit is padded to depth + 2 rows, and
how many of them count is a tensor. State is written in place. So the whole cycle can be one compiled function or
one CUDA graph, and the host learns of it by one small copy, `CycleTensors.report`.
Source: EAGLE-3 (arXiv 2503.01840) and EAGLE-2 (arXiv 2406.16858).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle_lab.accept import Sampling, accept, choose
from eagle_lab.attention import View
from eagle_lab.cache import KeyValueCache
from eagle_lab.clock import Span
from eagle_lab.expansion import expand, run_head
from eagle_lab.masks import MASK_BUILDERS, build_all
from eagle_lab.models import Pair
from eagle_lab.runtime import piece
from eagle_lab.state import CycleTensors, State, TreeShape
from eagle_lab.strategy import Strategy
from eagle_lab.tree import candidate_depths, select_nodes


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
