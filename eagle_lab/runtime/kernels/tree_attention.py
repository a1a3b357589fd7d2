"""Tree attention as Triton kernels: the prefix without a mask, the tree with one.

A program has some rows of one key/value head, all heads of its group and all nodes stacked, and keeps the running
maximum and sum of the softmax. In a short window it reads prefix and tree itself. In a longer one it has one split of the
slots, and a second kernel joins the splits by their log-sum-exp. There are as many splits as fill a large GPU, and each is
as long as the text makes it: the time follows the text, not the window, and the splits' values stay a small part of the
keys and values. How long the prefix is lies in a tensor, so all can be replayed from a CUDA graph while the text grows.
Tested by Triton's interpreter, and on an H100.
Source: Flash-Decoding (Dao et al., 2023) for the splits; arXiv 2205.14135, section 3.1, for the running softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagle_lab.runtime.kernels import can_start_early, early_options

COLUMNS = 64  # keys that a program reads at a time, and the fewest slots in one split
ROWS = 128  # the most rows of one program over a split, of numbers of two bytes: each reads all of its split's keys
SHORT = 1024  # slots of a window up to which one program reads all of it: on an H100 faster than splits and their join
TILE_BYTES = 32768  # bytes of keys in one tile; the values and the overlapped loads need as much again
PROGRAMS = 264  # as many as two of four warps, or one of eight, for each multiprocessor of a large GPU
NEVER = tl.constexpr(-1.0e30)  # below every score; not -inf, as -inf - -inf is NaN


@triton.jit
def _queries(query, row, lane, rows, D: tl.constexpr, WIDE: tl.constexpr):
    """Some rows' queries [ROWS, WIDE], zeros where there is no row."""
    d = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    return tl.load(query + (lane * rows + row)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _attended(
    q, mixed, weight, highest, keys, values, mask, prefix, begin, end, tiles, row, batch, nodes, columns, rows,
    key_slot, value_slot,
    D: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Go on over `tiles` tiles of slots from `begin`: what the rows see, mixed by unnormed weights [ROWS, WIDE], the
    weights' sum and the highest score [ROWS], float32.

    MARKED: slots past the prefix are seen by the mask, and none past the end; else all slots of the tiles are seen.
    """
    d = tl.arange(0, WIDE)
    real = row < rows
    for tile in range(tiles):  # slots past the end are not read
        slot = begin + tile * COLS + tl.arange(0, COLS)
        key_at, value_at = (
            keys + slot[:, None] * key_slot + d[None, :],
            values + slot[:, None] * value_slot + d[None, :],
        )
        if MARKED:
            there = (slot < end)[:, None] & (d < D)[None, :]
            k = tl.load(key_at, mask=there, other=0.0)
            v = tl.load(value_at, mask=there, other=0.0)
            allowed = real[:, None] & (slot < end)[None, :]
            in_tree = (slot >= prefix)[None, :]
            marks = mask + (batch * nodes + row % nodes)[:, None] * columns + (slot - prefix)[None, :]
            marked = tl.load(marks, mask=allowed & in_tree, other=0) != 0
            allowed = allowed & (marked | ~in_tree)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where(allowed, scores, NEVER)
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.where(allowed, tl.exp(scores - higher[:, None]), 0.0)
        else:
            if D == WIDE:
                k, v = tl.load(key_at), tl.load(value_at)
            else:
                k = tl.load(key_at, mask=(d < D)[None, :], other=0.0)
                v = tl.load(value_at, mask=(d < D)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        weight = weight * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    return mixed, weight, highest


@triton.jit
def _place(row, lane, rows, nodes, kv_heads):
    """Where a row's output goes: it is a node under one of the group's heads, and the next layer reads all heads of a
    node together."""
    groups = rows // nodes
    head = lane % kv_heads * groups + row // nodes
    return (lane // kv_heads * nodes + row % nodes) * (kv_heads * groups) + head


@triton.jit
def whole_kernel(
    query, key, value, length, mask, out, nodes, columns, window, rows, kv_heads,
    key_batch, key_head, key_slot, value_batch, value_head, value_slot,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Prefix and tree in one program → out [B, nodes, heads, D]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1).to(tl.int64)
    batch, head = lane // kv_heads, lane % kv_heads
    prefix = tl.load(length + batch)
    end = tl.minimum(prefix + columns, window)
    mixed, weight, _ = _attended(
        _queries(query, row, lane, rows, D, WIDE), tl.zeros([ROWS, WIDE], tl.float32), tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], NEVER, tl.float32), key + batch * key_batch + head * key_head,
        value + batch * value_batch + head * value_head, mask, prefix, 0, end, tl.cdiv(end, COLS), row, batch, nodes, columns,
        rows, key_slot, value_slot, D, COLS, WIDE, SCALE, True,
    )  # fmt: skip
    mixed = mixed / tl.where(weight > 0, weight, 1.0)[:, None]
    d = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    place = _place(row, lane, rows, nodes, kv_heads)
    tl.store(out + place[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def part_kernel(
    query, key, value, length, mask, part, total, nodes, columns, window, rows, kv_heads,
    key_batch, key_head, key_slot, value_batch, value_head, value_slot,
    D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One split's values [lane, split, rows, D] float32 and log of their sum."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, head = lane // kv_heads, lane % kv_heads
    prefix = tl.load(length + batch).to(tl.int32)
    # a cache that grows may have fewer slots than the mask has columns
    last = tl.minimum(prefix + columns, window)
    span = tl.cdiv(tl.cdiv(last, SPLITS), COLS) * COLS
    begin = split * span
    end = tl.minimum(begin + span, last)
    keys, values = key + batch * key_batch + head * key_head, value + batch * value_batch + head * value_head
    q = _queries(query, row, lane, rows, D, WIDE)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], NEVER, tl.float32)
    # first the tiles that lie whole in the prefix, as all rows see all of them
    whole = tl.maximum(tl.minimum(end, prefix) - begin, 0) // COLS
    mixed, weight, highest = _attended(
        q, mixed, weight, highest, keys, values, mask, prefix, begin, end, whole, row, batch, nodes, columns, rows,
        key_slot, value_slot, D, COLS, WIDE, SCALE, False,
    )  # fmt: skip
    begin += whole * COLS
    mixed, weight, highest = _attended(
        q, mixed, weight, highest, keys, values, mask, prefix, begin, end, tl.cdiv(tl.maximum(end - begin, 0), COLS), row, batch,
        nodes, columns, rows, key_slot, value_slot, D, COLS, WIDE, SCALE, True,
    )  # fmt: skip
    d = tl.arange(0, WIDE)
    real = row < rows
    some = weight > 0
    at = (lane * SPLITS + split) * rows + row
    tl.store(total + at, tl.where(some, highest + tl.log(tl.where(some, weight, 1.0)), NEVER), mask=real)
    mixed = mixed / tl.where(some, weight, 1.0)[:, None]
    tl.store(part + at[:, None] * D + d[None, :], mixed, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def join_kernel(
    part, total, out, rows, nodes, kv_heads,
    D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The splits' values, each by its share of the whole sum → out [B, nodes, heads, D]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDE)
    real = row < rows
    inside = real[:, None] & (d < D)[None, :]
    highest = tl.full([ROWS], NEVER, tl.float32)
    for split in range(SPLITS):
        at = (lane * SPLITS + split) * rows + row
        highest = tl.maximum(highest, tl.load(total + at, mask=real, other=NEVER))
    weight = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for split in range(SPLITS):
        at = (lane * SPLITS + split) * rows + row
        share = tl.exp(tl.load(total + at, mask=real, other=NEVER) - highest)
        mixed += share[:, None] * tl.load(part + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        weight += share
    mixed = mixed / tl.where(real, weight, 1.0)[:, None]
    place = _place(row, lane, rows, nodes, kv_heads)
    tl.store(out + place[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), mask=inside)


def split_count(window: int, programs: int) -> int:
    """Into how many splits the slots of a window go: with `programs` for each split they fill a large GPU, as far as a
    split has COLUMNS slots."""
    return max(1, min(PROGRAMS // programs, triton.cdiv(window, COLUMNS)))


def rows_each(rows: int, lanes: int) -> int:
    """Rows of one program over a short window: 16, and up to 64 where a large GPU is filled all the same, as every program
    reads all keys of its lane."""
    block = 16
    while block < 64 and triton.cdiv(rows, 2 * block) * lanes >= PROGRAMS:
        block *= 2
    return block


def _tile(query: Tensor) -> tuple[int, int]:
    """The head size as a program holds it, a power of two, and the most keys of it that fit one tile."""
    wide = max(16, triton.next_power_of_2(query.shape[3]))
    return wide, max(16, TILE_BYTES // (wide * query.element_size()))


def _whole(
    inputs: tuple[Tensor, ...], sizes: tuple[int, ...], out: Tensor, scale: float, early: dict[str, bool]
) -> None:
    """Prefix and tree in one program, for a short window."""
    wide, fit = _tile(inputs[0])
    rows, kv_heads = sizes[3:5]
    lanes = inputs[0].shape[0] * kv_heads
    block = rows_each(rows, lanes)
    whole_kernel[(triton.cdiv(rows, block), lanes)](
        *inputs, out, *sizes, D=out.shape[3], ROWS=block, COLS=min(2 * COLUMNS, fit), WIDE=wide, SCALE=scale,
        num_warps=8,  # measured fastest on an H100 at heads of 64 and 128, 16 rows and 128 keys a tile
        **early,
    )  # fmt: skip


def _in_splits(
    inputs: tuple[Tensor, ...], sizes: tuple[int, ...], out: Tensor, scale: float, early: dict[str, bool]
) -> None:
    """The splits of a longer window in a program each, then their join."""
    query = inputs[0]
    wide, fit = _tile(query)
    nodes, columns, window, rows, kv_heads = sizes[:5]
    lanes, size = query.shape[0] * kv_heads, out.shape[3]
    # a tile of four bytes a number needs the memory that the second half of the rows would have
    block = min(ROWS if query.element_size() == 2 else ROWS // 2, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    warps = 8 if block == ROWS else 4
    splits = split_count(window, blocks * lanes * warps // 4)
    part = torch.empty(lanes, splits, rows, size, dtype=torch.float32, device=out.device)
    total = torch.empty(lanes, splits, rows, dtype=torch.float32, device=out.device)
    part_kernel[(blocks, lanes, splits)](
        *inputs, part, total, *sizes, D=size, SPLITS=splits, ROWS=block, COLS=min(COLUMNS, fit), WIDE=wide, SCALE=scale,
        num_warps=warps, **early,
    )  # fmt: skip
    join_kernel[(triton.cdiv(rows, 16), lanes)](
        part, total, out, rows, nodes, kv_heads, D=size, SPLITS=splits, ROWS=16, WIDE=wide, **early
    )


def _launch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, marks: Tensor, scale: float, early: bool
) -> Tensor:
    """As `tree_attention`, in memory order [B, n, heads, d]; marks int8, query contiguous."""
    batch, heads, nodes, size = query.shape
    kv_heads, window = key.shape[1], key.shape[2]
    out = torch.empty(batch, nodes, heads, size, dtype=query.dtype, device=query.device)
    rows, strides = heads // kv_heads * nodes, (*key.stride()[:3], *value.stride()[:3])
    # as both kernels take them, after their tensors
    sizes = (nodes, marks.shape[2], window, rows, kv_heads, *strides)
    launch = _whole if window <= SHORT else _in_splits
    launch((query, key, value, length, marks), sizes, out, scale, early_options(early))
    return out


# an operator of its own, as torch.compile cannot launch a kernel early that it traces
@torch.library.custom_op(
    "eagle_lab::tree_attention", mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor length, Tensor marks, float scale) -> Tensor",
)  # fmt: skip
def _early(query: Tensor, key: Tensor, value: Tensor, length: Tensor, marks: Tensor, scale: float) -> Tensor:
    return _launch(query, key, value, length, marks, scale, can_start_early(query.device))


@_early.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, length: Tensor, marks: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of n nodes to the whole prefix and, by `mask`, to the m slots after it.

    Args: query [B, heads, n, d]; key and value [B, kv_heads, S, d], the last dimension contiguous, any other strides;
    length int64 [B], of the prefix; mask bool or int8 [B, n, m]. Columns that have no slot among the S are cut off.
    Returns: the query's shape and dtype, in memory [B, n, heads, d].
    """
    # nothing to do where it is int8 already; not a view, as torch.compile has none of a truth value
    inputs = (query.contiguous(), key, value, length, mask.to(torch.int8), scale)
    out = _early(*inputs) if torch.compiler.is_compiling() else _launch(*inputs, early=False)
    return out.transpose(1, 2)
