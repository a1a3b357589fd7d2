"""The state of a decode, and the two forwards over it: the target's and the draft head's.

`length` (P) is the number of tokens before the root: the target's cache holds their keys and values, the head's cache
their P pairs (g_t, x[t + 1]).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_lab.decode.attention import ATTENTIONS, SPLIT, Visibility, visibility
from eagle_lab.decode.strategy import Strategy
from eagle_lab.models.cache import GrowingCache, KeyValueCache
from eagle_lab.models.pair import Pair
from eagle_lab.runtime.swap import swapped

TARGET, HEAD = 1, 2  # whose numbers weren't finite


@dataclass
class State:
    """What a cycle reads and leaves behind, for B rows. All tensors keep their shapes and places from cycle to cycle.

    length int64 [B]; root int64 [B], the last committed token; hidden [B, H], the head's output at the last pair;
    active bool [B], False for a finished row, which repeats its last cycle and commits nothing; fault int64 [B], the sum of
    TARGET and HEAD where numbers of theirs weren't finite; uniforms float64 [B, positions], one number a position for
    sampling. The host alone has `visible_length`, the largest `length`, so
    that attention reads no more of the cache than it must; and `window`, the slots that attention reads under a runtime
    that wants one shape, None where they grow with the text.
    """

    length: Tensor
    root: Tensor
    hidden: Tensor
    active: Tensor
    target_cache: KeyValueCache
    head_cache: KeyValueCache | GrowingCache | None
    fault: Tensor
    uniforms: Tensor
    visible_length: int = 0
    window: int | None = None

    @property
    def start(self) -> int:
        """The prefix as the host knows it; 0 under a fixed window, where nothing may depend on it."""
        return self.visible_length if self.window is None else 0

    def slots_read(self, beyond: int) -> int:
        """Slots that a forward with so many rows after the prefix attends to."""
        return self.visible_length + beyond if self.window is None else self.window

    def visibility(self, attention: str, mask: Tensor, beyond: int, dtype: torch.dtype) -> Visibility:
        """Who sees what where the prefix is seen whole and the rest by `mask` bool [B, n, m]."""
        window, exact = self.slots_read(beyond), self.window is None and self.length.shape[0] == 1
        limit = self.visible_length if self.window is None else window
        return visibility(attention, mask, self.length, limit, exact, window, dtype)


@contextmanager
def attention_set(pair: Pair, attention: str) -> Iterator[None]:
    """Inside, the target attends by `attention`. Those of this package are taken away again, as only it can feed them.

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
        if before != attention and attention in SPLIT:
            pair.target.set_attn_implementation(before)


@contextmanager
def asked(pair: Pair, strategy: Strategy, with_head: bool = True) -> Iterator[None]:
    """Inside, the pair's target attends, and its projections and, where it is used, the head's are made, by a strategy."""
    places = [*(pair.transposed if strategy.product == "transposed" else ())]
    places += pair.head_in_8_bits if with_head and strategy.head == "fp8" else ()
    with attention_set(pair, strategy.attention), swapped(places):
        yield


def run_target(
    pair: Pair,
    ids: Tensor,
    positions: Tensor,
    visible: Visibility,
    cache: KeyValueCache,
    logits_to_keep: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """One forward of transformers' own model, its keys and values written at the slots that `cache` was set to.

    Args: ids and positions int64 [B, T]; logits_to_keep: of how many last rows, 0 for all, or of which rows, int64 [m].
    Returns: logits [B, rows kept, V] and tapped hidden states [B, T, taps · H].
    """
    # transformers hands on to the attention what it does not know itself
    extra: dict[str, Any] = {} if visible.bias is not None else {"visibility": visible}
    extra[pair.cache_keyword] = None if cache.is_bound else cache
    if cache.is_bound:
        extra |= {"slots": cache.slots, "window": cache.window}
    out = pair.target(
        input_ids=ids,
        position_ids=positions,
        attention_mask=pair.masks(visible.bias, positions, cache),
        use_cache=not cache.is_bound,
        logits_to_keep=logits_to_keep,
        **extra,
    )
    taps = [pair.tapped[index].to(pair.device) for index in pair.head.config.taps]
    return out.logits, torch.cat(taps, dim=-1)


def run_head(
    pair: Pair,
    ids: Tensor,
    g: Tensor,
    positions: Tensor,
    visible: Visibility,
    cache: KeyValueCache | GrowingCache,
    attention: str,
) -> Tensor:
    """The head over pairs, its keys and values written at the slots that `cache` was set to.

    Args: ids and positions int64 [B, T], g [B, T, H]. Returns: h [B, T, H].
    """
    scale = pair.head.config.head_size**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ATTENTIONS[attention](query, *cache.update(key, value, 0), visible, scale)

    return pair.head(ids, g, positions, attend)
