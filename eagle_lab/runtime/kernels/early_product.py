"""A small product as a Triton kernel that loads its weights while the kernel before it still runs.

A small model's products take as long as launching them and waiting for memory. Weights depend on nothing, so a program
asks for all of its own before it waits for its input (programmatic dependent launch, CUDA Programming Guide), and lets
the next kernel do the same. The input's dimension is split where that fills more of the GPU; the splits' sums are added
by the caller, whose compiler does it in the kernel that reads them.
Tested by Triton's interpreter, and on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagle_lab.runtime.kernels import can_start_early, early_options


class Plan(NamedTuple):
    """Rows and outputs of one program, splits of the input's dimension, and warps."""

    rows: int
    outputs: int
    splits: int
    warps: int


MOST_ROWS = 64  # of the input
LARGEST = 10 * 2**20  # bytes of a weight: from there on the library is faster on an H100
WIDEST = 1024  # bytes of the input's dimension in one split: a program holds all of its weights in registers
MOST_SPLITS = 7  # more would no longer be added in the kernel that reads them
PROGRAMS = 80  # that many rows and outputs are not split for more


def plan(rows: int, outputs: int, inputs: int, item: int = 2) -> Plan | None:
    """How a product of x [rows, inputs] and a weight [outputs, inputs] of `item` bytes a number is cut; None where it is
    not small.

    Of up to 30 cuts, each timed on an H100 in a chain with a kernel that adds the splits, within 9% of the fastest.
    """
    least = -(-inputs * item // WIDEST)  # plain arithmetic, as torch.compile traces it
    if rows > MOST_ROWS or outputs * inputs * item > LARGEST or least > MOST_SPLITS:
        return None
    if rows <= 16:
        return Plan(16, 32, max(3, least, min(6, -(-inputs // 256))), 4)
    block, wide = (32 if outputs <= 768 else 64), (64 if outputs >= 2048 else 32)
    blocks = -(-rows // block) * -(-outputs // wide)
    splits = max(least, -(-inputs // 384) if wide == 64 else 1, min(3, round(PROGRAMS / blocks)))
    return Plan(block, wide, splits, 8 if wide == 64 and splits < 3 else 4)


def extents(cut: Plan, inputs: int) -> dict[str, int]:
    """The sizes of one split of `inputs` that the kernel is compiled for: SPAN, FIRST and REST, as it has them."""
    span = triton.cdiv(triton.cdiv(inputs, cut.splits), 16) * 16
    first = 1 << (span.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(span - first)) if span > first else 0
    return {"SPAN": span, "FIRST": first, "REST": rest}


@triton.jit
def product_kernel(
    x, weight, out, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPAN: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x [rows, inputs] times weight [outputs, inputs] over one split → out [split, rows, outputs].

    A split's SPAN inputs are FIRST and at most REST more, powers of two (REST may be 0).
    """
    n = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[:, None]
    m = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    split = tl.program_id(2)
    end = tl.minimum((split + 1) * SPAN, inputs)
    k = (split * SPAN + tl.arange(0, FIRST))[None, :]
    w = tl.load(weight + n * inputs + k, mask=(n < outputs) & (k < end), other=0.0)
    if REST > 0:
        more = (split * SPAN + FIRST + tl.arange(0, REST))[None, :]
        w_more = tl.load(weight + n * inputs + more, mask=(n < outputs) & (more < end), other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + m * inputs + k, mask=(m < rows) & (k < end), other=0.0)
    total = tl.dot(a, tl.trans(w), input_precision="ieee")
    if REST > 0:
        a_more = tl.load(x + m * inputs + more, mask=(m < rows) & (more < end), other=0.0)
        total = tl.dot(a_more, tl.trans(w_more), total, input_precision="ieee")
    at = out + split * rows * outputs + m * outputs + tl.trans(n)
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < rows) & (tl.trans(n) < outputs))


def _empty(x: Tensor, weight: Tensor) -> tuple[Tensor, Plan]:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if weight.shape[1] != inputs or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"a product of x [{rows}, {inputs}] {x.dtype} needs a contiguous weight [outputs, {inputs}] of that dtype, not "
            f"{list(weight.shape)} {weight.dtype}."
        )
    found = plan(rows, outputs, inputs, weight.element_size())
    if found is None:
        raise ValueError(f"a product of {rows} rows and a weight [{outputs}, {inputs}] is not small.")
    # one split needs no sum, so it is rounded at once
    dtype = x.dtype if found.splits == 1 else torch.float32
    return torch.empty(found.splits, rows, outputs, dtype=dtype, device=x.device), found


def _launch(x: Tensor, weight: Tensor, early: bool) -> Tensor:
    out, cut = _empty(x, weight)
    _, rows, outputs = out.shape
    inputs = x.shape[1]
    grid = (triton.cdiv(outputs, cut.outputs), triton.cdiv(rows, cut.rows), cut.splits)
    product_kernel[grid](
        x, weight, out, rows, outputs, inputs, ROWS=cut.rows, OUTPUTS=cut.outputs, **extents(cut, inputs),
        num_warps=cut.warps, **early_options(early),
    )  # fmt: skip
    return out


# an operator of its own, as torch.compile cannot launch a kernel early that it traces
@torch.library.custom_op(
    "eagle_lab::early_product", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor"
)
def _early(x: Tensor, weight: Tensor) -> Tensor:
    return _launch(x, weight, can_start_early(x.device))


@_early.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, weight)[0]


def early_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times a contiguous weight [outputs, inputs], both of one dtype → [..., outputs].

    Compiled, the kernel is launched early on a GPU that can. It may be so only where every kernel around it that is
    launched early waits before it touches memory, as `early_launch` has it.
    Raises ValueError where the product is not small (see `plan`), or the two don't go together.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    parts = _early(flat, weight) if torch.compiler.is_compiling() else _launch(flat, weight, False)
    y = parts[0] if parts.shape[0] == 1 else parts.sum(0).to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
