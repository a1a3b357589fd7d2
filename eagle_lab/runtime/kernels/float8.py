"""Products in 8-bit floating point (W8A8): a weight of one byte a number, and rows that are rounded as they come.

A weight has a scale for each output, a row of the input one of its own, taken from its largest number when it comes
(dynamic). The library multiplies the bytes and adds in float32. Rounding a row and applying the scales are plain torch, so
that a compiler puts them into the kernels before and after.

Source: Micikevicius et al., FP8 Formats for Deep Learning (2022), for e4m3; torchao's
`Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())` computes the same by the same call of torch. Its weight
is a subclass of Tensor, which projections of one input can't share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Multiply = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]  # as `library`

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # of a scale: a row of zeros has one too
MULTIPLE = 16  # the library's products take inputs and outputs by so many
CAPABILITY = (8, 9)  # from here on GPUs multiply such numbers


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., inputs], any float → the nearest e4m3 numbers of x / scale [..., inputs], scale float32 [..., 1].

    The largest number of a row becomes 448. A number's error is at most 1/16 of it, or 2^-10 of the row's scale.
    """
    scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=LEAST)
    return (x.float() / scale).to(FLOAT8), scale


def library(rows: Tensor, weight: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows e4m3 [T, inputs] times weight e4m3 [outputs, inputs] → [T, outputs] of a dtype; unit: float32 [], a one."""
    return torch._scaled_mm(rows, weight.t(), unit, unit, out_dtype=dtype, use_fast_accum=True)


def float8_product(
    x: Tensor, weight: Tensor, scale: Tensor, unit: Tensor, multiply: Multiply = library
) -> Tensor:
    """x [..., inputs] times weight e4m3 [outputs, inputs] of scales float32 [outputs] → [..., outputs] of x's dtype.

    unit: float32 [], a one; multiply: how the bytes are multiplied. The scales come after, in a kernel that a compiler joins
    with what follows: for 64 rows the library's products with one scale are up to a third faster than those with a scale a
    row (measured on an H100).

    On a GPU it was tried with x in bfloat16 alone.
    """
    rows, scales = rounded(x.reshape(-1, x.shape[-1]))
    # without its scales a sum may be past float16's largest number
    whole = multiply(rows, weight, unit, torch.float32 if x.dtype == torch.float16 else x.dtype)
    return (whole.float() * (scales * scale)).to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Linear(nn.Module):
    """A projection by `float8_product`: weight e4m3 [outputs, inputs], scale float32 [outputs], and the bias as it was."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale[:, 0].clone(), requires_grad=False)
        self.unit = nn.Parameter(scale.new_ones(()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] → [..., outputs], of x's dtype."""
        y = float8_product(x, self.weight, self.scale, self.unit)
        return y if self.bias is None else y + self.bias


def quantizable(
    model: nn.Module, asked: str = "quantization=fp8"
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each projection of a model: the module that has it, its name there and itself; also of a model without data.

    An embedding stays as it is: its rows are looked up, not multiplied. `asked`: what an error names.
    Raises ValueError, one sentence, for matrices that aren't plain projections or have sizes that the library doesn't take.
    """
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if type(child) is not nn.Linear:
                continue
            whole = f"{path}.{name}".lstrip(".")
            if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                raise ValueError(f"{asked} is for plain projections, and {whole} is hooked.")
            if child.in_features % MULTIPLE or child.out_features % MULTIPLE:
                raise ValueError(
                    f"{asked} needs sizes that are multiples of {MULTIPLE}, and {whole} has {child.in_features} inputs "
                    f"and {child.out_features} outputs."
                )
            yield module, name, child
        if type(module) not in (nn.Linear, nn.Embedding) and any(
            p.dim() > 1 for p in module._parameters.values() if p is not None
        ):
            raise ValueError(
                f"{asked} is for plain projections, and {path or type(module).__name__} ({type(module).__name__}) holds "
                "a matrix of another kind."
            )


@torch.no_grad()
def quantize(model: nn.Module) -> int:
    """Put a `Float8Linear` in place of each projection of a model, one after the other; → how many.

    To be done before `projections.fuse_in_memory` and before anything refers to the weights' memory. Raises ValueError
    as `quantizable` does, before anything is changed.
    """
    found = list(quantizable(model))
    for module, name, linear in found:
        module._modules[name] = Float8Linear(linear)
    return len(found)


def bytes_saved(model: nn.Module) -> int:
    """The bytes that `quantize` would take off a model, which may be one without data. Raises ValueError as it does."""
    return sum(
        p.weight.numel() * (p.weight.element_size() - 1) - 4 * (p.out_features + 1)
        for _, _, p in quantizable(model)
    )
