"""Tree attention as two Triton kernels: the prefix in splits without a mask, the tree with one, then their join.

A program of the first kernel has some rows of one key/value head, all heads of its group and all nodes stacked, so that
each key is read once for the whole group, and one split of the keys: a chunk of the prefix, or the tree. It keeps the
running maximum and sum of the softmax. The second kernel joins the splits by their log-sum-exp. How long the prefix
is lies in a tensor, so both can be replayed from a CUDA graph while the text grows.
Tested by Triton's interpreter, and on an H100.
Source: Flash-Decoding (Dao et al., 2023) for the splits; arXiv 2205.14135, section 3.1, for the running softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # keys that a program reads at a time, and the fewest slots of the prefix in one split
LONGEST = 256  # the most slots in one split: longer ones leave most of a GPU idle
PROGRAMS = 264  # as many as two for each multiprocessor of a large GPU
NEVER = tl.constexpr(-1.0e30)  # below every score; not -inf, as -inf - -inf is NaN


@triton.jit
def part_kernel(
    query, key, value, length, mask, part, total, nodes, columns, window, rows, kv_heads,
    key_batch, key_head, key_slot, value_batch, value_head, value_slot,
    D: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One split's values [lane, split, rows, D] float32 and log of their sum; the last split is the tree."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, head = lane // kv_heads, lane % kv_heads
    prefix = tl.load(length + batch)
    is_tree = split == SPLITS - 1
    begin = tl.where(is_tree, prefix, split * SPAN)
    # a cache that grows may have fewer slots than the mask has columns
    end = tl.where(is_tree, tl.minimum(prefix + columns, window), tl.minimum(prefix, (split + 1) * SPAN))
    d = tl.arange(0, WIDE)
    real = row < rows
    q = tl.load(
        query + (lane * rows + row)[:, None] * D + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    highest = tl.full([ROWS], NEVER, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for tile in range(TILES):  # a fixed number, for the compiler to overlap; slots past the end are not read
        slot = begin + tile * COLS + tl.arange(0, COLS)
        there = (slot < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + slot[:, None] * key_slot + d[None, :], mask=there, other=0.0)
        v = tl.load(values + slot[:, None] * value_slot + d[None, :], mask=there, other=0.0)
        allowed = real[:, None] & (slot < end)[None, :]
        marks = mask + (batch * nodes + row % nodes)[:, None] * columns + (slot - prefix)[None, :]
        # a comparison of tensors: Triton 3.9's interpreter makes integers of a truth value that is broadcast
        in_tree = (split + tl.zeros([COLS], tl.int32) == SPLITS - 1)[None, :]
        marked = tl.load(marks, mask=allowed & in_tree, other=0) != 0
        allowed = allowed & (marked | ~in_tree)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where(allowed, scores, NEVER)
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.where(allowed, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(highest - higher)
        weight = weight * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    some = weight > 0
    at = (lane * SPLITS + split) * rows + row
    tl.store(total + at, tl.where(some, highest + tl.log(tl.where(some, weight, 1.0)), NEVER), mask=real)
    mixed = mixed / tl.where(some, weight, 1.0)[:, None]
    tl.store(part + at[:, None] * D + d[None, :], mixed, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def join_kernel(
    part, total, out, rows, nodes, kv_heads,
    D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The splits' values, each by its share of the whole sum → out [B, nodes, heads, D]."""
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
    # a row is a node under one of the group's heads; the next layer reads all heads of a node together
    groups = rows // nodes
    head = lane % kv_heads * groups + row // nodes
    place = (lane // kv_heads * nodes + row % nodes) * (kv_heads * groups) + head
    tl.store(out + place[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), mask=inside)


def split_span(window: int, programs: int) -> int:
    """Slots of the prefix in one split: so few that, with `programs` for each split, a large GPU is filled.

    A power of two from COLUMNS to LONGEST; a short text of few heads is split as finely as it goes, as its time is that
    of one program.
    """
    wanted = max(1, PROGRAMS // programs)
    return min(LONGEST, max(COLUMNS, triton.next_power_of_2(triton.cdiv(window, wanted))))


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of n nodes to the whole prefix and, by `mask`, to the m slots after it.

    Args: query [B, heads, n, d]; key and value [B, kv_heads, S, d], the last dimension contiguous, any other strides;
    length int64 [B], of the prefix; mask bool or int8 [B, n, m]. Columns that have no slot among the S are cut off.
    Returns: the query's shape and dtype, in memory [B, n, heads, d].
    """
    batch, heads, nodes, size = query.shape
    kv_heads, window = key.shape[1], key.shape[2]
    rows, wide = heads // kv_heads * nodes, max(16, triton.next_power_of_2(size))
    columns = mask.shape[2]
    # nothing to do where it is int8 already; not a view, as torch.compile has none of a truth value
    marks = mask.to(torch.int8)
    lanes = batch * kv_heads
    block = min(64, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    span = split_span(window, blocks * lanes)
    splits = triton.cdiv(window, span) + 1
    part = torch.empty(lanes, splits, rows, size, dtype=torch.float32, device=query.device)
    total = torch.empty(lanes, splits, rows, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, nodes, heads, size, dtype=query.dtype, device=query.device)
    part_kernel[(blocks, lanes, splits)](
        query.contiguous(), key, value, length, marks, part, total, nodes, columns, window, rows, kv_heads,
        *key.stride()[:3], *value.stride()[:3],
        D=size, SPLITS=splits, SPAN=span, TILES=triton.cdiv(max(span, columns), COLUMNS), ROWS=block, COLS=COLUMNS,
        WIDE=wide, SCALE=scale,
    )  # fmt: skip
    join_kernel[(triton.cdiv(rows, 16), lanes)](
        part, total, out, rows, nodes, kv_heads, D=size, SPLITS=splits, ROWS=16, WIDE=wide
    )
    return out.transpose(1, 2)
