"""Where the nodes of a draft tree stand in a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def places(parents: Sequence[int]) -> list[float]:
    """A row for each node, parents [n + 1] with -1 for the root: leaves one below the other, a parent amid its children."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    rows, leaves, order = [0.0] * len(parents), 0, [0]
    for node in order:
        order += children.get(node, [])
    leaf_row = {}
    stack = [0]
    while stack:
        node = stack.pop()
        if node not in children:
            leaf_row[node] = leaves
            leaves += 1
        stack += reversed(children.get(node, []))
    for node in reversed(order):
        below = children.get(node)
        rows[node] = (rows[below[0]] + rows[below[-1]]) / 2 if below else float(leaf_row[node])
    return rows


def edges(
    parents: Sequence[int],
    depths: Sequence[int],
    rows: Sequence[float],
    nodes: Sequence[int],
    gaps: Sequence[float],
) -> dict[str, list[Any]]:
    """Lines from each node's parent; `gaps` [n + 1] leave room for the parent's label, in levels."""
    x: list[Any] = []
    y: list[Any] = []
    for node in nodes:
        parent = parents[node]
        if parent >= 0:
            x += [depths[parent] + gaps[parent], depths[node] - 0.12, depths[node], None]
            y += [rows[parent], rows[node], rows[node], None]
    return {"x": x, "y": y}
