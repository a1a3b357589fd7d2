"""GPU kernels, one file each, imported only when chosen: a package they need may be missing.

Tested on an H100; without a GPU the Triton kernels are tested by Triton's interpreter, the CUDA kernel by a compiler and,
thread by thread, on the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eagle_lab.runtime.early_launch import supported

ASSEMBLER = "TRITON_PTXAS_PATH"  # Triton's own name for it


def one_assembler(home: Path) -> None:
    """Have Triton assemble by the ptxas in torch's folder, unless one is named already.

    Inductor does so too, but only in a process that compiles something itself, and Triton's cache keys have the version: a
    process that found all its compiled regions in the cache would compile the kernels here anew, 14 s at the 8B shape.
    """
    ptxas = home / "bin" / "ptxas"
    if os.access(ptxas, os.X_OK):
        os.environ.setdefault(ASSEMBLER, str(ptxas))


one_assembler(Path(torch.__file__).absolute().parent)  # here, as Triton asks for the version once


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU: a check of what they compute, not of their speed."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_start_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs."""
    return supported(device) and not interpreted()


def early_options(early: bool) -> dict[str, bool]:
    """The launch options of a kernel that has a parameter EARLY.

    A kernel that starts early lets the next one start at once, and waits before it touches what may still be written.
    """
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
