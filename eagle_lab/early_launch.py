"""Compiled kernels launched before the one before them has ended, made safe: each waits before it touches memory.

On Hopper and later a kernel may be put on the device while the one before it drains (programmatic dependent launch, CUDA
Programming Guide), which hides a microsecond of launching. Inductor has it (`triton.enable_pdl`), but its kernels wait
only where they read what the kernel just before them in the same compiled function wrote. One that reads nothing never
waits, so it can end before its predecessors, and the kernel after it then starts while they still write; and what another
writer, such as a Triton kernel of one's own, leaves in a tensor isn't recognised. Here every kernel waits first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config

HOOK = "_handle_pdl_before_access"  # of Inductor's TritonKernel, since torch 2.11
SINCE = (9, 0)  # compute capability


def possible(device: torch.device) -> bool:
    """Whether this torch and this GPU can: a compute capability from 9.0 on, and the place in Inductor to be mended."""
    if device.type != "cuda" or not hasattr(torch._inductor.config.triton, "enable_pdl"):
        return False
    from torch._inductor.codegen.triton import TritonKernel

    return hasattr(TritonKernel, HOOK) and torch.cuda.get_device_capability(device) >= SINCE


def wait_first(kernel: Any, buffer: Any, *names: str, consider_reads: bool = False) -> None:
    """Inductor's hook before each load and store of a kernel, which keeps the first of the waits that it is given."""
    if not kernel._enable_pdl_codegen():
        return
    # of a reduction in a loop: before the loop
    in_loop = kernel.inside_reduction and kernel.range_trees[-1].is_loop
    (kernel.body if in_loop else buffer).writeline(kernel.GDC_WAIT)


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
    ):
        yield
