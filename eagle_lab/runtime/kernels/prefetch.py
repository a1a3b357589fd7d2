"""Weights brought into the GPU's L2 cache by a kernel that leaves its memory idle, for the product that comes next.

While a cycle attends, or chooses children, the memory from which the weights come has next to nothing to do. Weights
depend on nothing, so such a kernel may ask for the next product's before it does its own work: the request is the memory's
alone, nothing waits for it, and what arrives too late is read as always.
Needs a compute capability of 9.0.
Source: `cp.async.bulk.prefetch.L2` of the PTX ISA.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from eagle_lab.runtime.kernels import can_start_early

PIECE = 1024  # bytes of one request
LANES = 128  # requests of a program at a time, one a thread


@triton.jit
def prefetch(weight, program, programs, BYTES: tl.constexpr):
    """Ask for this program's share, of so many, of a weight's first BYTES, a multiple of 1024."""
    start = weight.to(tl.int64)
    for turn in range(tl.cdiv(BYTES, 1024 * 128 * programs)):
        piece = (turn * programs + program) * 128 + tl.arange(0, 128)
        # past the end the last one again, which is there already
        at = start + tl.minimum(piece, BYTES // 1024 - 1).to(tl.int64) * 1024
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


def prefetched_bytes(weight: Tensor | None, most: int) -> int:
    """How many first bytes of a weight are asked for, at most `most`; 0 where there is none, or the GPU can't."""
    if weight is None or not can_start_early(weight.device):
        return 0
    return min(weight.numel() * weight.element_size(), most) // PIECE * PIECE
