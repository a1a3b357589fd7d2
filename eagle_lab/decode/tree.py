"""The draft tree: its sizes, parents and depths, and the selection of the nodes that are kept.

Node 0 is the root (the last committed token). `parents` holds one entry for each *draft* node: `parents[i]`
is the parent of node i + 1, and is smaller than i + 1, so parents come before their children.
Source: EAGLE-2 (arXiv 2406.16858), section 4; the conventions are those of the official implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from eagle_lab.runtime.checks import Field, settings

Count = Annotated[int, Field(ge=1)]


@settings
class TreeShape:
    """Sizes of the draft tree; `total_tokens` counts draft nodes, the root not. Raises ValueError for sizes that can't be."""

    top_k: Count = 10
    depth: Count = 7
    total_tokens: Count = 63

    def __post_init__(self) -> None:
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


def depths_of(parents: Sequence[int]) -> list[int]:
    """Depth of each node 0..n from the parents of nodes 1..n."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return depths


def pool_size(top_k: int, depth: int) -> int:
    """Number of candidates that an expansion records: top_k + depth · top_k²."""
    return top_k + depth * top_k * top_k


# from small to large, by their nodes
TREES = {
    3: TreeShape(2, 2, 3),
    7: TreeShape(3, 3, 7),
    15: TreeShape(4, 4, 15),
    31: TreeShape(6, 5, 31),
    63: TreeShape(10, 7, 63),
}


def candidate_depths(top_k: int, depth: int, device: torch.device | str = "cpu") -> Tensor:
    """Depth of each recorded candidate, int64 [pool]: 1 for the first top_k, then 2, 3, … for each top_k²."""
    index = torch.arange(pool_size(top_k, depth), device=device)
    return torch.where(index < top_k, 1, (index - top_k) // (top_k * top_k) + 2)


def largest(x: Tensor, count: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """The `count` largest along the last dimension of x [..., V], in descending order, and their int64 indices.

    In two stages, as they all lie in the `count` blocks with the largest maxima: on a GPU a fraction of topk's time
    over a whole vocabulary.
    """
    width = x.shape[-1]
    blocks = width // block
    if width % block or blocks <= count:
        best = x.topk(count, dim=-1)
        return best.values, best.indices
    parts = x.unflatten(-1, (blocks, block))
    chosen = parts.amax(-1).topk(count, dim=-1).indices
    some = parts.gather(-2, chosen[..., None].expand(*chosen.shape, block)).flatten(-2)
    best = some.topk(count, dim=-1)
    return best.values, chosen.gather(-1, best.indices // block) * block + best.indices % block


def select_nodes(scores: Tensor, parents: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """Keep the `total_tokens` best candidates and link them into a tree.

    Args: scores float [B, pool], cumulative log-probabilities in recording order (a parent is recorded before
    its children and never scores lower); parents int64 [B, pool], the candidate index of each one's parent, -1
    for the root.
    Returns: kept int64 [B, total_tokens], candidate indices in ascending order, and tree parents int64
    [B, total_tokens], where 0 is the root and i + 1 is kept[i].

    The sort is stable, so that of two candidates with equal scores the earlier one, the parent, is kept: a plain
    top-k may drop it and leave an orphan (a trap of the official implementation).
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return _linked(order[:, :total_tokens].sort(dim=-1).values, parents)


COUNTED = 4096  # candidates up to which counting is the faster way: it compares each with each


def select_by_counting(scores: Tensor, parents: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """`select_nodes` without a sort: each candidate counts those that come before it, so that a compiler for a GPU makes
    a few small kernels of it, and pool² comparisons.

    Args and returns: as for `select_nodes`, scores float [B, pool], parents int64 [B, pool].
    """
    pool = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    before = (other > mine) | ((other == mine) & (pool[None, :] < pool[:, None]))
    kept = before.sum(-1) < total_tokens
    # scores that are no numbers have nothing before them, so that too many may be kept: none is written out of bounds
    place = torch.where(kept, kept.cumsum(-1) - 1, total_tokens).clamp(max=total_tokens)
    chosen = torch.zeros(scores.shape[0], total_tokens + 1, dtype=torch.int64, device=scores.device)
    return _linked(chosen.scatter(1, place, pool.expand_as(place))[:, :total_tokens].contiguous(), parents)


def _linked(kept: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    parent = parents.gather(1, kept)
    node = torch.searchsorted(kept, parent.clamp(min=0)) + 1
    return kept, torch.where(parent < 0, 0, node)
