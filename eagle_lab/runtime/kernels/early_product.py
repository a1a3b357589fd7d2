"""A product as a Triton kernel that asks for its weights while the kernel before it still runs.

A decode's products take as long as launching them, waiting for memory and bringing their weights. Weights depend on
nothing, so a program asks for its own before it waits for its input (programmatic dependent launch, CUDA Programming
Guide), and lets the next kernel do the same. Of a small product a program loads all of its weights first; of a larger one
it has the first bytes of each row brought into the L2 cache, and streams the rest. The input's dimension is split where
that fills more of the GPU; the splits' sums are added by the caller, whose compiler does it in the kernel that reads them.
The cuts are Hopper's; other GPUs from a compute capability of 9.0 on take them too, untimed.
Tested by Triton's interpreter, and on an H100.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagle_lab.runtime.kernels import can_start_early, early_options


class Plan(NamedTuple):
    """Rows and outputs of one program, splits of the input's dimension, warps, and stages: turns of weights that are under
    way at once, 0 where weights aren't streamed."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int = 0


MOST_ROWS = 64  # of the input
STREAMED_FROM = 10 * 2**20  # bytes of a weight that is no longer small
WIDEST = 1024  # bytes of the input's dimension in one split: a program holds all of its weights in registers
MOST_SPLITS = 7  # more would no longer be added in the kernel that reads them
PROGRAMS = 80  # that many rows and outputs are not split for more
TURN = 256  # bytes of each weight's row in one turn where weights are streamed
MANY = 16384  # outputs from which on they fill the GPU in larger programs
STREAMS = 132  # programs at most that streamed weights are split for, a multiprocessor of an H100 each
H100_SHARED = 232_448  # bytes of shared memory that a program may have there
BARRIERS = 1024  # of them for what isn't weights or rows
AHEAD = 512  # bytes of each weight's row that are asked for before the wait


def plan(rows: int, outputs: int, inputs: int, item: int = 2) -> Plan | None:
    """How a product of x [rows, inputs] and a weight [outputs, inputs] of `item` bytes a number is cut; None where the
    library makes it.

    A small product's cut is within 9% of the fastest of up to 30, each timed on an H100 in a chain with a kernel that adds
    the splits; see `streamed` for the others.
    """
    least = -(-inputs * item // WIDEST)  # plain arithmetic, as torch.compile traces it
    if rows > MOST_ROWS:
        return None
    if item == 1 or outputs * inputs * item > STREAMED_FROM or least > MOST_SPLITS:
        return streamed(rows, outputs, inputs, item)
    if rows <= 16:
        return Plan(16, 32, max(3, least, min(6, -(-inputs // 256))), 4)
    block, wide = (32 if outputs <= 768 else 64), (64 if outputs >= 2048 else 32)
    blocks = -(-rows // block) * -(-outputs // wide)
    splits = max(least, -(-inputs // 384) if wide == 64 else 1, min(3, round(PROGRAMS / blocks)))
    return Plan(block, wide, splits, 8 if wide == 64 and splits < 3 else 4)


def streamed(rows: int, outputs: int, inputs: int, item: int) -> Plan | None:
    """How a product whose weights are streamed is cut; None where its inputs are no whole number of turns, or 4 bytes each.

    Each of up to 200 cuts was timed in a chain with a kernel before it and one that adds the splits. For 18 weights of models
    of 1 and 8 billion in bfloat16 on an H200 this one is within 6% of the fastest, and 3 to 25% faster than the library in
    the same chain; for 10 in e4m3 on an H100 within 2%, and 6 to 26% faster.
    """
    turn = TURN // item
    if item > 2 or inputs % turn:
        return None
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if outputs >= MANY:
        return Plan(block, 256, 1, 4, 3) if block == 16 else Plan(block, 128, 1, 8, 4)
    splits = 1
    for more in range(2, MOST_SPLITS + 1):
        if more * -(-outputs // 64) <= STREAMS and inputs % (more * turn) == 0:
            splits = more
    return Plan(block, 64, splits, 4, 6)


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


@triton.jit
def stream_kernel(
    x, weight, out, rows, outputs, inputs, span,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TURN: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [rows, inputs] times weight [outputs, inputs] over one split of `span` inputs → out [split, rows, outputs].

    TURN: inputs of one turn. AHEAD: bytes of each weight's row in the split that are brought into the L2 cache before the wait.
    """
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    start = split * span
    # past the last output its row again, whose products are not stored
    row = weight + tl.minimum(n, outputs - 1).to(tl.int64) * inputs
    if EARLY:
        gdc_launch_dependents()
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
            [(row + start).to(tl.int64), tl.full((OUTPUTS,), AHEAD, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    m = tl.arange(0, ROWS)[None, :]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in range(start, start + span, TURN):
        turn = k + tl.arange(0, TURN)
        w = tl.load(row[:, None] + turn[None, :])
        a = tl.load(x + m * inputs + turn[:, None], mask=m < rows, other=0.0)
        total = tl.dot(w, a, total)
    at = out + (split * rows + m) * outputs + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n[:, None] < outputs) & (m < rows))


def stages_in(cut: Plan, room: int) -> int:
    """As many turns at once as the plan says, fewer where a program's shared memory, `room` bytes, doesn't hold them."""
    return max(1, min(cut.stages, (room - BARRIERS) // ((cut.rows + cut.outputs) * TURN)))


@lru_cache  # asking the driver takes a millisecond, more than all else in a launch
def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return H100_SHARED
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    found: int = properties["max_shared_mem"]
    return found


def _empty(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Plan]:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if weight.shape[1] != inputs or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"a product of x [{rows}, {inputs}] {x.dtype} needs a contiguous weight [outputs, {inputs}] of that dtype, not "
            f"{list(weight.shape)} {weight.dtype}."
        )
    found = plan(rows, outputs, inputs, weight.element_size())
    if found is None:
        raise ValueError(f"a product of {rows} rows and a weight [{outputs}, {inputs}] is the library's.")
    # one split needs no sum, so it is rounded at once
    parts = dtype if found.splits == 1 else torch.float32
    return torch.empty(found.splits, rows, outputs, dtype=parts, device=x.device), found


def _launch(x: Tensor, weight: Tensor, dtype: torch.dtype, early: bool) -> Tensor:
    out, cut = _empty(x, weight, dtype)
    _, rows, outputs = out.shape
    inputs = x.shape[1]
    blocks = triton.cdiv(outputs, cut.outputs)
    if cut.stages:
        span, item = inputs // cut.splits, x.element_size()
        stream_kernel[(blocks, cut.splits)](
            x, weight, out, rows, outputs, inputs, span, ROWS=cut.rows, OUTPUTS=cut.outputs, TURN=TURN // item,
            AHEAD=min(AHEAD, span * item), num_warps=cut.warps, num_stages=stages_in(cut, _room(x.device)),
            **early_options(early),
        )  # fmt: skip
        return out
    product_kernel[(blocks, triton.cdiv(rows, cut.rows), cut.splits)](
        x, weight, out, rows, outputs, inputs, ROWS=cut.rows, OUTPUTS=cut.outputs, **extents(cut, inputs),
        num_warps=cut.warps, **early_options(early),
    )  # fmt: skip
    return out


# an operator of its own, as torch.compile cannot launch a kernel early that it traces
@torch.library.custom_op(
    "eagle_lab::early_product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, ScalarType dtype) -> Tensor",
)
def _early(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch(x, weight, dtype, can_start_early(x.device))


@_early.register_fake
def _(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty(x, weight, dtype)[0]


def early_product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., inputs] times a contiguous weight [outputs, inputs], both of one dtype → [..., outputs] of `dtype`, theirs
    where it is None; e4m3 needs one.

    Compiled, the kernel is launched early on a GPU that can. It may be so only where every kernel around it that is
    launched early waits before it touches memory, as `early_launch` has it.
    Raises ValueError where the product is the library's (see `plan`), or the two don't go together.
    """
    flat, dtype = x.reshape(-1, x.shape[-1]).contiguous(), dtype or x.dtype
    compiling = torch.compiler.is_compiling()
    parts = _early(flat, weight, dtype) if compiling else _launch(flat, weight, dtype, False)
    y = parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
