"""The tree mask as a Triton kernel: one launch writes mask, depths and links of a batch of trees.

A program has a few rows of one tree and all its columns. It links the kept candidates (a binary search for each one's
parent), then climbs from its rows to the root: in each step the tile of "column is where the row's walk stands" is both
what joins the mask and, summed against the parents, the next step. No shared memory, no atomics, no order to rely on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_lab.runtime.kernels import TreeTensors, empty, squeezed

TILE = 8192  # elements of a program's tile
MAX_NODES = 4096


@triton.jit
def tree_kernel(
    kept, up, mask, depths, parents, first_child, next_sibling, n, pool,
    LINKED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """LINKED: `up` holds tree parents [n]; else candidate parents [pool], to be linked by `kept`. STEPS: of the search."""
    tree = tl.program_id(1).to(tl.int64)
    nodes = n + 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    drafted = (cols > 0) & (cols < nodes)
    if LINKED:
        parent = tl.load(up + tree * pool + cols - 1, mask=drafted, other=0).to(tl.int32)
    else:
        own = tl.load(kept + tree * n + cols - 1, mask=drafted, other=0)
        wanted = tl.load(up + tree * pool + own, mask=drafted, other=-1)
        low = tl.zeros([COLS], tl.int32)
        high = low + n
        for _ in range(STEPS):
            middle = (low + high) // 2
            here = tl.load(kept + tree * n + middle, mask=drafted & (low < high), other=0)
            right = (here < wanted) & (low < high)
            high = tl.where(right, high, middle)
            low = tl.where(right, middle + 1, low)
        parent = tl.where(wanted < 0, 0, low + 1)
    parent = tl.where(drafted, parent, -1)

    at = tl.where(rows < nodes, rows, 0)
    depth = tl.zeros([ROWS], tl.int32)
    seen = (cols[None, :] == rows[:, None]) | (cols[None, :] == 0)
    while tl.max(at, 0) > 0:
        stands = cols[None, :] == at[:, None]
        seen = seen | stands
        above = tl.sum(tl.where(stands, parent[None, :], 0), 1)
        depth += (at > 0).to(tl.int32)
        at = tl.where(at > 0, above, 0)
    own_parent = tl.sum(tl.where(cols[None, :] == rows[:, None], parent[None, :], 0), 1)
    is_child = drafted[None, :] & (parent[None, :] == rows[:, None])
    is_sibling = drafted[None, :] & (parent[None, :] == own_parent[:, None]) & (cols[None, :] > rows[:, None])
    child = tl.min(tl.where(is_child, cols[None, :], COLS), 1)
    sibling = tl.min(tl.where(is_sibling, cols[None, :], COLS), 1)

    inside = rows < nodes
    line = tree * nodes + rows
    whole = inside[:, None] & (cols < nodes)[None, :]
    tl.store(mask + line[:, None] * nodes + cols[None, :], seen.to(tl.int8), mask=whole)
    tl.store(depths + line, depth.to(tl.int64), mask=inside)
    tl.store(parents + line, own_parent.to(tl.int64), mask=inside)
    tl.store(first_child + line, tl.where(child < COLS, child, -1).to(tl.int64), mask=inside)
    tl.store(next_sibling + line, tl.where(sibling < COLS, sibling, -1).to(tl.int64), mask=inside)


def _launch(kept: Tensor, up: Tensor, n: int, linked: bool) -> TreeTensors:
    nodes = n + 1
    if nodes > MAX_NODES:
        raise ValueError(f"a tree of {nodes} nodes is larger than the kernel's {MAX_NODES}.")
    columns = max(16, triton.next_power_of_2(nodes))
    rows = max(1, min(16, TILE // columns))
    out = empty(up.shape[0], nodes, up.device)
    grid = (triton.cdiv(nodes, rows), up.shape[0])
    tree_kernel[grid](
        kept, up, out.mask.view(torch.int8), *out[1:], n, up.shape[1],
        LINKED=linked, STEPS=n.bit_length(), ROWS=rows, COLS=columns,
    )  # fmt: skip
    return out


def from_parents(parents: Tensor) -> TreeTensors:
    """Trees from their parents, int64 [B, n] or [n] (0 the root, parents[i] < i + 1)."""
    up = torch.atleast_2d(parents).contiguous()
    return squeezed(_launch(up, up, up.shape[1], True), parents.dim() == 1)


def from_selection(kept: Tensor, candidate_parents: Tensor) -> TreeTensors:
    """Trees from the selection: kept int64 [B, n] in ascending order, candidate_parents int64 [B, pool], -1 the root."""
    return _launch(kept.contiguous(), candidate_parents.contiguous(), kept.shape[1], False)
