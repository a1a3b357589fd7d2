"""Recording a CUDA graph: some calls beforehand on a stream of their own, then one under the recorder.

Source: PyTorch's documented pattern for torch.cuda.graph, https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CaptureError(RuntimeError):
    """A step that no graph can hold: something in it waits for the host, or changes its shapes."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python collects no garbage by itself.

    Old graphs may be garbage: a pair and its sessions refer to each other. Destroying a graph while another is recorded is
    an error of CUDA that ends the recording. Since torch 2.9 none is collected beforehand (pytorch pull request 161037).
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def record(
    step: Callable[[], Any], warm: Callable[[], object], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call of `step`, and what that call returned: tensors that each replay writes anew.

    `warm` is called first, outside the recording: libraries allocate their workspaces, and Triton compiles, in the first
    calls. `pool`: the memory pool that several graphs share. Raises CaptureError where something waits for the host.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        warm()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with no_collection(), torch.cuda.graph(graph, pool=pool):
            outcome = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(str(error)) from error
    return graph, outcome


def pool_bytes(pool: tuple[int, int]) -> int:
    """Bytes of device memory that a pool of graphs holds; `pool` is a graph's, or of torch.cuda.graph_pool_handle()."""
    segments = torch.cuda.memory_snapshot()
    return sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) == tuple(pool))
