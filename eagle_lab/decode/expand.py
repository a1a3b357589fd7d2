"""Growing the draft tree: the head over each frontier, its children, and the best of them as the next frontier.

Source: EAGLE-2 (arXiv 2406.16858), section 4, over the head of EAGLE-3 (arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_lab.decode.forward import State, run_head
from eagle_lab.decode.tree import TreeShape, largest
from eagle_lab.models.pair import Pair
from eagle_lab.runtime.clock import Span
from eagle_lab.runtime.prepare import REGIONAL, compiled_if


class Candidates(NamedTuple):
    """Recorded candidates: tokens int64, scores float32 (cumulative log-probabilities) and parents int64 (candidate
    indices, -1 for the root), each [B, count]."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor


class Frontier(NamedTuple):
    """The nodes that the head reads next: tokens int64, candidate int64 (index among the candidates) and score
    float32, each [B, k]; g [B, k, H]; seen bool [B, k, depth · k], the drafted nodes that each descends from. And where
    they stand, in tensors, so that one compiled step serves all: positions int64 [B, k]; places int64 [k] among the
    drafted nodes, whose places are columns int64 [depth · k]; first int64 [], the candidate index of their first child.
    """

    tokens: Tensor
    candidate: Tensor
    score: Tensor
    g: Tensor
    seen: Tensor
    positions: Tensor
    places: Tensor
    columns: Tensor
    first: Tensor


def children(logits: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest tokens of each node, and the k best of them all.

    Args: draft logits [B, R, V] and score float32 [B, R] of R nodes. Returns: draft ids int64 and scores float32,
    [B, R · k], node after node; which of them are the best, int64 [B, k], in descending order, and their scores.
    """
    logits = logits.float()
    values, ids = largest(logits, k)
    # not above 0: the sum has the largest logit in it
    scores = (score[..., None] + (values - logits.logsumexp(-1, keepdim=True))).flatten(1)
    best, chosen = scores.topk(k, dim=-1)
    return ids.flatten(1), scores, chosen, best


def root_children(
    pair: Pair, state: State, shape: TreeShape, span: Span, on_gpu: bool
) -> tuple[Candidates, Frontier]:
    """The root's children, from the hidden state that the last commit left; they are the first frontier.

    `on_gpu`: as `selects_on_gpu` says of the runtime; two Triton kernels then choose the children, where k is within
    their limit. Returns: the k children as Candidates [B, k], their parents all -1; and as a Frontier of k nodes at
    their own, each with g of the root and no drafted node seen.
    """
    k, hidden = shape.top_k, state.hidden
    with span("select"):
        ids, scores, _, _ = _children(on_gpu, k)(
            pair.head.logits(hidden)[:, None], hidden.new_zeros(hidden.shape[0], 1, dtype=torch.float32), k
        )
        tokens = pair.head.target_ids(ids)
        columns = torch.arange(k * shape.depth, device=hidden.device)
        index = torch.arange(k, device=hidden.device)
        seen = torch.zeros(*tokens.shape, k * shape.depth, dtype=torch.bool, device=hidden.device)
        frontier = Frontier(
            tokens, index.expand_as(tokens), scores, hidden[:, None].expand(-1, k, -1), seen,
            state.length[:, None].expand_as(tokens), index, columns,
            torch.full((), k, dtype=torch.int64, device=hidden.device),
        )  # fmt: skip
        return Candidates(tokens, scores, torch.full_like(tokens, -1)), frontier


def draft_step(
    pair: Pair,
    state: State,
    shape: TreeShape,
    attention: str,
    span: Span,
    on_gpu: bool,
    frontier: Frontier,
    before: int,
) -> tuple[Candidates, Frontier]:
    """The head over one frontier: its children, and the best of them as the next frontier.

    `before`: slots before the frontier's, as a cache that grows counts them; `on_gpu`: as for `root_children`.
    Returns: the k children of each of the k nodes as Candidates [B, k · k], node after node; and the k best of them as
    the next Frontier, each with g [B, k, H], the head's output at its parent.
    """
    k, places, cache = shape.top_k, frontier.places, state.head_cache
    assert cache is not None
    with span("draft"):
        seen = frontier.seen | (frontier.columns == places[:, None])
        cache.set_slots(state.length[:, None] + places, state.slots_read(seen.shape[2]), before)
        visible = state.visibility(attention, seen, seen.shape[2], frontier.g.dtype)
        h = run_head(pair, frontier.tokens, frontier.g, frontier.positions, visible, cache, attention)
        logits = pair.head.logits(h)
    with span("select"):
        ids, scores, chosen, best = _children(on_gpu, k)(logits, frontier.score, k)
        tokens = pair.head.target_ids(ids)
        parents = frontier.candidate[..., None].expand(-1, -1, k).flatten(1)
        row = (chosen // k)[..., None]
        after = Frontier(
            tokens.gather(1, chosen), chosen + frontier.first, best, h.gather(1, row.expand(-1, -1, h.shape[-1])),
            seen.gather(1, row.expand_as(seen)), frontier.positions + 1, places + k, frontier.columns,
            frontier.first + k * k,
        )  # fmt: skip
    return Candidates(tokens, scores, parents), after


def selects_on_gpu(name: str, state: State) -> bool:
    """Whether the tree is selected in ways made for a GPU, with the same results: in compiled regions on one."""
    return name == REGIONAL and state.root.is_cuda


def _children(on_gpu: bool, k: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]:
    if not on_gpu:
        return children
    from eagle_lab.runtime.kernels.top_children import MOST, top_children

    return top_children if k <= MOST else children


def expand(
    pair: Pair, state: State, shape: TreeShape, attention: str, span: Span, name: str = "eager"
) -> list[Candidates]:
    """Grow the tree from `state.hidden`; → the root's children, then those of each frontier (`joined` makes one of them).

    `name` is the runtime: one that compiles in regions has the step compiled, and on a GPU its children chosen by two
    kernels.
    """
    on_gpu, rows = selects_on_gpu(name, state), len(state.root)
    first, frontier = compiled_if(name, root_children, rows)(pair, state, shape, span, on_gpu)
    recorded, step = [first], compiled_if(name, draft_step, rows)
    for number in range(shape.depth):
        # under a fixed window nothing may depend on the number, or the step would be compiled for each
        before = 0 if state.window is not None else state.start + number * shape.top_k
        level, frontier = step(pair, state, shape, attention, span, on_gpu, frontier, before)
        recorded.append(level)
    return recorded


def joined(recorded: Sequence[Candidates]) -> Candidates:
    """All candidates in the order in which they were recorded, each [B, pool]."""
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*recorded, strict=True)))
