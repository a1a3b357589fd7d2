"""Tree mask builders timed alone, each against `rebuild` on the same trees, for the first investigation's claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.tree import pool_size, select_nodes
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.verdict.stats import paired_interval

BUILDERS = ("rebuild", "incremental", "incremental_inplace", "doubling")
SIZES = (63, 255, 511, 1023)
SHAPES = ((10, 7), (16, 7))  # top_k, depth: the published one, and one whose pool holds trees of 1,023 nodes

Interval = tuple[float, float, float]  # low, estimate, high


def random_tree(nodes: int, generator: torch.Generator) -> Tensor:
    """Parents int64 [nodes] of a tree that the expansion could have grown, from random probabilities."""
    top_k, depth = next((k, d) for k, d in SHAPES if pool_size(k, d) >= nodes)
    steps = -torch.rand(depth + 1, top_k * top_k, generator=generator).exponential_(generator=generator)
    scores, parents = [steps[0, :top_k].sort(descending=True).values], [torch.full((top_k,), -1)]
    frontier, index = scores[0], torch.arange(top_k)
    for step in range(depth):
        children = (frontier[:, None] + steps[step + 1].view(top_k, top_k)).flatten()
        scores.append(children)
        parents.append(index.repeat_interleave(top_k))
        frontier, chosen = children.topk(top_k)
        index = chosen + top_k + step * top_k * top_k
    return select_nodes(torch.cat(scores)[None], torch.cat(parents)[None], nodes)[1][0]


def time_masks(
    device: torch.device | str,
    builders: Sequence[str] = BUILDERS,
    sizes: Sequence[int] = SIZES,
    iterations: int = 24,
    trees: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Pairs (seconds of `rebuild`, of the builder) of one call, random order in each pair, trees in rotation.

    "rebuild" against itself is the control. Each builder must give `rebuild`'s mask on every tree first (ValueError).
    """
    generator = torch.Generator().manual_seed(seed)
    base, found = MASK_BUILDERS["rebuild"], []
    for size in sizes:
        items = [random_tree(size, generator).to(device) for _ in range(trees)]
        for name in builders:
            build = MASK_BUILDERS[name]
            if not all(torch.equal(build(tree), base(tree)) for tree in items):
                raise ValueError(
                    f"mask builder {name!r} differs from the reference on a tree of {size} nodes."
                )
            took = time_in_pairs(base, build, items, iterations, seed, device, warmup=3)
            samples = [[round(a, 9), round(b, 9)] for a, b in took]
            found.append({"nodes": size, "builder": name, "samples": samples})
    return found


def ratio(masks: list[dict[str, Any]], builder: str, nodes: int) -> Interval:
    """Time of a builder over that of `rebuild` on trees of so many nodes: low, estimate, high."""
    row = next(m for m in masks if m["builder"] == builder and m["nodes"] == nodes)
    base, candidate = zip(*row["samples"], strict=True)
    return paired_interval(base, candidate)


def milliseconds(masks: list[dict[str, Any]], builder: str, nodes: int) -> float:
    """Median time of a call."""
    row = next(m for m in masks if m["builder"] == builder and m["nodes"] == nodes)
    return float(np.median([b for _, b in row["samples"]])) * 1e3


def growth(masks: list[dict[str, Any]], builder: str) -> float:
    """The exponent of a builder's time between the smallest and the largest tree: 1 is O(n), 2 is O(n²)."""
    sizes = sorted({m["nodes"] for m in masks})
    first, last = sizes[0], sizes[-1]
    took = [math.log(milliseconds(masks, builder, n)) for n in (first, last)]
    return (took[1] - took[0]) / math.log((last + 1) / (first + 1))


def clone_part(masks: list[dict[str, Any]], nodes: int) -> float:
    """The part of `incremental`'s time that goes away when its clone does (`incremental_inplace`), as a share."""
    return 1 - milliseconds(masks, "incremental_inplace", nodes) / milliseconds(masks, "incremental", nodes)
