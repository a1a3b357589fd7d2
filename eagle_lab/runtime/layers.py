"""A transformers decoder with its repeated parts compiled: seconds to prepare, where the whole model takes minutes.

A small model's launches are mostly small operations of its layers; a norm alone is seven. Layers share their code. As
long as nothing in it depends on the layer's number, two compilations are enough: one of the first layer, whose norm
nobody has made, and one that serves all others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eagle_lab.runtime.projections import Projection, early_alone, parts_of, product_of
from eagle_lab.runtime.swap import swapped

PARTS = ("RMSNorm", "MLP")  # ends of the class names of what is alike in all layers
ROTARY = "apply_rotary_pos_emb"  # a function of each model's module
# by the names that transformers gives them: the norm with which a layer begins, and what a decoder has beside its layers
FIRST = "input_layernorm"
LAST, ANGLES = "norm", "rotary_emb"
KEPT = "eagle_lab_compiled"


class _Ahead(nn.Module):
    """A norm that the layer before has already made, in the kernel that summed up what it reads.

    Where it has not, `apart` runs if it is given, else the norm itself.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.apart: Callable[[Tensor], Tensor] | None = None
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.x is not x or self.y is None:
            return self.norm(x) if self.apart is None else self.apart(x)
        found, self.x, self.y = self.y, None, None
        return found


def _with_next_norm(forward: Callable[..., Any], ahead: _Ahead | None, *args: Any, **kwargs: Any) -> Any:
    """A layer, and the norm that reads its output, if that is one tensor."""
    out = forward(*args, **kwargs)
    if ahead is not None and isinstance(out, Tensor):
        ahead.x, ahead.y = out, ahead.norm(out)
    return out


def _next_norms(decoder: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Of each layer, the norm that reads its output: the module that has it, its name there and the norm itself.

    Empty where a layer has none by the usual name, where one is hooked, as its hook would run inside the layer before,
    or where the model lies on several devices, as one may then be on another than the layer before.
    """
    places = [*((layer, FIRST) for layer in decoder.layers[1:]), (decoder, LAST)]
    found = [(place, name, norm) for place, name in places if (norm := place._modules.get(name)) is not None]
    free = [norm for _, _, norm in found if not (norm._forward_hooks or norm._forward_pre_hooks)]
    devices = {weight.device for weight in decoder.parameters()}
    return found if len(free) == len(places) and len(devices) <= 1 else []


@contextmanager
def compiled_layers(decoder: nn.Module, any_size: bool = False) -> Iterator[None]:
    """Inside, each layer runs compiled, as do the last norm and the angles; hooks stay outside the compiled part.

    A layer ends with the norm that reads its output, the next layer's or the last: the norm then shares a kernel with the
    sum that it reads. Where a hook gives the next layer another tensor, the norm was made in vain and nothing else
    changes; but a hook must not change a layer's input or output in place. Where a layer returns a tuple, nothing is made
    ahead.
    `any_size`: compiled once for all numbers of rows and of tokens above 1, else for each anew.
    For forwards without a cache, or with one whose buffers are bound to the layers (`KeyValueCache.bound`): else a layer
    asks for its keys by its number.
    """
    norms = _next_norms(decoder)
    ahead = [_Ahead(norm) for _, _, norm in norms]
    compiled = _compiled(decoder, "layer", _with_next_norm, any_size)
    swaps: list[tuple[Any, str, Any]] = []
    for index, layer in enumerate(decoder.layers):
        swaps.append((layer, "forward", partial(compiled, layer.forward, ahead[index] if ahead else None)))
    last, angles = decoder._modules.get(LAST), decoder._modules.get(ANGLES)
    if last is not None:
        alone = _compiled(last, "forward", last.forward, any_size)
        if ahead:
            # not set on the norm itself: the last layer, which goes through it, would be compiled once more
            ahead[-1].apart = alone
        else:
            swaps.append((last, "forward", alone))
    # some choose their frequencies by the positions, on the host
    if angles is not None and getattr(angles, "rope_type", "default") not in ("dynamic", "longrope"):
        swaps.append((angles, "forward", _compiled(angles, "forward", angles.forward, any_size)))
    swaps += [(place._modules, name, norm) for (place, name, _), norm in zip(norms, ahead, strict=True)]
    with swapped(swaps):
        yield


@contextmanager
def compiled_early(projection: nn.Module | None, rows: int, any_size: bool = False) -> Iterator[None]:
    """Inside, a projection that is in no layer runs compiled, its product the early kernels', where that of so many rows is.

    `any_size`: as for `compiled_layers`.
    """
    if not early_alone(projection, rows):
        yield
        return
    compiled = _compiled(projection, "early", _early_product, any_size)
    with swapped([(projection, "forward", partial(compiled, projection))]):
        yield


def _early_product(projection: Projection, x: Tensor) -> Tensor:
    return product_of(x, "early", *parts_of(projection))


@contextmanager
def compiled_parts(decoder: nn.Module, any_size: bool = False) -> Iterator[None]:
    """Inside, norms, MLPs and the rotation of queries and keys run compiled, whatever the cache and the attention.

    `any_size`: as for `compiled_layers`.
    """
    found: list[tuple[Any, str, Any]] = [
        (module, "forward", module.forward)
        for module in decoder.modules()
        if type(module).__name__.endswith(PARTS)
    ]
    home = sys.modules[type(decoder).__module__]
    if hasattr(home, ROTARY):
        found.append((home, ROTARY, getattr(home, ROTARY)))
    with swapped(
        [(place, name, _compiled(place, name, function, any_size)) for place, name, function in found]
    ):
        yield


def _compiled(place: Any, name: str, function: Any, any_size: bool) -> Any:
    # wrapping a function takes milliseconds, and training asks for all layers at every step; kept with the layer itself,
    # as it refers to it and a table elsewhere would keep the model in memory
    kept = vars(place).setdefault(KEPT, {})
    if (name, any_size) not in kept:
        kept[name, any_size] = torch.compile(function, fullgraph=True, dynamic=any_size)
    return kept[name, any_size]
