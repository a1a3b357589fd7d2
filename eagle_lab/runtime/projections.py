"""Projections: those of one input as one matrix product, and how a matrix product is made.

A decode's rows are few, so a product takes as long as its weights take to come from memory, and a small one does not
fill the memory's bandwidth. `fuse_in_memory` puts the weights of projections that read the same input (queries, keys and
values; gate and up) one below another in memory, where each stays what it was. Inside `fused` their modules share one
product; those of 8-bit weights too, as each output has a scale of its own. A product is the library's, or, where it has few
rows, a kernel's that asks for its weights early. On a CPU the library is several times as fast for few rows where the weight
comes first, see `transposed`.

Source: Megatron-LM (`linear_qkv`) and vLLM (`QKVParallelLinear`, `MergedColumnParallelLinear`) among others. Unlike
there, each weight stays a parameter of its own, and outside `fused` each module works alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eagle_lab.runtime.kernels import float8
from eagle_lab.runtime.kernels.float8 import Float8Linear, float8_product, quantizable
from eagle_lab.runtime.swap import swapped

Matmul = Callable[[Tensor, Tensor], Tensor]  # (x [..., inputs], weight [outputs, inputs]) → [..., outputs]
Modules = dict[str, nn.Module | None]
Place = tuple[Modules, str, nn.Module]
Projection: TypeAlias = nn.Linear | Float8Linear


def early(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] → [..., outputs]: by the early kernels, else by the library."""
    from eagle_lab.runtime.kernels.early_product import early_product, plan

    outputs, inputs = weight.shape
    cut = plan(x.numel() // inputs, outputs, inputs, weight.element_size())
    return linear(x, weight) if cut is None else early_product(x, weight)


def early_8_bits(rows: Tensor, weight: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows e4m3 [T, inputs] times weight e4m3 [outputs, inputs] → [T, outputs] of a dtype, as `float8.library` multiplies
    them: by the early kernels, else by the library."""
    from eagle_lab.runtime.kernels.early_product import early_product, plan

    outputs, inputs = weight.shape
    if plan(rows.shape[0], outputs, inputs, weight.element_size()) is None:
        return float8.library(rows, weight, unit, dtype)
    return early_product(rows, weight, dtype)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] → [..., outputs], as the transpose of the weight times the rows.

    MKL then reads the weight in the order in which it lies in memory. The other way round it turns the weight first, at
    every call: with 2 to 32 rows that takes longer than the product.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        return linear(x, weight)
    return (weight @ rows.t()).t().unflatten(0, x.shape[:-1])


MATMULS: dict[str, Matmul] = {"library": linear, "early": early, "transposed": transposed}
MULTIPLIES: dict[str, float8.Multiply] = {"early": early_8_bits}  # the others are the library's


def fits(weight: Tensor, rows: int) -> bool:
    """Whether the product of so many rows with this weight [outputs, inputs] is the early kernels'."""
    from eagle_lab.runtime.kernels.early_product import plan

    # a subclass holds something else than numbers in rows
    readable = type(weight.data) is Tensor and weight.is_contiguous() and weight.data_ptr() % ALIGNED == 0
    return readable and plan(rows, weight.shape[0], weight.shape[1], weight.element_size()) is not None


def early_alone(p: nn.Module | None, rows: int) -> TypeGuard[Projection]:
    """Whether a projection that is in no group is plain and its product of so many rows the early kernels'."""
    return is_plain(p) and fits(p.weight, rows)


ALIGNED = 16  # bytes: where the early kernels may ask for weights
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def is_plain(child: nn.Module | None) -> TypeGuard[Projection]:
    """Whether a module is exactly one of the two, without a bias and with nothing hung on it.

    An adapted or hooked layer computes something else.
    """
    if (
        not isinstance(child, Projection)
        or type(child) not in (nn.Linear, Float8Linear)
        or child.bias is not None
    ):
        return False
    return not (child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child))


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...], list[Projection]]]:
    """Each module of a model with such projections, plain ones alone: and their names."""
    for module in model.modules():
        for names in GROUPS:
            found = [child for name in names if is_plain(child := module._modules.get(name))]
            alike = {
                (type(c), type(c.weight.data), c.weight.dtype, c.weight.device, c.in_features) for c in found
            }
            if len(found) == len(names) and len(alike) == 1 and type(found[0].weight.data) is Tensor:
                yield module, names, found


@torch.no_grad()
def fuse_in_memory(model: nn.Module) -> int:
    """Put the weights of projections of one input one below another in memory; → how many groups.

    To be done before anything refers to the weights' memory, such as a CUDA graph. A copy of the model, or one moved to
    another device or dtype, has them apart again.
    """
    count = 0
    for _, _, projections in _groups(model):
        _lay_together(projections, "weight")
        if isinstance(projections[0], Float8Linear):
            _lay_together(projections, "scale")
        count += 1
    return count


def _lay_together(projections: list[Projection], name: str) -> None:
    whole = torch.cat([getattr(p, name) for p in projections])
    for p, part in zip(projections, whole.split([p.out_features for p in projections]), strict=True):
        setattr(p, name, nn.Parameter(part, requires_grad=getattr(p, name).requires_grad))


def whole(parts: list[Tensor]) -> Tensor | None:
    """The one tensor [sum of rows, ...] that tensors [rows, ...] are parts of; None where they don't lie together."""
    first = parts[0]
    at = first.storage_offset()
    for w in parts:
        same = w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not w.is_contiguous() or w.storage_offset() != at:
            return None
        at += w.numel()
    rows = sum(len(w) for w in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def product_of(x: Tensor, product: str, weight: Tensor, scale: Tensor | None, unit: Tensor | None) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] → [..., outputs], by that name of MATMULS.

    scale float32 [outputs] and unit float32 [] are a `Float8Linear`'s, None for other weights.
    """
    if scale is None or unit is None:
        return MATMULS[product](x, weight)
    return float8_product(x, weight, scale, unit, MULTIPLIES.get(product, float8.library))


def parts_of(p: Projection) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A projection's weight [outputs, inputs], scale float32 [outputs] and unit float32 [], as `product_of` takes them."""
    return (p.weight, p.scale, p.unit) if isinstance(p, Float8Linear) else (p.weight, None, None)


class _Product(nn.Module):
    """A projection, or several as one, whose product is made by that name."""

    def __init__(self, product: str, weight: Tensor, scale: Tensor | None, unit: Tensor | None) -> None:
        super().__init__()
        self.product = product
        self.weight, self.scale, self.unit = (_parameter(t) for t in (weight, scale, unit))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return product_of(x, self.product, self.weight, self.scale, self.unit)


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


class _Shared:
    """What the projections of one input share while their module runs: the input, the product, the parts taken (bits)."""

    def __init__(self, parts: int) -> None:
        self.parts, self.taken = parts, 0
        self.x: Tensor | None = None
        self.y: Tensor | None = None


class _Part(nn.Module):
    """One of the projections: the first that is called makes the product, the last lets go of it."""

    def __init__(self, product: nn.Module, shared: _Shared, number: int, start: int, stop: int) -> None:
        super().__init__()
        self.bit = 1 << number
        self.product, self.shared, self.start, self.stop = product, shared, start, stop

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared
        # asked for again before the others were: the tensor may hold something else by now
        if shared.x is not x or shared.taken & self.bit:
            shared.x, shared.y, shared.taken = x, self.product(x), 0
        assert shared.y is not None
        part = shared.y[..., self.start : self.stop]
        shared.taken |= self.bit
        if shared.taken == (1 << shared.parts) - 1:
            shared.x = shared.y = None
        return part


class _InPieces(nn.Module):
    """A projection that makes its product piece by piece of its weight's rows, with a pause between two."""

    def __init__(
        self, weight: nn.Parameter, matmul: Matmul, pieces: int, pause: Callable[[], object]
    ) -> None:
        super().__init__()
        self.weight, self.matmul, self.pieces, self.pause = weight, matmul, pieces, pause

    def forward(self, x: Tensor) -> Tensor:
        out, start = None, 0
        for rows in self.weight.chunk(self.pieces):
            if out is not None:
                self.pause()
            part = self.matmul(x, rows)
            if out is None:  # laid out as the parts are, as the whole product would be
                shape = (*part.shape[:-1], len(self.weight))
                out = part.new_empty(shape)
                if part.stride(-1) != 1:
                    out = part.new_empty((shape[-1], *shape[:-1])).movedim(0, -1)
            out[..., start : start + len(rows)] = part
            start += len(rows)
        assert out is not None
        return out


@dataclass
class Fused:
    """How many groups of projections share one product, and how many products are the early kernels'."""

    groups: int = 0
    early: int = 0


def lone(model: nn.Module, product: str) -> list[Place]:
    """For `swapped`: each projection of a model alone, its product made as MATMULS has it by that name."""
    return [(own, name, _Product(product, *parts_of(p))) for own, name, p in _plain_projections(model)]


def in_8_bits(model: nn.Module, asked: str) -> list[Place]:
    """For `swapped`: each projection of a model as a `Float8Linear`, those of one input one below another in memory.

    The model keeps its own weights beside them. `asked`: what an error names. Raises ValueError as `quantizable` does.
    """
    places: list[Place] = [
        (own._modules, name, Float8Linear(p)) for own, name, p in [*quantizable(model, asked)]
    ]
    with swapped(places):
        fuse_in_memory(model)
    return places


def in_pieces(
    models: Iterable[nn.Module], product: str, most: int, pieces_at_most: int, pause: Callable[[], object]
) -> list[Place]:
    """For `swapped`: each projection whose weight makes two pieces or more of about `most` numbers, its product made as
    MATMULS has it by that name, piece by piece with a pause between two."""
    return [
        (own, name, _InPieces(p.weight, MATMULS[product], pieces, pause))
        for model in models
        for own, name, p in _plain_projections(model)
        if (pieces := min(pieces_at_most, round(p.weight.numel() / most))) > 1
        and type(p.weight.data) is Tensor
    ]


@contextmanager
def fused(model: nn.Module, product: str = "library", rows: int = 1) -> Iterator[Fused]:
    """Inside, projections whose weights lie together share one product, and products are made as MATMULS, and MULTIPLIES for
    8-bit weights, has them by that name.

    `rows`: of the products; they decide which are the early kernels'. For what is compiled or captured inside: the
    modules are put back at the end.
    """
    is_early = product == "early"
    places: list[Place] = []
    count = Fused()
    shared_already: set[nn.Module] = set()
    for module, names, projections in _groups(model):
        weight = whole([p.weight for p in projections])
        scales = [p.scale for p in projections if isinstance(p, Float8Linear)]
        scale = whole(scales) if scales else None
        if weight is None or scales and scale is None:
            continue
        unit = parts_of(projections[0])[2]
        whole_product, shared, start = _Product(product, weight, scale, unit), _Shared(len(names)), 0
        for number, (name, p) in enumerate(zip(names, projections, strict=True)):
            places.append(
                (module._modules, name, _Part(whole_product, shared, number, start, start + p.out_features))
            )
            start += p.out_features
        shared_already.update(projections)
        count.groups += 1
        count.early += is_early and fits(weight, rows)
    for own, name, p in _projections(model):
        if is_early and p not in shared_already and fits(p.weight, rows):
            places.append((own, name, _Product(product, *parts_of(p))))
            count.early += 1
    with swapped(places):
        yield count


def _projections(model: nn.Module) -> Iterator[tuple[Modules, str, Projection]]:
    """Each plain projection that is a module's own: the modules of that, its name there and the projection."""
    for module in model.modules():
        for name, child in module._modules.items():
            if is_plain(child):
                yield module._modules, name, child


def _plain_projections(model: nn.Module) -> Iterator[tuple[Modules, str, nn.Linear]]:
    """Those whose weights aren't of 8 bits."""
    for own, name, child in _projections(model):
        if isinstance(child, nn.Linear):
            yield own, name, child
