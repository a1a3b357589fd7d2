"""A cycle as a picture: its draft tree and the tree mask beside it; and a tree that a mask builder gets wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eagle_lab.decode.generate import Cycle
from eagle_lab.decode.tree import depths_of
from eagle_lab.report.charts.style import BLUE, BONUS, GREY, INK, RED, depth_colour, faint, style

HIGHEST = 600  # pixels: tree, mask and the slider above them stay on one screen
AROUND = 110  # of a chart's pixels, above and below the drawing
ROW = 15  # pixels a leaf has, where they are few
LINE = 9  # pixels between two labels that don't touch
WIDTH = 560  # pixels that the tree beside its mask has on a narrow page, about
HOVER = {"bgcolor": "#333333", "font": {"color": "#ffffff"}}  # reads whatever the node's colour


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it reads in a label: blanks and line ends visible, short; its id without a tokenizer.

    A token that is no text by itself, as a part of a character is none, is told by its bytes: "<F0 9F>".
    """
    if tokenizer is None:
        return f"#{token}"
    text = tokenizer.decode([token])
    if "\ufffd" in text:
        return _bytes(tokenizer.convert_ids_to_tokens(token))
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    shown = text.replace(" ", "·") if text != text.strip() or not text else text
    return shown if len(shown) <= 10 else shown[:9] + "…"


def _bytes(piece: str) -> str:
    """The bytes of a vocabulary's piece: "<0xF0>" of a byte fallback, or GPT-2's letter for each byte."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return f"<{piece[3:5]}>"
    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return f"<{bytes(of_letter[letter] for letter in piece if letter in of_letter).hex(' ').upper()}>"


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


def tree_height(rows: Sequence[float]) -> int:
    """Pixels of a tree whose nodes stand in these rows."""
    return min(HIGHEST, max(340, round(ROW * (1 + max(rows))) + AROUND))


def rows_of(cycle: Cycle) -> list[float]:
    """The row of each node and, last, of the bonus token, which is like one more child of the path's end."""
    return places([*cycle.parents, accepted_path(cycle)[-1]])


def row_height(rows: Sequence[float]) -> float:
    """Pixels from one row to the next."""
    return (tree_height(rows) - AROUND) / (1 + max(rows))


def label_room(cycle: Cycle, labels: Sequence[str], level: float) -> list[float | None]:
    """How far each node's label may reach, in levels, so that it ends before the lines to the node's children.

    None for a leaf with a row of its own: nothing stands to the right of it. level: pixels from one depth to the next.
    """
    inner, path = set(cycle.parents), set(accepted_path(cycle))
    crowded = row_height(rows_of(cycle)) < LINE
    return [
        min((18 + (8 if i in path else 6) * len(label)) / level, 0.85) if crowded or i in inner else None
        for i, label in enumerate(labels)
    ]


def with_labels(cycle: Cycle) -> set[int]:
    """The nodes whose labels don't touch: the accepted path's, then as many as find room, probable ones first."""
    path, rows = accepted_path(cycle), rows_of(cycle)
    chances, height = [math.inf, *cycle.scores], row_height(rows)
    at: dict[int, list[float]] = {cycle.depths[path[-1]] + 1: [rows[-1]]}
    found = set()
    for node in sorted(range(len(cycle.tokens)), key=lambda i: (i not in path, -chances[i])):
        taken = at.setdefault(cycle.depths[node], [])
        if node in path or all(abs(rows[node] - row) * height >= LINE for row in taken):
            taken.append(rows[node])
            found.add(node)
    return found


def tree_traces(cycle: Cycle, tokenizer: Any = None, width: int = 640) -> list[go.Scatter]:
    """The draft tree's traces: edges, the accepted path, and all nodes (the one named "nodes", in order).

    width: pixels that the drawing has, about; the edges leave room for the labels.
    """
    path = accepted_path(cycle)
    on_path = set(path)
    rows = rows_of(cycle)
    chances = [1.0, *(math.exp(score) for score in cycle.scores)]
    labels = [token_text(tokenizer, token) for token in cycle.tokens]
    labelled = with_labels(cycle)
    least = min(6.0, max(3.0, row_height(rows)))
    last = path[-1]
    bonus = token_text(tokenizer, cycle.bonus)
    everyone = range(len(cycle.tokens))
    room = label_room(cycle, labels, width / (_right(cycle) + 0.25))
    gaps = [(far or 0.0) if i in labelled else 0.0 for i, far in enumerate(room)]
    shared = {"showlegend": False, "mode": "lines", "hoverinfo": "skip"}
    return [
        go.Scatter(
            **edges(cycle.parents, cycle.depths, rows, everyone, gaps), line={"color": faint(GREY, 0.5), "width": 1}, **shared
        ),
        go.Scatter(**edges(cycle.parents, cycle.depths, rows, path, gaps), line={"color": BLUE, "width": 3}, **shared),
        go.Scatter(
            x=[cycle.depths[last] + 1], y=[rows[-1]], mode="markers+text",
            marker={"color": BONUS, "symbol": "star", "size": 14},
            text=[f"<b>{escape(bonus)}</b>"], textposition="middle right", textfont={"size": 12},
            hovertemplate="bonus: the target's own token after the path<extra></extra>", hoverlabel=HOVER, showlegend=False,
        ),
        go.Scatter(
            name="nodes", x=list(cycle.depths), y=rows[:-1], mode="markers+text",
            marker={
                "size": [round(least + (8 + least) * chance**0.5, 1) for chance in chances],
                "color": [depth_colour(d) if i in on_path else faint(GREY, 0.75) for i, d in enumerate(cycle.depths)],
                "line": {"width": [2 if i in on_path else 0 for i in everyone], "color": INK},
                "opacity": 1,
            },
            text=[("<b>{}</b>" if i in on_path else "{}").format(escape(labels[i])) if i in labelled else "" for i in everyone],
            textposition="middle right",
            textfont={"size": [11.5 if i in on_path else 9.5 for i in everyone], "color": INK},
            customdata=[f"<b>{escape(labels[i])}</b><br>{_told(cycle, i, i in on_path, chances[i])}" for i in everyone],
            hovertemplate="%{customdata}<extra></extra>", hoverlabel=HOVER, showlegend=False,
        ),
    ]  # fmt: skip


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
    gap = 1 if len(z) <= 70 else 0
    told = "row: node %{y}<br>column: node %{x}<extra></extra>"
    return go.Heatmap(
        z=z, zmin=0, zmax=2, colorscale=colours, showscale=False, xgap=gap, ygap=gap, hovertemplate=told, hoverlabel=HOVER
    )  # fmt: skip


def _right(cycle: Cycle) -> float:
    return max(*cycle.depths, len(cycle.committed)) + 0.9


def _dress_tree(figure: go.Figure, cycle: Cycle, **where: int) -> None:
    shared = {"showgrid": False, "zeroline": False, **where}
    figure.update_xaxes(title="depth in the tree", dtick=1, range=[-0.25, _right(cycle)], **shared)
    figure.update_yaxes(visible=False, autorange="reversed", zeroline=False, **where)


def _dress_mask(figure: go.Figure, nodes: int, **where: int) -> None:
    """Axes of a square mask whose ticks are nodes."""
    step = next((step for step in (1, 2, 5, 10, 20) if nodes <= 8 * step), 50)
    column = where.get("col", 1)
    shared = {"showgrid": False, "zeroline": False, "dtick": step, "tick0": 0, "constrain": "domain", **where}
    figure.update_xaxes(title="may attend to node", range=[-0.5, nodes - 0.5], **shared)
    figure.update_yaxes(
        title="node", range=[nodes - 0.5, -0.5], scaleanchor=f"x{column if column > 1 else ''}", constraintoward="top", **shared
    )  # fmt: skip


def _title(cycle: Cycle, number: int | None) -> str:
    which = "Cycle" if number is None else f"Cycle {number}"
    count = len(cycle.committed) - 1
    return f"{which}: {count} of {len(cycle.parents) - 1} drafted tokens accepted, and the bonus"


def tree_figure(cycle: Cycle, tokenizer: Any = None, number: int | None = None) -> go.Figure:
    """The draft tree: a node's size is the probability of its path, accepted ones coloured by depth, rejected ones grey."""
    figure = go.Figure(tree_traces(cycle, tokenizer))
    _dress_tree(figure, cycle)
    figure.update_layout(title=_title(cycle, number))
    return style(figure, tree_height(rows_of(cycle)))


def mask_heatmap(cycle: Cycle) -> go.Figure:
    """The tree mask of a cycle; the accepted path's rows are blue."""
    figure = go.Figure(heatmap_trace(cycle))
    _dress_mask(figure, len(cycle.parents))
    figure.update_layout(title="Tree mask: what each node may attend to, accepted path in blue")
    return style(figure, 460)


def cycle_figure(cycle: Cycle, tokenizer: Any = None, number: int | None = None) -> go.Figure:
    """Tree and mask side by side; the layout's meta has the parents and the labels' room, for `link_script`."""
    figure = make_subplots(1, 2, column_widths=[0.68, 0.32], horizontal_spacing=0.06)
    for trace in tree_traces(cycle, tokenizer, WIDTH):
        figure.add_trace(trace, 1, 1)
    figure.add_trace(heatmap_trace(cycle), 1, 2)
    _dress_tree(figure, cycle, row=1, col=1)
    _dress_mask(figure, len(cycle.parents), row=1, col=2)
    figure.update_yaxes(title_text="", row=1, col=2)  # the width is the tree's
    labels = [token_text(tokenizer, token) for token in cycle.tokens]
    room = label_room(cycle, labels, WIDTH / (_right(cycle) + 0.25))
    figure.update_layout(
        title=_title(cycle, number), meta={"parents": list(cycle.parents), "labels": labels, "room": room}
    )
    return style(figure, tree_height(rows_of(cycle))).update_layout(margin={"l": 8, "r": 8})


def link_script(mark: str) -> str:
    """HTML that links the halves of the `cycle_figure` shown beside it in the same output; `mark` is a unique id.

    The mouse on a row of the mask, or on a node of the tree, lights up the node's path and its row.
    """
    link = Path(__file__).with_name("tree_link.js").read_text(encoding="utf-8")
    call = f"({link})({json.dumps(mark)}, {json.dumps(RED)});"
    return f'<span id="{mark}"></span><script>{call}</script>'


def failure_figure(parents: Sequence[int], expected: Tensor, actual: Tensor, name: str) -> go.Figure:
    """A tree that a builder gets wrong, the expected mask and the builder's own, wrong entries in red.

    Args: parents of nodes 1…n; masks bool [n + 1, n + 1].
    """
    links, depths = (-1, *parents), depths_of(parents)
    rows, nodes = places(links), len(links)
    titles = ["the tree", "expected mask", f"{name}'s mask, errors red"]
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.08)
    line = {"color": GREY, "width": 1}
    lines = edges(links, depths, rows, range(nodes), [0.0] * nodes)
    figure.add_scatter(**lines, mode="lines", line=line, hoverinfo="skip", row=1, col=1)
    figure.add_scatter(
        x=depths, y=rows, text=[str(i) for i in range(nodes)], mode="markers+text", textfont={"color": "white"},
        marker={"size": 22, "color": BLUE}, hovertemplate="node %{text}<extra></extra>", row=1, col=1,
    )  # fmt: skip
    plain = [[0, faint(GREY, 0.08)], [0.5, faint(GREY, 0.8)], [1, RED]]
    wrong = (actual != expected).int()
    figure.add_trace(mask_trace(expected.int().tolist(), plain), 1, 2)
    figure.add_trace(mask_trace((actual.int() * (1 - wrong) + 2 * wrong).tolist(), plain), 1, 3)
    figure.update_xaxes(dtick=1, title="depth", row=1, col=1)
    figure.update_yaxes(visible=False, autorange="reversed", row=1, col=1)
    for col in (2, 3):
        _dress_mask(figure, nodes, row=1, col=col)
    figure.update_layout(showlegend=False)
    return style(figure, tree_height(rows))
