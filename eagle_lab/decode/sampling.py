"""Which draft tokens are kept: greedy and sampled acceptance, on the device, in fixed shapes.

Sampling needs no rejection loop. The tree is deterministic, so each draft token was proposed with q = 1, and
going through the children of a node (accept x with probability p(x), else set p(x) = 0 and renormalise; sample
from what is left when none is accepted) is the same as drawing one token from p and following it if it is a
child: both give child x with probability p(x) and any other token y with p(y). So one draw a node stands in
for the argmax, and one acceptance rule serves both. The draw inverts the cumulative distribution at a uniform
number that belongs to the *position*, so every strategy, and plain decoding, draws the same tokens from the
same seed (common random numbers). A path visits one node a depth, so sharing the number among the nodes of a
depth leaves the distribution of the output exactly the target's.
Source: Leviathan et al. (arXiv 2211.17192), theorem 1; SpecInfer (arXiv 2305.09781) for trees.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eagle_lab.runtime.checks import Field, settings


@settings
class Sampling:
    """How the next token is chosen from the target's logits.

    temperature: 0 is greedy; top_p: above 0, at most 1; top_k_sampling: 0 is off. Raises ValueError for other values.
    """

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k_sampling: Annotated[int, Field(ge=0)] = 0


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities float64 [..., V] after temperature, top-k and top-p, in that order (transformers' order)."""
    scaled = logits.double() / sampling.temperature
    if sampling.top_k_sampling:
        kth = scaled.topk(min(sampling.top_k_sampling, scaled.shape[-1]), dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if sampling.top_p < 1:
        ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        scaled = scaled.masked_fill(dropped, float("-inf"))
    return scaled.softmax(-1)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The target's token at each row: its argmax, or the draw at `uniform` (float64, the shape of the rows).

    Args: logits [..., V]. Returns: the token int64 [...], and whether it was chosen among finite logits, bool [...]:
    one that is NaN, or infinite and chosen, makes it False.
    Raises ValueError where a draw is asked for without uniforms.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)  # of a NaN, where there is one
        return token, logits.gather(-1, token[..., None])[..., 0].isfinite()
    if uniform is None:
        raise ValueError("sampling needs one uniform number a row.")
    total = distribution(logits, sampling).cumsum(-1)
    return draw(total, uniform[..., None])[..., 0], total[..., -1].isfinite()


def draw(total: Tensor, uniform: Tensor) -> Tensor:
    """Invert cumulative sums: `total` float64 [..., V], `uniform` float64 [..., m] (or any shape for one V) → int64."""
    # scaled by the last sum, so that a sum of 0.999… can't leave the vocabulary; right=True skips zero-probability ids
    last = total[..., -1:] if total.dim() > 1 else total[-1]
    return torch.searchsorted(total, uniform * last, right=True).clamp(max=total.shape[-1] - 1)


def accept(
    tokens: Tensor, parents: Tensor, mask: Tensor, depths: Tensor, choice: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The longest path from the root on which each token is the target's choice at its parent.

    Args: tokens int64 [B, n + 1], parents int64 [B, n], mask bool [B, n + 1, n + 1], depths int64 [B, n + 1],
    choice int64 [B, n + 1] (the target's token at each node), width = depth of the deepest tree + 1.
    Returns: path int64 [B, width], the nodes of the accepted path in order, its last node repeated to the end, and
    count int64 [B], how many of them are real (the root is always accepted, so at least 1).
    """
    match = torch.ones_like(tokens, dtype=torch.bool)
    match[:, 1:] = tokens[:, 1:] == choice.gather(1, parents)
    whole = ~(mask & ~match[:, None]).any(-1)
    reached = torch.where(whole, depths, -1)
    best = reached.argmax(-1, keepdim=True)
    count = reached.gather(1, best)[:, 0] + 1
    on_path = mask.gather(1, best[..., None].expand(-1, -1, mask.shape[-1]))[:, 0]
    # siblings have different tokens, so one node a depth is on the path; the others are scattered past the end
    place = torch.where(on_path, depths, width)
    nodes = torch.arange(tokens.shape[1], device=tokens.device).expand_as(place)
    path = best.expand(-1, width + 1).scatter(1, place, nodes)
    return path[:, :width], count
