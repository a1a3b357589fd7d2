"""Compiled kernels launched before the one before them has ended, made safe: each waits before it touches memory.

On Hopper and later a kernel may be put on the device while the one before it drains (programmatic dependent launch, CUDA
Programming Guide), which hides a microsecond of launching. Inductor has it (`triton.enable_pdl`), but its kernels wait
before an access only if the kernel just before touched the same buffer (the first of a compiled function always waits),
and else after their loads. So one that reads nothing may never wait: it can end before its predecessors, and the kernel
after it then starts while they still write. Here every load and store waits first (a random seed's load excepted, which
nothing here uses), and with that each kernel lets the next one start at once, not after its own loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config

HOOK = "_handle_pdl_before_access"  # of Inductor's TritonKernel, since torch 2.11
AFTER = "_handle_pdl_after_load"  # likewise
SINCE = (9, 0)  # compute capability
TAG = "eagle_lab-signals-and-waits-first"


def supported(device: torch.device) -> bool:
    """Whether this GPU can launch a kernel early: a compute capability from 9.0 on."""
    if device.type != "cuda" or torch.version.hip is not None:  # ROCm goes by that name too
        return False
    return torch.cuda.get_device_capability(device) >= SINCE


def possible(device: torch.device) -> bool:
    """Whether what is compiled can be launched early: by this GPU, and by a torch with the places that are mended here."""
    if not supported(device) or not hasattr(torch._inductor.config.triton, "enable_pdl"):
        return False
    from torch._inductor.codegen.triton import TritonKernel

    return hasattr(TritonKernel, HOOK) and hasattr(TritonKernel, AFTER)


def wait_first(kernel: Any, buffer: Any, *names: str, consider_reads: bool = False) -> None:
    """Inductor's hook before each load and store of a kernel, which keeps the first of the waits that it is given, and the
    last of the signals to the next kernel: so there is one, before the first wait."""
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


def _own_cache() -> AbstractContextManager[Any]:
    # Inductor's cache key knows that kernels start early, but not the hook: it would bring back those made without it
    config: Any = getattr(torch.compiler, "config", None)
    if not hasattr(config, "cache_key_tag"):
        return nullcontext()
    return config.patch(cache_key_tag=config.cache_key_tag + TAG)


@contextmanager
def early_launches(device: torch.device) -> Iterator[None]:
    """Inside, what is compiled for the device is launched early, where that is possible; else nothing changes."""
    if not possible(device):
        yield
        return
    from torch._inductor.codegen.triton import TritonKernel

    with (
        torch._inductor.config.patch({"triton.enable_pdl": True}),
        patch.object(TritonKernel, HOOK, wait_first),
        patch.object(TritonKernel, AFTER, _nothing),
        _own_cache(),
    ):
        yield
