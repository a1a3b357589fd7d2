"""How a projection's product is made: by the library, or, where it is small, by a kernel that loads its weights early."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

Product = Callable[[Tensor, Tensor], Tensor]


def early(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] → [..., outputs]: a small product by `early_product`, any other by the
    library, as what is large takes as long as its weights take to come from memory."""
    from eagle_lab.kernels.early_product import early_product, plan

    outputs, inputs = weight.shape
    small = plan(x.numel() // inputs, outputs, inputs, weight.element_size())
    return linear(x, weight) if small is None else early_product(x, weight)


PRODUCTS: dict[str, Product] = {"library": linear, "early": early}


def fits(weight: Tensor) -> bool:
    """Whether products of a few rows with this weight [outputs, inputs] are small."""
    from eagle_lab.kernels.early_product import plan

    return plan(1, weight.shape[0], weight.shape[1], weight.element_size()) is not None


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why a way of making products cannot run on a device; None where it can."""
    if name != "early":
        return None
    if torch.device(device).type != "cuda":
        return f"product=early is a Triton kernel and needs a CUDA GPU, but the device is {device}"
    return None if find_spec("triton") else "product=early needs the package triton, which is not installed"
