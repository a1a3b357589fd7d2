"""GPU kernels, one file each, imported only when chosen: a package they need may be missing.

A mask kernel writes all that a tree needs in one launch, for a batch of trees, from what the selection gives: the kept
candidates and the candidates' parents. Tested on an H100; without a GPU the Triton kernel is tested by Triton's
interpreter, the CUDA kernel by a compiler and, thread by thread, on the CPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_lab.runtime.early_launch import supported


class TreeTensors(NamedTuple):
    """A batch of trees: mask bool [B, N, N]; depth, parent (-1 for the root), first child and next sibling (-1 for
    none), each int64 [B, N], N = n + 1 nodes with the root."""

    mask: Tensor
    depths: Tensor
    parents: Tensor
    first_child: Tensor
    next_sibling: Tensor


def empty(rows: int, nodes: int, device: torch.device) -> TreeTensors:
    """Buffers for a kernel to fill."""
    links = [torch.empty(rows, nodes, dtype=torch.int64, device=device) for _ in range(4)]
    return TreeTensors(torch.empty(rows, nodes, nodes, dtype=torch.bool, device=device), *links)


def squeezed(trees: TreeTensors, flat: bool) -> TreeTensors:
    """The same without the batch's dimension where the caller gave one tree."""
    return TreeTensors(*(t[0] for t in trees)) if flat else trees


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU: a check of what they compute, not of their speed."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_start_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs."""
    return supported(device) and not interpreted()


def early_options(early: bool) -> dict[str, bool]:
    """What a launch of a kernel with a parameter EARLY is given. One that is early lets the next kernel start at once,
    and waits before it touches what may still be written."""
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
