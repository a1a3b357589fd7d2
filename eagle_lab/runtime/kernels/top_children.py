"""Each frontier node's k likeliest tokens and the k best children of all, as two Triton kernels.

A program of the first kernel has one chunk of one node's logits: it writes the chunk's best and the maximum and sum of
its exponentials. A program of the second has one tree: it merges the chunks, takes log-probabilities, adds the nodes'
scores and selects the k best children. A value and its place are packed into one integer, the value's order above and
the reversed place below: no two are equal, one maximum gives both, and the lower place wins a tie. The best of a chunk
are k maxima, each taken out before the next; the merge counts for each key how many are larger, which is its rank.
Tested by Triton's interpreter everywhere, and on an H100.
Source: EAGLE-2 (arXiv 2406.16858), section 4, for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagle_lab.runtime.kernels import can_start_early, early_options

MOST = 16  # children of a node, and nodes of a frontier: the second kernel holds all their lists at once
# logits in a chunk: on an H100, of 1,024 to 4,096 the most are the fastest, as the merge has the fewest keys to rank
LARGEST = 4096
WARPS = 4  # of both kernels: timed with 1 to 8 and 4 to 16
LOWEST = tl.constexpr(-(2**63))  # below every key, also that of -inf
LAST = tl.constexpr(0x7FFFFFFF)  # the lower half of a key is the place with these bits flipped


@triton.jit
def encode_key(value, place):
    """Keys int64 that are ordered as float32 `value` and, where it is equal, against `place`."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & LAST)  # a negative number's bits grow as it falls
    return (ordered.to(tl.int64) << 32) | (place ^ LAST).to(tl.int64)


@triton.jit
def value_of(key):
    """The float32 value of a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key):
    """The place in a key, int64."""
    return (key & LAST) ^ LAST


# k maxima and not tl.topk, which is right too but another code in each release of Triton: of 4096 keys and k = 10, compiled
# for an H100 with 8 warps, a warp has 180 shuffles and 35 barriers, with tl.topk 1000 and 14. Counted, not timed.


@triton.jit
def chunk_kernel(
    logits, part, peak, total, batch_stride, node_stride, rows, vocabulary,
    K: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One chunk's best keys [row, split, K] int64 in descending order, its maximum and sum of exp [row, split]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    place = split * CHUNK + tl.arange(0, CHUNK)
    at = logits + row // rows * batch_stride + row % rows * node_stride + place
    # past the end is -inf at a higher place than every logit, so that it never comes before one
    value = tl.load(at, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
    highest = tl.max(value, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # as -inf - -inf is NaN
    out = row * SPLITS + split
    tl.store(peak + out, highest)
    tl.store(total + out, tl.sum(tl.exp(value - shift), 0))
    keys = encode_key(value, place)
    for j in range(K):
        top = tl.max(keys, 0)
        tl.store(part + out * K + j, top)
        keys = tl.where(keys == top, LOWEST, keys)


@triton.jit
def merge_kernel(
    part, peak, total, score, ids, scores, chosen, best, score_batch, score_node,
    K: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr,
    NODES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tree's chunks → children's ids and scores [B, R·K], the K best of them and their scores [B, K]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tree = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    lane = tree * R + row
    real = row < R
    split = tl.arange(0, PARTS)
    there = real[:, None] & (split < SPLITS)[None, :]
    peaks = tl.load(peak + lane[:, None] * SPLITS + split[None, :], mask=there, other=float("-inf"))
    totals = tl.load(total + lane[:, None] * SPLITS + split[None, :], mask=there, other=0.0)
    highest = tl.max(peaks, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.sum(totals * tl.exp(peaks - shift[:, None]), 1)
    log_weight = tl.log(tl.where(weight > 0, weight, 1.0))  # a row that is all -inf keeps -inf, not NaN

    item = tl.arange(0, LISTED)
    listed = real[:, None] & (item < SPLITS * K)[None, :]
    keys = tl.load(part + lane[:, None] * (SPLITS * K) + item[None, :], mask=listed, other=LOWEST)
    own = tl.load(score + tree * score_batch + row * score_node, mask=real, other=0.0)
    rank = tl.zeros([ROWS, LISTED], tl.int32)
    for j in tl.static_range(SPLITS * K):
        other = tl.load(part + lane * (SPLITS * K) + j, mask=real, other=LOWEST)
        rank += (other[:, None] > keys).to(tl.int32)
    child = listed & (rank < K)
    # the maximum is taken off first, for large logits to lose no digits; not above 0, as no child beats its parent
    found = own[:, None] + tl.minimum(value_of(keys) - shift[:, None] - log_weight[:, None], 0.0)
    place = tree * (R * K) + row[:, None] * K + rank
    tl.store(ids + place, place_of(keys), mask=child)
    tl.store(scores + place, found, mask=child)

    tl.debug_barrier()  # all threads read what others wrote
    node = tl.arange(0, NODES)
    mine = tl.load(scores + tree * (R * K) + node, mask=node < R * K, other=float("-inf"))
    keys = encode_key(mine, node)
    rank = tl.zeros([NODES], tl.int32)
    for j in tl.static_range(R * K):
        other = tl.load(scores + tree * (R * K) + j)
        rank += (encode_key(other, tl.full([], j, tl.int32)) > keys).to(tl.int32)
    kept = (node < R * K) & (rank < K)
    tl.store(chosen + tree * K + rank, node.to(tl.int64), mask=kept)
    tl.store(best + tree * K + rank, mine, mask=kept)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty(logits: Tensor, k: int) -> Four:
    batch, rows, _ = logits.shape
    ids = logits.new_empty(batch, rows * k, dtype=torch.int64)
    scores = logits.new_empty(batch, rows * k, dtype=torch.float32)
    return ids, scores, ids.new_empty(batch, k), scores.new_empty(batch, k)


def _launch(logits: Tensor, score: Tensor, k: int, early: bool) -> Four:
    batch, rows, vocabulary = logits.shape
    device = logits.device
    chunk = min(LARGEST, max(16, triton.next_power_of_2(vocabulary)))
    splits = triton.cdiv(vocabulary, chunk)
    part = torch.empty(batch * rows, splits, k, dtype=torch.int64, device=device)
    peak = torch.empty(batch * rows, splits, dtype=torch.float32, device=device)
    total = torch.empty(batch * rows, splits, dtype=torch.float32, device=device)
    ids, scores, chosen, best = out = _empty(logits, k)
    chunk_kernel[(batch * rows, splits)](
        logits, part, peak, total, logits.stride(0), logits.stride(1), rows, vocabulary,
        K=k, SPLITS=splits, CHUNK=chunk, num_warps=WARPS, **early_options(early),
    )  # fmt: skip
    merge_kernel[(batch,)](
        part, peak, total, score, ids, scores, chosen, best, score.stride(0), score.stride(1),
        K=k, R=rows, SPLITS=splits, ROWS=triton.next_power_of_2(rows), PARTS=triton.next_power_of_2(splits),
        LISTED=triton.next_power_of_2(splits * k),
        NODES=triton.next_power_of_2(rows * k), num_warps=WARPS, **early_options(early),
    )  # fmt: skip
    return out


# an operator of its own, as torch.compile cannot launch a kernel early that it traces
@torch.library.custom_op(
    "eagle_lab::top_children", mutates_args=(),
    schema="(Tensor logits, Tensor score, int k) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _early(logits: Tensor, score: Tensor, k: int) -> Four:
    return _launch(logits, score, k, can_start_early(logits.device))


@_early.register_fake
def _(logits: Tensor, score: Tensor, k: int) -> Four:
    return _empty(logits, k)


def top_children(logits: Tensor, score: Tensor, k: int) -> Four:
    """The k likeliest tokens of each of a frontier's R nodes, and the k best of these R·k children.

    Args: logits [B, R, V] float32, bfloat16 or float16, of the nodes, the last dimension contiguous, any other strides,
    no NaN and no +inf; score float32 [B, R], cumulative log-probabilities of the nodes, any strides; k, the number of
    children of a node. Of equal logits, and of equal scores, the lower index comes first.
    Returns: ids int64 [B, R·k], draft ids (indices into V), node after node, each node's in descending order of logit;
    scores float32 [B, R·k], their cumulative log-probabilities in nats, never above the node's; chosen int64 [B, k],
    indices into R·k of the k best in descending order; best float32 [B, k], the scores of these.
    Raises: ValueError where k is not in 1 … min(V, 16), or R is not in 1 … 16.
    """
    _, rows, vocabulary = logits.shape
    if not 1 <= k <= MOST:
        raise ValueError(f"k is {k}; the kernel keeps 1 to {MOST} children of a node.")
    if k > vocabulary:
        raise ValueError(f"k is {k}, more than the vocabulary of {vocabulary}.")
    if not 1 <= rows <= MOST:
        raise ValueError(f"a frontier of {rows} nodes; the kernel takes 1 to {MOST}.")
    if logits.stride(2) != 1:
        raise ValueError("the logits of a node do not lie next to each other.")
    if torch.compiler.is_compiling():
        found: Four = _early(logits, score, k)
        return found
    return _launch(logits, score, k, early=False)
