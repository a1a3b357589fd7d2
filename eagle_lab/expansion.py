"""Growing the draft tree: the head over each frontier, its children, and the best of them as the next frontier.

Source: EAGLE-2 (arXiv 2406.16858), section 4, over the head of EAGLE-3 (arXiv 2503.01840).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_lab.attention import ATTENTIONS, View
from eagle_lab.clock import Span
from eagle_lab.draft import DraftHead
from eagle_lab.models import Pair
from eagle_lab.runtime import piece
from eagle_lab.state import State, TreeShape
from eagle_lab.tree import largest


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
