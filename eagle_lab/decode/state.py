"""What a decoding cycle works on: the sizes of its tree, the state that it leaves behind, and its outcome.

`length` (P) is the number of tokens before the root: the target's cache holds their keys and values, the head's cache
their P pairs (g_t, x[t + 1]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_lab.decode.attention import View, view
from eagle_lab.models.cache import GrowingCache, KeyValueCache


@dataclass
class State:
    """What a cycle reads and leaves behind; B rows. All tensors keep their shapes and places from cycle to cycle.

    length int64 [B]; root int64 [B], the last committed token; hidden [B, H], the head's output at the last pair;
    active bool [B], False for a finished row, which repeats its last cycle and commits nothing; uniforms float64
    [B, positions], one number a position for sampling. Only the host has: visible_length, the largest `length`, so
    that attention reads no more of the cache than it must, and window, which fixes what it reads, for runtimes that
    want one shape.
    """

    length: Tensor
    root: Tensor
    hidden: Tensor
    active: Tensor
    target_cache: KeyValueCache
    head_cache: KeyValueCache | GrowingCache | None
    uniforms: Tensor
    visible_length: int = 0
    window: int | None = None

    @property
    def start(self) -> int:
        """The prefix as the host knows it; under a fixed window nothing may depend on it."""
        return self.visible_length if self.window is None else 0

    def reads(self, beyond: int) -> int:
        """Slots that a forward with so many rows after the prefix attends to."""
        return self.visible_length + beyond if self.window is None else self.window

    def view(self, name: str, mask: Tensor, beyond: int, dtype: torch.dtype) -> View:
        """Who sees what where the prefix is seen whole and the rest by `mask` bool [B, n, m]."""
        window, exact = self.reads(beyond), self.window is None and self.length.shape[0] == 1
        limit = self.visible_length if self.window is None else window
        return view(name, mask, self.length, limit, exact, window, dtype)


@dataclass(frozen=True)
class CycleTensors:
    """One cycle's outcome on the device: tokens and depths int64 [B, n + 1], parents int64 [B, n], scores float32
    [B, n], path int64 [B, width], count int64 [B] (rows of `path` that are real), committed int64 [B, width]
    (tokens along `path`), bonus int64 [B]; report int64 [B, 2 + width]: count, bonus and committed, for the host."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    path: Tensor
    count: Tensor
    committed: Tensor
    bonus: Tensor
    report: Tensor
