"""Keys and values in preallocated buffers, written in place; moving an accepted path to the end of the prefix.

`KeyValueCache` is what transformers' models get as their cache: they call `update` once a layer. It leans
on that one method (and `get_seq_length`), which transformers 5.17 to 5.24 share. `GrowingCache` keeps one layer
by concatenation, as the official implementation's draft head does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eagle_lab.models.draft import DraftConfig
from eagle_lab.models.targets import kv_sizes, window_of
from eagle_lab.runtime.swap import swapped

PIECE = 1024  # tokens of a prompt that one forward reads
BOUND = "bound_cache"  # the attribute of an attention module under which it holds its keys and values


class KeyValueCache:
    """Keys and values of all layers, [2, layers, B, kv_heads, capacity, head_size], one buffer a device.

    Before a forward, `set_slots` says where its rows go and how many slots attention sees.
    """

    is_compileable = False
    is_bound = False

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
        row = object.__new__(KeyValueCache)
        row.capacity, row.window, row.slots, row._place = self.capacity, self.window, None, self._place
        row.buffers = {device: buffer[:, :, index : index + 1] for device, buffer in self.buffers.items()}
        row.layers = row._layers()
        return row

    def set_slots(self, slots: Tensor, window: int, start: int) -> None:
        """The coming forward's rows go to `slots` (int64 [B, T]); attention sees the first `window` slots.

        `start`, the rows before them as far as the host knows, is what a cache that grows needs; it is unused here.
        """
        self.slots, self.window = slots, window

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new rows, key and value [B, kv_heads, T, head_size], at `slots`; return the window."""
        keys, values = self.layers[layer_idx]
        assert self.slots is not None, "call cache.set_slots before a forward"
        return write_rows(keys, values, self.slots.to(keys.device), key, value, self.window)

    @contextmanager
    def bound(self, layers: Sequence[Any]) -> Iterator[None]:
        """Inside, each layer's attention module holds its own keys and values, and `update` is not needed.

        Nothing in a layer then depends on its number, and what is compiled for one serves others. For one device.
        """
        places = [(layer.self_attn, BOUND, own) for own, layer in zip(self.layers, layers, strict=True)]
        with swapped([*places, (self, "is_bound", True)]):
            yield

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
        self.start = 0

    def row(self, index: int) -> GrowingCache:
        """The only row: itself."""
        return self

    def set_slots(self, slots: Tensor, window: int, start: int) -> None:
        """The coming forward's rows follow the first `start`; slots and window are those of a cache in place.

        Args: slots int64 [B, T].
        """
        self.start = start

    def update(self, key: Tensor, value: Tensor, layer_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Join new rows [1, kv_heads, T, head_size]; return all [1, kv_heads, start + T, head_size]."""
        self.keys = torch.cat((self.keys[:, :, : self.start], key), 2)
        self.values = torch.cat((self.values[:, :, : self.start], value), 2)
        return self.keys, self.values

    def bytes(self) -> int:
        """Bytes that the tensors hold now."""
        return 2 * self.keys.numel() * self.keys.element_size()


def text_bytes(
    config: Any,
    head: DraftConfig | None,
    dtype: torch.dtype,
    slots: int,
    *,
    attention: str = "sdpa",
    rows: int = 1,
) -> int:
    """Bytes that decoding a text takes beside the weights: keys and values of both models, and what one piece of its
    prompt needs at its end. They grow with `slots`, the text's tokens and the tree's, and not with their square.

    Args: config, the target's text configuration; head, None for plain decoding; rows, texts of that length at once.
    """
    item, piece = dtype.itemsize, min(PIECE, slots)
    kv_heads, size = kv_sizes(config)
    keys_and_values = 2 * config.num_hidden_layers * kv_heads * size
    groups = 1
    if head is not None:
        keys_and_values += 2 * head.num_key_value_heads * head.head_size
        groups = head.num_attention_heads // head.num_key_value_heads
    # masks as truth values and as numbers, the target's and the head's, which it repeats for each of its groups
    cell = 4 + item * (2 + groups)
    if window_of(config)[0] is not None:
        cell += 9 + item  # distances, and a mask of their own for the layers with a window
    if attention in ("eager", "tree"):
        cell += config.num_attention_heads * (2 * item + 4)  # scores, and their softmax in float32
    width = 8 * config.hidden_size + 3 * getattr(config, "intermediate_size", config.hidden_size)
    return rows * slots * keys_and_values * item + piece * slots * cell + piece * width * item
