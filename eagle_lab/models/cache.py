"""Keys and values in preallocated buffers, written in place; moving an accepted path to the end of the prefix.

`KeyValueCache` is what transformers' models get as their cache: they call `update` once a layer. It leans
on that one method (and `get_seq_length`), which transformers 5.17 to 5.24 share. `GrowingCache` keeps one layer
by concatenation, as the official implementation's draft head does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of all layers, [2, layers, B, kv_heads, capacity, head_size], one buffer a device.

    Before a forward, `place` says where its rows go and how many slots attention sees.
    """

    is_compileable = False
    is_lent = False

    def __init__(
        self,
        devices: list[torch.device],
        batch: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.window = capacity
        self.slots: Tensor | None = None
        self._place: list[tuple[torch.device, int]] = []
        counts: dict[torch.device, int] = {}
        for device in devices:
            self._place.append((device, counts.get(device, 0)))
            counts[device] = counts.get(device, 0) + 1
        # zeros, not empty: a masked slot still enters 0 · value, and 0 · NaN is NaN
        self.buffers = {
            device: torch.zeros(2, layers, batch, kv_heads, capacity, head_size, dtype=dtype, device=device)
            for device, layers in counts.items()
        }
        self.layers = self._layers()

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        # each layer's keys and values as tensors of their own: a compiler that sees a layer cut out of the buffer copies
        # the whole window back where it writes a row
        return [
            (self.buffers[device][0, index], self.buffers[device][1, index]) for device, index in self._place
        ]

    def row(self, index: int) -> KeyValueCache:
        """One row of the batch as a cache of its own, over the same memory."""
        found = object.__new__(KeyValueCache)
        found.capacity, found.window, found.slots, found._place = (
            self.capacity,
            self.window,
            None,
            self._place,
        )
        found.buffers = {device: buffer[:, :, index : index + 1] for device, buffer in self.buffers.items()}
        found.layers = found._layers()
        return found

    def place(self, slots: Tensor, window: int, start: int) -> None:
        """The coming forward's rows go to `slots` (int64 [B, T]); attention sees the first `window` slots.

        `start`, the rows before them as far as the host knows, is what a cache that grows needs; it is unused here.
        """
        self.slots, self.window = slots, window

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new rows, key and value [B, kv_heads, T, head_size], at `slots`; return the window."""
        keys, values = self.layers[layer_idx]
        assert self.slots is not None, "call cache.place before a forward"
        return write_rows(keys, values, self.slots.to(keys.device), key, value, self.window)

    @contextmanager
    def lent(self, layers: Iterable[Any]) -> Iterator[None]:
        """Inside, each layer's attention module holds its own keys and values (`kept`), and `update` is not needed.

        So nothing in a layer depends on its number, and what is compiled for one serves others. For one device.
        """
        for kept, layer in zip(self.layers, layers, strict=True):
            layer.self_attn.kept = kept
        self.is_lent = True
        try:
            yield
        finally:
            self.is_lent = False
            for layer in layers:
                del layer.self_attn.kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before the coming rows, as transformers asks for it; positions are always given, so unused."""
        return 0

    def commit(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows at slots `source` to slots `target`, both int64 [B, m], in every layer.

        All rows are read before any is written, so that overlapping slots are safe.
        """
        for device, buffer in self.buffers.items():
            here, there = source.to(device), target.to(device)
            if source.shape[0] == 1:
                buffer.index_copy_(4, there[0], buffer.index_select(4, here[0]))
            else:
                rows = torch.arange(source.shape[0], device=device)[:, None]
                buffer[:, :, rows, :, there] = buffer[:, :, rows, :, here]

    def bytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())


def write_rows(
    keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Write new rows, key and value [B, kv_heads, T, d], at slots int64 [B, T] of keys and values [B, kv_heads, S, d].

    Returns the first `window` slots of both.
    """
    if slots.shape[0] == 1:
        keys.index_copy_(2, slots[0], key)
        values.index_copy_(2, slots[0], value)
    else:
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        keys[rows, :, slots] = key.transpose(1, 2)
        values[rows, :, slots] = value.transpose(1, 2)
    return keys[:, :, :window], values[:, :, :window]


class GrowingCache:
    """One layer's keys and values for one row, longer by a concatenation with every forward: allocate, copy, free.

    Rows from `start` on are dropped before new ones are joined, as the official head goes back to its stable keys
    and values after a tree. Shapes change with every call, so it cannot be compiled or captured.
    """

    def __init__(self, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(1, kv_heads, 0, head_size, dtype=dtype, device=device)
        self.values = self.keys.clone()
        self.window = 0
        self.start = 0

    def row(self, index: int) -> GrowingCache:
        """The only row: itself."""
        return self

    def place(self, slots: Tensor, window: int, start: int) -> None:
        """The coming forward's rows follow the first `start`; slots and window are those of a cache in place.

        Args: slots int64 [B, T].
        """
        self.start = start

    def update(self, key: Tensor, value: Tensor, layer_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Join new rows [1, kv_heads, T, head_size]; return all [1, kv_heads, start + T, head_size]."""
        self.keys = torch.cat((self.keys[:, :, : self.start], key), 2)
        self.values = torch.cat((self.values[:, :, : self.start], value), 2)
        self.window = self.keys.shape[2]
        return self.keys, self.values

    def bytes(self) -> int:
        """Bytes that the tensors hold now."""
        return 2 * self.keys.numel() * self.keys.element_size()


def tree_visibility(mask: Tensor, length: Tensor, window: int) -> Tensor:
    """Who sees which slot: the whole prefix, and the tree by its mask.

    Args: mask bool [B, n, m] over the m slots that follow the prefix, length int64 [B], window slots in all.
    Returns: bool [B, n, window].
    """
    rows, _, columns = mask.shape
    offset = torch.arange(window, device=mask.device) - length[:, None]
    inside = (offset >= 0) & (offset < columns)
    tree = mask.gather(2, offset.clamp(0, columns - 1)[:, None].expand(rows, mask.shape[1], window))
    return (offset < 0)[:, None] | (tree & inside[:, None])


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, n, window]: 0 where visible, the lowest number elsewhere."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
