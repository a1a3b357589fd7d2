"""How a step is run: called as it is, compiled, replayed from a CUDA graph, or compiled in regions and then replayed.

A step is a function without arguments. It reads and writes the same tensors at every call and returns the same kind of
thing: one decoding cycle over a fixed state. `eager` calls it. `compile` traces it whole with torch.compile: minutes, and
one break in the trace is an error, never a quiet return to eager. `cuda_graph` records its kernels once and replays
them with a single launch: it needs a CUDA GPU, fixed shapes and no wait for the host. `compile+cuda_graph` (REGIONAL)
records a step whose repeated parts are compiled: seconds, and all that is lost against the whole is fusion across their
borders. A region is compiled for one row's sizes, or once for all batches of more rows, whose sizes it leaves open; where
products are early, once for each way in which they are cut.

Tested without a GPU: that the step it would record runs twice on the same buffers with eager's results, that nothing
in it waits for the host, and that the regions compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch._inductor.config
import torch.fx.experimental._config
from torch import Tensor

from eagle_lab.runtime.checks import first_line
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.early_launch import early_launches
from eagle_lab.runtime.graphs import CaptureError, pool_bytes, record

REGIONAL = "compile+cuda_graph"
RUNTIMES = ("eager", "compile", "cuda_graph", REGIONAL)
Step = Callable[[], Any]

# For each model, tree and window one compiled step or two compiled layers; a comparison over several prompts makes a few.
MAX_COMPILED = 128


@lru_cache
def _region(function: Callable[..., Any], any_size: bool) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=any_size)


def compiled_if(name: str, function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """A part of the step, compiled where the runtime compiles in regions: for one row's sizes alone, or once for any number
    of rows above."""
    return _region(function, rows > 1) if name == REGIONAL else function


def only_rows_vary(*tensors: Tensor) -> None:
    """What is compiled for any number of rows, the first size of these tensors, takes their other sizes as they are.

    Each size that it leaves open costs it seconds.
    """
    for tensor in tensors:
        torch._dynamo.mark_static(tensor, list(range(1, tensor.dim())))


@dataclass(frozen=True)
class Prepared:
    """A step made ready: `run` gives the step's result; seconds to prepare; bytes of device memory that its graph keeps."""

    run: Callable[..., Any]
    seconds: float
    bytes: int


def fixed(name: str) -> bool:
    """Whether a runtime wants one shape for all cycles: a window of the cache that does not grow with the text."""
    return name != "eager"


def prepare(
    name: str, step: Step, reset: Callable[[], None], device: torch.device, pool: Any = None
) -> Prepared:
    """Make a step ready under a runtime with fixed shapes.

    `reset` brings the state back to where a step may start, as preparing calls the step; `pool` is the memory pool
    that several graphs share (torch.cuda.graph_pool_handle()).
    Raises: RuntimeError with one sentence where the step cannot be traced or captured.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that the graph's memory isn't what others have left
    start = now(device)
    made = _compiled(step) if name == "compile" else step

    def twice() -> None:
        # the first call of what is compiled sets up what may ask for a second trace
        for _ in range(2):
            reset()
            made()
        reset()

    with _compiling(device) if "compile" in name else nullcontext():
        try:
            if "cuda_graph" in name:
                before = pool_bytes(pool) if pool is not None else 0
                run, pool = _captured(made, twice, device, pool)
                taken = pool_bytes(pool) - before
            else:
                twice()
                run, taken = made, 0
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"runtime={name}: the cycle cannot be compiled: {first_line(error)}"
            ) from error
    reset()
    return Prepared(run, (now(device) - start) / 1e9, taken)


@contextmanager
def _compiling(device: torch.device) -> Iterator[None]:
    # small kernels that don't depend on each other become one
    options = {"combo_kernels": True} if device.type == "cuda" else {}
    with (
        never_quietly_eager(),
        only_sizes_open(),
        torch._inductor.config.patch(options),
        early_launches(device),
    ):
        yield


@contextmanager
def only_sizes_open() -> Iterator[None]:
    """Inside, what is compiled for any size of its tensors takes whole numbers, such as a window, as they are, and two sizes
    that are equal by chance, such as rows and nodes, as two."""
    symbols: Any = torch.fx.experimental._config
    with torch._dynamo.config.patch(specialize_int=True), symbols.patch(use_duck_shape=False):
        yield


def never_quietly_eager() -> Any:
    """Inside, there may be as many compilations as the package needs, and one more is an error.

    The limit counts those of one function, such as all steps or all layers; past it torch would go back to eager.
    """
    return torch._dynamo.config.patch(recompile_limit=MAX_COMPILED, fail_on_recompile_limit_hit=True)


def _compiled(step: Step) -> Step:
    traced = torch.compile(step, fullgraph=True, dynamic=False)

    def run() -> Any:
        with never_quietly_eager():
            return traced()

    return run


def _captured(
    step: Step, warm: Callable[[], None], device: torch.device, pool: Any
) -> tuple[Step, tuple[int, int]]:
    """Record the step's kernels once, after `warm` → its replay, which rewrites the tensors that the recorded call returned;
    its pool."""
    try:
        graph, outcome = record(step, warm, device, pool)
    except CaptureError as error:
        raise RuntimeError(
            f"this cannot be captured in a CUDA graph, as something in it waits for the host: {first_line(error)}"
        ) from error

    def replay() -> Any:
        graph.replay()
        return outcome

    return replay, graph.pool()
