"""What a choice needs of a machine, and the sentence that says what is missing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from eagle_lab.runtime.early_launch import refusal
from eagle_lab.runtime.kernels import interpreted


@dataclass(frozen=True)
class Needs:
    """What must be there. Nothing by default.

    device: the type of the device; package: a package that can be imported; interpreter: Triton's interpreter does in
    place of the device; compiler: a C++ compiler, where the device is the CPU; early_launch: see `early_launch`; capability: the
    least compute capability of the device, where that is a CUDA GPU.
    """

    device: str = ""
    package: str = ""
    interpreter: bool = False
    compiler: bool = False
    early_launch: bool = False
    capability: tuple[int, int] | None = None


def missing(what: str, needs: Needs, device: torch.device | str) -> str | None:
    """Why `what` cannot run on a device, in one sentence without its full stop; None where it can."""
    kind = torch.device(device).type
    if needs.device == "cpu" != kind:
        return f"{what} is for a CPU, but the device is {device}"
    if needs.device and kind != needs.device and not (needs.interpreter and interpreted()):
        hint = " (set TRITON_INTERPRET=1 to run Triton's interpreter)" if needs.interpreter else ""
        return f"{what} needs a {needs.device.upper()} GPU, but the device is {device}{hint}"
    if needs.package and find_spec(needs.package) is None:
        return f"{what} needs the package {needs.package}, which is not installed"
    if needs.compiler and kind == "cpu" and _compiler() is None:
        return f"{what} needs a C++ compiler on the CPU, and neither $CXX nor g++ nor clang++ is here"
    if needs.early_launch and torch.cuda.is_available() and (reason := refusal(torch.device(device))):
        return f"{what} {reason}"
    if needs.capability and kind == "cuda" and torch.cuda.is_available():
        own = torch.cuda.get_device_capability(device)
        if own < needs.capability:
            wanted, has = (".".join(map(str, version)) for version in (needs.capability, own))
            return f"{what} needs a GPU of compute capability {wanted} or newer, and {device} has {has}"
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)
