"""How a projection's product is made: by the library, or, where it is small, by a kernel that loads its weights early."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from eagle_lab.runtime.early_launch import possible

Product = Callable[[Tensor, Tensor], Tensor]


def early(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] → [..., outputs]: a small product by `early_product`, any other by the
    library, as what is large takes as long as its weights take to come from memory."""
    from eagle_lab.runtime.kernels.early_product import early_product, plan

    outputs, inputs = weight.shape
    small = plan(x.numel() // inputs, outputs, inputs, weight.element_size())
    return linear(x, weight) if small is None else early_product(x, weight)


PRODUCTS: dict[str, Product] = {"library": linear, "early": early}


def fits(weight: Tensor, rows: int) -> bool:
    """Whether the product of so many rows with this weight [outputs, inputs] is small, and the early kernel can read it."""
    from eagle_lab.runtime.kernels.early_product import plan

    # a subclass holds something else than numbers in rows
    readable = type(weight.data) is Tensor and weight.is_contiguous()
    return readable and plan(rows, weight.shape[0], weight.shape[1], weight.element_size()) is not None


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why a way of making products cannot run on a device; None where it can."""
    if name != "early":
        return None
    if torch.device(device).type != "cuda":
        return f"product=early is a Triton kernel and needs a CUDA GPU, but the device is {device}"
    if not find_spec("triton"):
        return "product=early needs the package triton, which is not installed"
    if torch.cuda.is_available() and not possible(torch.device(device)):
        return (
            "product=early needs a GPU of compute capability 9.0 or later, such as an H100, and torch 2.11 or later, whose "
            "compiler launches kernels early"
        )
    return None
