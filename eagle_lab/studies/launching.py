"""How fast a machine's host launches kernels: transformers' own forward of the target, eager, timed.

The official implementation's times are those of one host, and nearly all of an eager forward on a GPU is launching.
So a cycle measured on another host is held against the official one scaled by this forward, measured on both.
Source: our own; it assumes that a cycle and a forward slow down alike from host to host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import StaticCache

from eagle_lab.models.pair import Pair
from eagle_lab.runtime.clock import now

SLOTS = 1024  # of the static cache, as where the official implementation was measured
WARMUP = 3


def eager_forwards(pair: Pair, rows: int = 64) -> Iterator[float]:
    """Seconds of forwards of `rows` tokens into an empty static cache, under a tree-like mask: one more at each `next`.

    The attention that the target has when this is called, and transformers' own cache; nothing of the kit but the hooks
    that keep the taps. Decoding in between may change the attention, so it is set for each forward, outside its time.
    """
    return _forwards(pair, rows, pair.target.config._attn_implementation)


@torch.inference_mode()
def _forwards(pair: Pair, rows: int, attention: str) -> Iterator[float]:
    c, device = pair.config, pair.device
    slots = max(rows, min(SLOTS, c.max_position_embeddings))
    ids = torch.arange(rows, device=device)[None] % c.vocab_size
    seen = torch.ones(rows, slots, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(rows, slots, dtype=pair.dtype, device=device)
    mask = mask.masked_fill(~seen, torch.finfo(pair.dtype).min)[None, None]
    cache = StaticCache(config=c, max_cache_len=slots)
    made = 0
    while True:
        cache.reset()
        before = pair.target.config._attn_implementation
        pair.target.set_attn_implementation(attention)
        start = now(device)
        pair.target(input_ids=ids, attention_mask=mask, position_ids=ids, **{pair.cache_keyword: cache})
        took = (now(device) - start) / 1e9
        pair.target.set_attn_implementation(before)
        made += 1
        if made > WARMUP:
            yield took
