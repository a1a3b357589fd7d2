"""Prefill: the target over a prompt, the first new token, and the draft head over the prompt's pairs.

A long prompt is read in pieces, each seeing all before it, so that masks and activations grow with the prompt's length
and not with its square. Most of a short prompt's time on a GPU is launching, so runtimes that replay a CUDA graph read
short prompts by one too: padded at the end to a power of two, where nobody sees what stands in the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_lab.decode.attention import Visibility, visibility
from eagle_lab.decode.forward import asked, attention_set, run_head, run_target
from eagle_lab.decode.sampling import Sampling, choose
from eagle_lab.decode.strategy import Strategy
from eagle_lab.models.cache import PIECE, GrowingCache, KeyValueCache
from eagle_lab.models.pair import Pair
from eagle_lab.runtime import prepare as runtime

LENGTHS = (64, 128, 256, 512, 1024)  # a longer prompt keeps the GPU busy for longer than its launches take
POOL = "pool"  # where a pair keeps the memory pool of its captured prefills


class Prefilled(NamedTuple):
    """What a prefill gives: the first new token int64 [1]; whether it was chosen among finite logits, bool [1]; and the
    head's output at the last pair [1, H], None for plain decoding, which has no head."""

    first: Tensor
    finite: Tensor
    hidden: Tensor | None


def pieces(length: int) -> list[tuple[int, int]]:
    """Where each piece of a prompt of `length` tokens starts and ends."""
    return [(start, min(start + PIECE, length)) for start in range(0, length, PIECE)]


def target_over(
    pair: Pair, ids: Tensor, start: int, cache: KeyValueCache, attention: str, last: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The target over ids int64 [1, n], which follow `start` tokens that it has read.

    `last`: of how many last rows, or of which row, int64 [1], the logits are made.
    Returns: logits [1, rows, V] and taps [1, n, taps · H].
    """
    slots, visible = _causal(ids, start, attention, pair.dtype)
    cache.set_slots(slots, start + ids.shape[1], start)
    return run_target(pair, ids, slots, visible, cache, logits_to_keep=last)


def _causal(ids: Tensor, start: int, attention: str, dtype: torch.dtype) -> tuple[Tensor, Visibility]:
    # slots int64 [1, n] of rows that see all before them, and what they see
    count, device = ids.shape[1], ids.device
    slots = torch.arange(start, start + count, device=device)[None]
    mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None]
    return slots, visibility(attention, mask, slots[:, 0], start, True, start + count, dtype)


def prefill(
    pair: Pair,
    strategy: Strategy,
    sampling: Sampling,
    ids: Tensor,
    length: Tensor | None,
    uniform: Tensor,
    cache: KeyValueCache,
    head_cache: KeyValueCache | GrowingCache | None,
) -> Prefilled:
    """Read a prompt into the caches of one row, by the target's attention as it is set; plain decoding has no head cache.

    Args: ids int64 [1, L]; length int64 [1] where the prompt is shorter than L, which is then one piece, else None;
    uniform float64 [1], the number of the first new token's position.
    """
    size, attention = ids.shape[1], strategy.attention
    first = finite = hidden = None
    for start, end in pieces(size):
        part = ids[:, start:end]
        last = 1 if length is None else length - 1
        logits, taps = target_over(pair, part, start, cache, attention, last)
        if end == size:
            first, finite = choose(logits[:, -1], sampling, uniform)
        if head_cache is None:
            continue
        if first is None:  # the head's pair at t has the token at t + 1
            after, at = ids[:, start + 1 : end + 1], torch.full_like(ids[:, 0], end - start - 1)
        else:
            at = torch.full_like(first, end - start - 1) if length is None else length - 1
            after = part.roll(-1, 1).scatter(1, at[:, None], first[:, None])
        slots, visible = _causal(part, start, attention, pair.dtype)
        head_cache.set_slots(slots, end, start)
        h = run_head(pair, after, pair.head.fuse(taps), slots, visible, head_cache, attention)
        hidden = h.gather(1, at[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]
    assert first is not None and finite is not None
    return Prefilled(first, finite, hidden)


@dataclass
class CapturedPrefill:
    """A prefill of prompts of at most `ids.shape[1]` tokens in a CUDA graph, into caches of its own.

    ids int64 [1, L], length int64 [1] and uniform float64 [1] are its inputs.
    """

    ids: Tensor
    length: Tensor
    uniform: Tensor
    cache: KeyValueCache
    head_cache: KeyValueCache | None
    prepared: runtime.Prepared

    def bytes(self) -> int:
        """Bytes of device memory that the graph and the caches keep."""
        return self.prepared.bytes + self.cache.bytes() + (self.head_cache.bytes() if self.head_cache else 0)

    def run(
        self, ids: Tensor, uniform: Tensor, cache: KeyValueCache, head_cache: KeyValueCache | None
    ) -> Prefilled:
        """Read ids int64 [1, ≤ L] into caches of one row, as `prefill` does."""
        size, count = self.ids.shape[1], ids.shape[1]
        self.ids[:, :count].copy_(ids)
        self.length.fill_(count)
        self.uniform.copy_(uniform)
        done: Prefilled = self.prepared.run()
        for row, own in ((cache, self.cache), (head_cache, self.head_cache)):
            if row is not None and own is not None:
                for device, buffer in row.buffers.items():
                    buffer[..., :size, :].copy_(own.buffers[device])
        return Prefilled(done.first.clone(), done.finite, done.hidden)


def padded_lengths(capacity: int) -> list[int]:
    """The padded lengths for a cache of so many slots."""
    return [length for length in LENGTHS if length <= capacity]


def captured_prefill(
    pair: Pair, strategy: Strategy, sampling: Sampling, with_head: bool, length: int
) -> CapturedPrefill:
    """The pair's captured prefill of a padded length, made at the first call and kept in `pair.prefills`.

    Args: with_head, whether the draft head reads the prompt too, which plain decoding has no use for; length, the
    padded length in tokens, one of `padded_lengths`: prompts of at most so many are read by it.
    Raises RuntimeError with one sentence where it can't be captured.
    """
    key = (strategy.attention, sampling, with_head and strategy.head, length)
    if key not in pair.prefills:
        pair.prefills[key] = _captured(pair, strategy, sampling, with_head, length)
    ready: CapturedPrefill = pair.prefills[key]
    return ready


def _captured(
    pair: Pair, strategy: Strategy, sampling: Sampling, with_head: bool, length: int
) -> CapturedPrefill:
    device = pair.device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    count = torch.ones(1, dtype=torch.int64, device=device)
    uniform = torch.zeros(1, dtype=torch.float64, device=device)
    cache = pair.new_cache(1, length)
    head_cache = pair.new_head_cache(1, length) if with_head else None

    def step() -> Prefilled:
        with asked(pair, strategy, with_head):
            return prefill(pair, strategy, sampling, ids, count, uniform, cache, head_cache)

    # as it is, not compiled: it runs once a prompt, and compiling takes seconds for each length
    # one pool for all of a pair's prefills, as what a replay returns is copied before the next
    pool = pair.prefills.setdefault(POOL, torch.cuda.graph_pool_handle())
    prepared = runtime.prepare("cuda_graph", step, lambda: None, device, pool)
    return CapturedPrefill(ids, count, uniform, cache, head_cache, prepared)


@torch.inference_mode()
def logits_after(
    pair: Pair, prompt: Tensor, tokens: Tensor, depths: Tensor, mask: Tensor, attention: str
) -> Tensor:
    """The target's logits at the nodes of a tree that follows a prompt, in one forward, float32 [n, V].

    Args: prompt int64 [1, L]; tokens and depths int64 [1, n], the first token of depth 0 at position L; mask bool
    [1, n, n]; without nodes (n = 0) the logits are those after the prompt, [1, V].
    """
    length, nodes = prompt.shape[1], tokens.shape[1]
    cache = pair.new_cache(1, length + nodes)
    with attention_set(pair, attention):
        for start, end in pieces(length):
            logits, _ = target_over(pair, prompt[:, start:end], start, cache, attention, 1)
        if nodes:
            before = torch.tensor([length], device=pair.device)
            cache.set_slots(before[:, None] + torch.arange(nodes, device=pair.device), length + nodes, length)
            visible = visibility(attention, mask, before, length, True, length + nodes, pair.dtype)
            logits, _ = run_target(pair, tokens, before[:, None] + depths, visible, cache)
    return logits[0].float()
