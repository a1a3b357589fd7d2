"""A transformers decoder with its repeated parts compiled: seconds to prepare, where the whole model takes minutes.

Apart, the small operations of a layer (a norm is seven) are most of a small model's launches. Its layers share their
code, so what is compiled for one serves all, as long as nothing in it depends on the layer's number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PARTS = ("RMSNorm", "MLP")  # ends of the class names of what is alike in all layers
ROTARY = "apply_rotary_pos_emb"  # a function of each model's module
AROUND = (
    "norm",
    "rotary_emb",
)  # what a decoder has beside its layers, by the names that transformers gives them
KEPT = "eagle_lab_compiled"


@contextmanager
def compiled_layers(decoder: nn.Module) -> Iterator[None]:
    """Inside, each layer runs compiled, as do the last norm and the angles; hooks stay outside the compiled part.

    For forwards without a cache, or with one whose buffers are lent to the layers (`KeyValueCache.lent`): else a layer
    asks for its keys by its number.
    """
    around = [
        module
        for name in AROUND
        if (module := decoder._modules.get(name)) is not None
        # these choose their frequencies by the positions, on the host
        and getattr(module, "rope_type", "default") not in ("dynamic", "longrope")
    ]
    yield from _swapped([(module, "forward", module.forward) for module in (*decoder.layers, *around)])


@contextmanager
def compiled_parts(decoder: nn.Module) -> Iterator[None]:
    """Inside, norms, MLPs and the rotation of queries and keys run compiled, whatever the cache and the attention."""
    found: list[tuple[Any, str, Any]] = [
        (module, "forward", module.forward)
        for module in decoder.modules()
        if type(module).__name__.endswith(PARTS)
    ]
    home = sys.modules[type(decoder).__module__]
    if hasattr(home, ROTARY):
        found.append((home, ROTARY, getattr(home, ROTARY)))
    yield from _swapped(found)


def _swapped(found: list[tuple[Any, str, Any]]) -> Iterator[None]:
    own = [name in vars(place) for place, name, _ in found]
    for place, name, function in found:
        setattr(place, name, _compiled(place, name, function))
    try:
        yield
    finally:
        for kept, (place, name, function) in zip(own, found, strict=True):
            if kept:
                setattr(place, name, function)
            else:
                delattr(place, name)


def forget(decoder: nn.Module) -> None:
    """Drop what was compiled for the decoder."""
    for place in (*decoder.modules(), sys.modules[type(decoder).__module__]):
        vars(place).pop(KEPT, None)


def _compiled(place: Any, name: str, function: Any) -> Any:
    # wrapping a function takes milliseconds, and training asks for all layers at every step; kept with the layer itself,
    # as it refers to it and a table elsewhere would keep the model in memory
    kept = vars(place).setdefault(KEPT, {})
    if name not in kept:
        kept[name] = torch.compile(function, fullgraph=True, dynamic=False)
    return kept[name]
