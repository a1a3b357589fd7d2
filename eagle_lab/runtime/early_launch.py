"""Compiled kernels that are launched before the kernel before them has ended, made safe.

On Hopper and later a kernel may be put on the device while the one before it drains (programmatic dependent launch, CUDA
Programming Guide); that hides a microsecond of launching. Inductor has it (`triton.enable_pdl`). Its kernels wait before
an access only where the kernel just before touched the same buffer, and the first of a compiled function always waits;
otherwise they wait after their loads. A kernel that reads nothing may then never wait: it can end before its
predecessors, and the kernel after it starts while they still write. Here every load and store waits first, except a
random seed's load, which nothing here uses. With that each kernel lets the next one start at once.

This file reaches into torch's compiler, and so does `prepare.only_sizes_open`. `refusal` names the releases with which it
was tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config

from eagle_lab.runtime.swap import swapped

HOOK = "_handle_pdl_before_access"  # of Inductor's TritonKernel
AFTER = "_handle_pdl_after_load"  # likewise
TRIED = ((2, 11), (2, 13))  # the first and the last release of torch with which all of this was tried
SINCE = (9, 0)  # compute capability
TAG = "eagle_lab-signals-and-waits-first"


def supported(device: torch.device) -> bool:
    """Whether this GPU can launch a kernel early: a compute capability from 9.0 on."""
    if device.type != "cuda" or torch.version.hip is not None:  # ROCm goes by that name too
        return False
    return torch.cuda.get_device_capability(device) >= SINCE


def refusal(device: torch.device) -> str | None:
    """Why nothing that is compiled for the device is launched early, to be read after a name; None where it is."""
    if not supported(device):
        return "needs a GPU of compute capability 9.0 or later, such as an H100"
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if not TRIED[0] <= release <= TRIED[1]:
        first, last = (".".join(map(str, release)) for release in TRIED)
        return (
            f"uses places inside torch's compiler and was tried with torch {first} to {last}, but this is "
            f"torch {torch.__version__}"
        )
    return None


def possible(device: torch.device) -> bool:
    """Whether what is compiled for the device is launched early."""
    return refusal(device) is None


def wait_first(kernel: Any, buffer: Any, *names: str, consider_reads: bool = False) -> None:
    """Inductor's hook before each load and store of a kernel.

    Inductor keeps the first of a kernel's waits and the last of its signals to the next kernel, so there is one signal, before
    the first wait.
    """
    if not kernel._enable_pdl_codegen():
        return
    # of a reduction in a loop: before the loop
    in_loop = kernel.inside_reduction and kernel.range_trees[-1].is_loop
    place = kernel.body if in_loop else buffer
    if not vars(kernel).get(TAG):
        setattr(kernel, TAG, True)
        place.writeline(kernel.GDC_LAUNCH)
    place.writeline(kernel.GDC_WAIT)


def _nothing(kernel: Any, buffer: Any, result: Any) -> None:
    """Inductor's hook after each load, where it would signal."""


@contextmanager
def early_launches(device: torch.device) -> Iterator[None]:
    """Inside, what is compiled for the device is launched early, where that is possible; else nothing changes."""
    if not possible(device):
        yield
        return
    from torch._inductor.codegen.triton import TritonKernel

    config: Any = torch.compiler.config
    with (
        torch._inductor.config.patch({"triton.enable_pdl": True}),
        swapped([(TritonKernel, HOOK, wait_first), (TritonKernel, AFTER, _nothing)]),
        # Inductor's cache key knows that kernels start early, but not the hook: it would bring back those made without it
        config.patch(cache_key_tag=config.cache_key_tag + TAG),
    ):
        yield
