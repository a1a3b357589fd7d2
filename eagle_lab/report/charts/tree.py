"""A cycle as a picture: its draft tree and the tree mask beside it; and a tree that a mask builder gets wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from eagle_lab.decode.generate import Cycle
from eagle_lab.report.charts.style import BLUE, BONUS, GREY, INK, RED, depth_colour, faint, style

ROW_HEIGHT = 15  # pixels a leaf needs so that labels don't touch


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it reads in a label: blanks and line ends visible, short; its id without a tokenizer."""
    if tokenizer is None:
        return f"#{token}"
    text = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥")
    shown = text.replace(" ", "·") if text != text.strip() or not text else text
    return shown if len(shown) <= 10 else shown[:9] + "…"


def accepted_path(cycle: Cycle) -> list[int]:
    """The nodes that the cycle accepted, root first: siblings differ in their token, so the tokens name the path."""
    path = [0]
    for token in cycle.committed[1:]:
        path.append(
            next(i for i, p in enumerate(cycle.parents) if p == path[-1] and cycle.tokens[i] == token)
        )
    return path


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
    parents: Sequence[int], depths: Sequence[int], rows: Sequence[float], nodes: Sequence[int], gaps: Sequence[float]
) -> dict[str, list[Any]]:  # fmt: skip
    """Lines from each node's parent; `gaps` [n + 1] leave room for the parent's label, in levels."""
    x: list[Any] = []
    y: list[Any] = []
    for node in nodes:
        parent = parents[node]
        if parent >= 0:
            x += [depths[parent] + gaps[parent], depths[node] - 0.12, depths[node], None]
            y += [rows[parent], rows[node], rows[node], None]
    return {"x": x, "y": y}


def tree_height(parents: Sequence[int]) -> int:
    """Pixels that a tree needs to be read."""
    return max(360, round(ROW_HEIGHT * (2 + max(places(parents)))) + 110)  # a row more for the bonus token


def tree_traces(cycle: Cycle, tokenizer: Any = None, width: int = 640) -> list[go.Scatter]:
    """The draft tree's traces: edges, the accepted path, and all nodes (the one named "nodes", in order).

    width: pixels that the drawing has, about; the edges leave room for the labels.
    """
    path = accepted_path(cycle)
    on_path = set(path)
    rows = places([*cycle.parents, path[-1]])  # the bonus token has a row of its own, like one more child
    chances = [1.0, *(2.718281828**score for score in cycle.scores)]
    labels = [token_text(tokenizer, token) for token in cycle.tokens]
    crowded = len(cycle.tokens) > 100
    last = path[-1]
    bonus = token_text(tokenizer, cycle.bonus)
    everyone = range(len(cycle.tokens))
    level = width / (_right(cycle) + 0.4)  # pixels from one depth to the next
    gaps = [
        0.0 if crowded else min((14 + (8 if i in on_path else 6) * len(labels[i])) / level, 0.8)
        for i in everyone
    ]
    shared = {"showlegend": False, "mode": "lines", "hoverinfo": "skip"}
    return [
        go.Scatter(
            **edges(cycle.parents, cycle.depths, rows, everyone, gaps),
            line={"color": faint(GREY, 0.5), "width": 1},
            **shared,
        ),
        go.Scatter(
            **edges(cycle.parents, cycle.depths, rows, path, gaps),
            line={"color": BLUE, "width": 3},
            **shared,
        ),
        go.Scatter(
            x=[cycle.depths[last] + 1],
            y=[rows[-1]],
            mode="markers+text",
            marker={"color": BONUS, "symbol": "star", "size": 14},
            text=[f"<b>{bonus}</b>"],
            textposition="middle right",
            textfont={"size": 12},
            hovertemplate=f"<b>{bonus}</b><br>bonus: the target's own token after the path<extra></extra>",
            showlegend=False,
        ),
        go.Scatter(
            name="nodes",
            x=list(cycle.depths),
            y=rows[:-1],
            mode="markers+text",
            marker={
                "size": [round(6 + 14 * chance**0.5, 1) for chance in chances],
                "color": [
                    depth_colour(d) if i in on_path else faint(GREY, 0.75) for i, d in enumerate(cycle.depths)
                ],
                "line": {"width": [2 if i in on_path else 0 for i in everyone], "color": INK},
                "opacity": 1,
            },
            text=[f"<b>{t}</b>" if i in on_path else "" if crowded else t for i, t in enumerate(labels)],
            textposition="middle right",
            textfont={"size": [12 if i in on_path else 10 for i in everyone], "color": INK},
            customdata=[_told(cycle, i, i in on_path, chances[i]) for i in everyone],
            hovertemplate="<b>%{customdata}</b><extra></extra>"
            if crowded
            else "<b>%{text}</b><br>%{customdata}<extra></extra>",
            showlegend=False,
        ),
    ]


def _told(cycle: Cycle, node: int, accepted: bool, chance: float) -> str:
    if node == 0:
        return "root: the last committed token"
    state = "accepted" if accepted else "rejected"
    return f"node {node}, depth {cycle.depths[node]}, {state}<br>probability of its path {chance:.2g}"


def heatmap_trace(cycle: Cycle) -> go.Heatmap:
    """The tree mask int [n + 1, n + 1] from the parents: 1 where row may attend to column, 2 on the accepted path's rows."""
    path = set(accepted_path(cycle))
    mask: list[list[int]] = []
    for node, parent in enumerate(cycle.parents):
        row = [min(seen, 1) for seen in mask[parent]] if parent >= 0 else [0] * len(cycle.parents)
        row[node] = 1
        mask.append([2 * seen if node in path else seen for seen in row])
    return mask_trace(mask, [[0, faint(GREY, 0.08)], [0.5, faint(GREY, 0.75)], [1, BLUE]])


def mask_trace(z: list[list[int]], colours: list[list[Any]]) -> go.Heatmap:
    """A mask as a heatmap of whole numbers from 0 to 2 with a colour for each."""
    gap = 1 if len(z) <= 130 else 0
    told = "row: node %{y}<br>column: node %{x}<extra></extra>"
    return go.Heatmap(
        z=z, zmin=0, zmax=2, colorscale=colours, showscale=False, xgap=gap, ygap=gap, hovertemplate=told
    )


def _right(cycle: Cycle) -> float:
    return max(*cycle.depths, len(cycle.committed) - 0.4) + 1.1


def _dress_tree(figure: go.Figure, cycle: Cycle, **where: int) -> None:
    right = _right(cycle)
    figure.update_xaxes(
        title="depth (tokens after the root)",
        dtick=1,
        range=[-0.4, right],
        showgrid=False,
        zeroline=False,
        **where,
    )
    figure.update_yaxes(visible=False, autorange="reversed", zeroline=False, **where)


def _dress_mask(figure: go.Figure, nodes: int, **where: int) -> None:
    figure.update_xaxes(
        title="may attend to node", range=[-0.5, nodes - 0.5], showgrid=False, zeroline=False, **where
    )
    figure.update_yaxes(title="node", range=[nodes - 0.5, -0.5], showgrid=False, zeroline=False, **where)


def _title(cycle: Cycle, number: int | None) -> str:
    which = "Cycle" if number is None else f"Cycle {number}"
    count = len(cycle.committed) - 1
    return f"{which}: {count} of {len(cycle.parents) - 1} drafted tokens accepted, and the bonus"


def tree_figure(cycle: Cycle, tokenizer: Any = None, number: int | None = None) -> go.Figure:
    """The draft tree: a node's size is the probability of its path, accepted ones coloured by depth, rejected ones grey."""
    figure = go.Figure(tree_traces(cycle, tokenizer))
    _dress_tree(figure, cycle)
    figure.update_layout(title=_title(cycle, number))
    return style(figure, tree_height(cycle.parents))


def mask_heatmap(cycle: Cycle) -> go.Figure:
    """The tree mask of a cycle; the accepted path's rows are blue."""
    figure = go.Figure(heatmap_trace(cycle))
    _dress_mask(figure, len(cycle.parents))
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    figure.update_layout(title="Tree mask: what each node may attend to, accepted path in blue")
    return style(figure, 460)


def cycle_figure(cycle: Cycle, tokenizer: Any = None, number: int | None = None) -> go.Figure:
    """Tree and mask side by side, with the parents as the layout's meta, for `link_script`."""
    figure = make_subplots(1, 2, column_widths=[0.6, 0.4], horizontal_spacing=0.07)
    for trace in tree_traces(cycle, tokenizer, 470):
        figure.add_trace(trace, 1, 1)
    figure.add_trace(heatmap_trace(cycle), 1, 2)
    _dress_tree(figure, cycle, row=1, col=1)
    _dress_mask(figure, len(cycle.parents), row=1, col=2)
    figure.update_layout(title=_title(cycle, number), meta={"parents": list(cycle.parents)})
    return style(figure, tree_height(cycle.parents))


@cache
def _link() -> str:
    return files("eagle_lab.report.charts").joinpath("tree_link.js").read_text(encoding="utf-8")


def link_script(mark: str) -> str:
    """HTML that links the halves of the `cycle_figure` shown beside it in the same output; `mark` is a unique id.

    The mouse on a row of the mask, or on a node of the tree, lights up the node's path and its row.
    """
    call = f"({_link()})({json.dumps(mark)}, {json.dumps(RED)});"
    return f'<span id="{mark}"></span><script>{call}</script>'


def failure_figure(parents: Sequence[int], expected: Tensor, actual: Tensor | None, name: str) -> go.Figure:
    """A tree that a builder gets wrong, the expected mask and the builder's own, wrong entries in red.

    Args: parents of nodes 1…n; masks bool [n + 1, n + 1].
    """
    links = (-1, *parents)
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    rows, nodes = places(links), len(links)
    titles = [
        "the tree",
        "expected mask",
        f"{name}'s mask, errors red" if actual is not None else f"{name} gave no mask to draw",
    ]
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.08)
    line = {"color": GREY, "width": 1}
    figure.add_scatter(
        **edges(links, depths, rows, range(nodes), [0.0] * nodes),
        mode="lines",
        line=line,
        hoverinfo="skip",
        row=1,
        col=1,
    )
    label = {"text": [str(i) for i in range(nodes)], "mode": "markers+text", "textfont": {"color": "white"}}
    figure.add_scatter(
        x=depths,
        y=rows,
        marker={"size": 22, "color": BLUE},
        hovertemplate="node %{text}<extra></extra>",
        **label,
        row=1,
        col=1,
    )
    plain = [[0, faint(GREY, 0.08)], [0.5, faint(GREY, 0.8)], [1, RED]]
    figure.add_trace(mask_trace(expected.int().tolist(), plain), 1, 2)
    if actual is not None:
        wrong = (actual != expected).int()
        figure.add_trace(mask_trace((actual.int() * (1 - wrong) + 2 * wrong).tolist(), plain), 1, 3)
    figure.update_xaxes(dtick=1, title="depth", row=1, col=1)
    figure.update_yaxes(visible=False, autorange="reversed", row=1, col=1)
    for col in (2, 3):
        _dress_mask(figure, nodes, row=1, col=col)
    figure.update_layout(showlegend=False)
    return style(figure, max(320, tree_height(links)))
