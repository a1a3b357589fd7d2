"""The tree mask as a Triton kernel: one launch writes the masks of a batch of trees.

A program has a few rows of one tree and all its columns. It climbs from its rows to the root: in each step the tile of
"column is where the row's walk stands" is both what joins the mask and, summed against the parents, the next step. No
shared memory, no atomics, no order to rely on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # elements of a program's tile
MAX_NODES = 4096


@triton.jit
def tree_kernel(up, mask, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Parents int64 [n] of each tree → its mask, a byte each [n + 1, n + 1]."""
    tree = tl.program_id(1).to(tl.int64)
    nodes = n + 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    drafted = (cols > 0) & (cols < nodes)
    parent = tl.load(up + tree * n + cols - 1, mask=drafted, other=0).to(tl.int32)
    at = tl.where(rows < nodes, rows, 0)
    seen = (cols[None, :] == rows[:, None]) | (cols[None, :] == 0)
    while tl.max(at, 0) > 0:
        stands = cols[None, :] == at[:, None]
        seen = seen | stands
        above = tl.sum(tl.where(stands, parent[None, :], 0), 1)
        at = tl.where(at > 0, above, 0)
    whole = (rows < nodes)[:, None] & (cols < nodes)[None, :]
    line = tree * nodes + rows
    tl.store(mask + line[:, None] * nodes + cols[None, :], seen.to(tl.int8), mask=whole)


def tree_mask(parents: Tensor) -> Tensor:
    """Masks bool [B, n + 1, n + 1] of trees, parents int64 [B, n] (0 the root, parents[i] < i + 1).

    Raises ValueError for a tree that is larger than the kernel's limit.
    """
    nodes = parents.shape[1] + 1
    if nodes > MAX_NODES:
        raise ValueError(f"a tree of {nodes} nodes is larger than the kernel's {MAX_NODES}.")
    columns = max(16, triton.next_power_of_2(nodes))
    rows = max(1, min(16, TILE // columns))
    mask = torch.empty(len(parents), nodes, nodes, dtype=torch.bool, device=parents.device)
    grid = (triton.cdiv(nodes, rows), len(parents))
    tree_kernel[grid](parents.contiguous(), mask.view(torch.int8), nodes - 1, ROWS=rows, COLS=columns)
    return mask
