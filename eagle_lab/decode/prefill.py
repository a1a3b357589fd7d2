"""Reading a prompt: the target over it, the first new token, and the draft head over its pairs.

Launching is most of the time that a short prompt takes on a GPU, so runtimes that replay a CUDA graph read short
prompts by one too: padded at the end to a power of two, where what stands in the padding is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_lab.decode.attention import PARTED, view
from eagle_lab.decode.cycle import run_target
from eagle_lab.decode.expand import run_head
from eagle_lab.decode.sampling import Sampling, choose
from eagle_lab.decode.state import State
from eagle_lab.decode.strategy import Strategy
from eagle_lab.models.cache import GrowingCache, KeyValueCache
from eagle_lab.models.pair import Pair
from eagle_lab.runtime import prepare as runtime

LENGTHS = (64, 128, 256, 512, 1024)  # a longer prompt keeps the GPU busy for longer than its launches take
POOL = "pool"  # where a pair keeps the memory pool of its readings


@contextmanager
def attending(pair: Pair, attention: str) -> Iterator[None]:
    """The target's attention set to `attention`; those of this package are taken away again, as only it can feed them.

    Raises ValueError, from `Pair.check_attention`, where transformers' class of the target has no such attention.
    """
    before = pair.target.config._attn_implementation
    if before != attention:
        pair.check_attention(attention)
        pair.target.set_attn_implementation(attention)
    # cuDNN's attention plans anew, for milliseconds, at every shape, and while a text grows each forward is a new one
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if before != attention and attention in PARTED:
            pair.target.set_attn_implementation(before)


class Read(NamedTuple):
    """What reading a prompt gives: the first new token int64 [1], and the head's output at the last pair [1, H], which
    is None for plain decoding: it has no head."""

    first: Tensor
    hidden: Tensor | None


def read_target(
    pair: Pair, ids: Tensor, cache: KeyValueCache, attention: str, last: Tensor | int = 1
) -> tuple[Tensor, Tensor]:
    """The target over ids int64 [1, L]; → logits of the last row, or of row `last` int64 [1], [1, 1, V], and the taps
    [1, L, taps · H]."""
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)[None]
    seen = view(attention, causal(length, ids.device), positions[:, 0], 0, True, length, pair.dtype)
    cache.place(positions, length, 0)
    return run_target(pair, ids, positions, seen, cache, logits_to_keep=last)


def read(
    pair: Pair,
    plan: Strategy,
    sampling: Sampling,
    ids: Tensor,
    length: Tensor | None,
    uniform: Tensor,
    cache: KeyValueCache,
    head_cache: KeyValueCache | GrowingCache | None,
) -> Read:
    """Read a prompt into the caches of one row; plain decoding has none for the head.

    Args: ids int64 [1, L]; length int64 [1] where the prompt is shorter than L, else None; uniform float64 [1], the
    number of the first new token's position.
    """
    size, last = ids.shape[1], 1 if length is None else length - 1
    logits, taps = read_target(pair, ids, cache, plan.attention, last)
    first = choose(logits[:, -1], sampling, uniform)
    if head_cache is None:
        return Read(first, None)
    at = torch.full_like(first, size - 1) if length is None else length - 1
    positions = torch.arange(size, device=ids.device)[None]
    nothing = torch.zeros_like(first)
    alone = State(nothing, first, taps, nothing, cache, head_cache, uniform)
    seen = alone.view(plan.attention, causal(size, ids.device), size, pair.dtype)
    head_cache.place(positions, size, 0)
    after = ids.roll(-1, 1).scatter(1, at[:, None], first[:, None])
    h = run_head(pair, after, pair.head.fuse(taps), positions, seen, alone, plan.attention)
    return Read(first, h.gather(1, at[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0])


def causal(length: int, device: torch.device) -> Tensor:
    """Each row sees itself and those before it, bool [1, length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]


@dataclass
class Reader:
    """A captured reading of prompts of at most `ids.shape[1]` tokens, into caches of its own.

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

    def read(
        self, ids: Tensor, uniform: Tensor, cache: KeyValueCache, head_cache: KeyValueCache | None
    ) -> Read:
        """Read ids int64 [1, ≤ L] into caches of one row, as `read` does."""
        size, count = self.ids.shape[1], ids.shape[1]
        self.ids[:, :count].copy_(ids)
        self.length.fill_(count)
        self.uniform.copy_(uniform)
        found: Read = self.prepared.run()
        for kept, made in ((cache, self.cache), (head_cache, self.head_cache)):
            if kept is not None and made is not None:
                for device, buffer in kept.buffers.items():
                    buffer[..., :size, :].copy_(made.buffers[device])
        return Read(found.first.clone(), found.hidden)


def lengths(capacity: int) -> list[int]:
    """The padded lengths for a cache of so many slots."""
    return [length for length in LENGTHS if length <= capacity]


def reader(pair: Pair, plan: Strategy, sampling: Sampling, with_head: bool, length: int) -> Reader:
    """The pair's captured reading of a padded length, made at the first call and kept in `pair.prefills`.

    Args: with_head, whether the draft head reads the prompt too, which plain decoding has no use for; length, the
    padded length in tokens, one of `lengths`: prompts of at most so many are read by it.
    Raises RuntimeError with one sentence where it can't be captured.
    """
    key = (plan.attention, sampling, with_head, length)
    if key not in pair.prefills:
        pair.prefills[key] = _captured(pair, plan, sampling, with_head, length)
    found: Reader = pair.prefills[key]
    return found


def _captured(pair: Pair, plan: Strategy, sampling: Sampling, with_head: bool, length: int) -> Reader:
    device = pair.device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    count = torch.ones(1, dtype=torch.int64, device=device)
    uniform = torch.zeros(1, dtype=torch.float64, device=device)
    cache = pair.new_cache(1, length)
    head_cache = pair.new_head_cache(1, length) if with_head else None

    def step() -> Read:
        with attending(pair, plan.attention):
            return read(pair, plan, sampling, ids, count, uniform, cache, head_cache)

    # as it is, not compiled: it runs once a prompt, and compiling takes seconds for each length
    # one pool for all of a pair's readings, as what a replay returns is copied before the next
    pool = pair.prefills.setdefault(POOL, torch.cuda.graph_pool_handle())
    prepared = runtime.prepare("cuda_graph", step, lambda: None, device, pool)
    return Reader(ids, count, uniform, cache, head_cache, prepared)


def prefill_target(pair: Pair, prompt: Tensor, room: int) -> tuple[KeyValueCache, Tensor, Tensor]:
    """The target over the prompt int64 [1, L] in a new cache with `room` more slots; → it, last logits, taps."""
    cache = pair.new_cache(1, prompt.shape[1] + room)
    return cache, *read_target(pair, prompt, cache, "sdpa")
