"""A target split among processes, each with its own part of every layer's heads and of its MLP, on a GPU of its own.

transformers splits the weights as it loads them, and wraps each projection in code that can be neither compiled nor
joined with others. `make_plain` puts plain modules of this process's part in its place; what the processes' parts of an
output projection make is summed.
Source: Megatron-LM (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import torch
from torch import Tensor, distributed, nn

from eagle_lab.models.weights import own_part

NO_PROCESSES = "tp_plan needs one process a device: start the program with `torchrun --nproc-per-node N`."


def joined() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """How many processes share the target; 1 where there is only this one."""
    return distributed.get_world_size() if joined() else 1


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if joined() else 0


def own_device(place: torch.device) -> torch.device:
    """Each process of `torchrun` has its own GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if place.type == "cuda" else place


def check_split(place: torch.device) -> None:
    """ValueError for a target split on the CPU beside GPUs: transformers splits over those, whatever was asked for."""
    if place.type == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "tp_plan splits over this machine's GPUs, and the device is cpu; set CUDA_VISIBLE_DEVICES= to hide them."
        )


def options(plan: str) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told to split by a plan. Raises ValueError outside `torchrun`."""
    if "RANK" not in os.environ:
        raise ValueError(NO_PROCESSES)
    from transformers.distributed import DistributedConfig

    if "tp_plan" in inspect.signature(DistributedConfig).parameters:  # the name since transformers 5.18
        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    return {"tp_plan": plan}


def split(target: Any, plan: str) -> Any:
    """A whole target, alike in all processes, as this process's part of it. Raises ValueError as `options` does."""
    part = type(target).from_pretrained(
        None, config=target.config, state_dict=target.state_dict(), dtype=target.dtype, **options(plan)
    )
    part.generation_config = target.generation_config
    make_plain(part)
    return part.eval().requires_grad_(False)


class _Summed(nn.Module):
    """A projection of this process's part of the inputs; the processes' outputs are summed, the bias is added once."""

    def __init__(self, part: nn.Linear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.part, self.bias = part, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        distributed.all_reduce(y)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def make_plain(model: Any) -> None:
    """Make a split model's projections plain ones of this process's part, and its input embeddings whole.

    Embeddings are whole as the head reads them at each of its steps, and each reading of a split one waits for the other
    processes. Modules that transformers splits in other ways stay as they are.
    """
    plan = getattr(model, "tp_plan", None) or {}
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if not hasattr(getattr(module, "weight", None), "to_local"):
            continue
        if isinstance(module, nn.Embedding):
            module.weight = _parameter(module.weight.full_tensor())  # type: ignore[operator]
            vars(module).pop("forward", None)
        elif type(module) is nn.Linear and style in ("colwise", "rowwise"):
            vars(module).pop("forward", None)
            module.weight = _parameter(own_part(module.weight))
            module.out_features, module.in_features = module.weight.shape
            bias = None if module.bias is None else _parameter(own_part(module.bias))
            module.bias = bias if style == "colwise" else None
            if style == "rowwise":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _Summed(module, bias))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
