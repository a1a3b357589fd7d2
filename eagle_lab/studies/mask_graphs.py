"""Mask builders inside a captured CUDA graph: the time of one build, and the least that anything takes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eagle_lab.decode.masks import MASK_BUILDERS, build_all
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.graphs import record

GRAPH_BUILDS = 16  # trees built in one captured graph, so that starting the graph is not what is measured


def graph_seconds(build: Callable[[Tensor], Tensor], items: Sequence[Tensor], repeats: int) -> list[float]:
    """Seconds a build inside a captured graph of GRAPH_BUILDS builds of different trees, one number a replay.

    Args: items: parents int64 [n]. Raises RuntimeError where a replayed mask is wrong.
    """
    chosen = [items[i % len(items)].clone() for i in range(GRAPH_BUILDS)]
    graph, made = captured(build, chosen)
    graph.replay()
    for item, mask in zip(chosen, made, strict=True):
        if not torch.equal(mask, build_all(MASK_BUILDERS["rebuild"], item)):
            raise RuntimeError("the captured graph's mask differs from rebuild's")
    return [seconds / GRAPH_BUILDS for seconds in replays(graph, repeats, items[0].device)]


def captured(
    build: Callable[[Tensor], Tensor], chosen: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """One graph that builds once for each of the tensors (parents int64 [n] or [B, n]), and the tensors, bool masks
    [n + 1, n + 1] or [B, n + 1, n + 1], that each replay writes anew. Raises RuntimeError for what no graph can hold."""

    def builds() -> list[Tensor]:
        return [build(item) for item in chosen]

    return record(builds, builds, chosen[0].device)


def replays(graph: torch.cuda.CUDAGraph, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each replay of a graph, by events around it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(repeats):
        first.record()
        graph.replay()
        last.record()
        now(device)
        found.append(first.elapsed_time(last) / 1e3)
    return found


def graph_floor(device: torch.device, repeats: int = 50) -> float:
    """Seconds of the smallest kernel inside a captured graph: one addition, GRAPH_BUILDS times a graph."""
    graph, _ = captured(lambda one: one.add_(1), [torch.zeros(1, device=device) for _ in range(GRAPH_BUILDS)])
    graph.replay()
    return sorted(replays(graph, repeats, device))[repeats // 2] / GRAPH_BUILDS
