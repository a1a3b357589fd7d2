"""Time: the host's clock, the only synchronise of the package, and the type of what times a stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter_ns

import torch

Span = Callable[[str], AbstractContextManager[None]]

_NOTHING = nullcontext()


def no_span(name: str) -> AbstractContextManager[None]:
    """The span of a run that isn't instrumented: records nothing."""
    return _NOTHING


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device | str) -> int:
    """Host time in nanoseconds once the device is idle."""
    synchronise(device)
    return perf_counter_ns()
