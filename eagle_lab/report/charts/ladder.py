"""Charts of the optimizations: the ladder, the tree sizes, throughput against the batch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go

from eagle_lab.report.charts.style import BLUE, GREEN, GREY, ORANGE, RED, heading, style
from eagle_lab.studies import batches as throughput

DECIDED = {"ADOPT": GREEN, "REVERT": RED, "NO_DIFFERENCE": GREY, "INCONCLUSIVE": GREY}


def ladder(found: dict[str, Any], title: str = "") -> go.Figure:
    """One bar a rung: its cycle in ms, coloured by its verdict against the rung below; the floor as a line.

    title: of what and where, below the heading; a part in brackets at its end goes on a line of its own.
    """
    rungs = [r for r in found["rungs"] if r["cycle_s"]]
    names = [f"{r['change']}<br><sub>{r['strategy']}</sub>" for r in rungs]
    decisions = [r["verdict"]["decision"] if r["verdict"] else "start" for r in rungs]
    least = found["floor"].get("parts", {}).get("cycle", {}).get("seconds")
    over = [f" · {r['cycle_s'] / least:.3g}× floor" if least else "" for r in rungs]
    figure = go.Figure(
        go.Bar(
            y=names, x=[round(1e3 * r["cycle_s"], 3) for r in rungs], orientation="h",
            marker_color=[DECIDED.get(d, BLUE) for d in decisions],
            text=[
                f" {1e3 * r['cycle_s']:.3g} ms{o} · {d.replace('_', ' ')}"
                for r, o, d in zip(rungs, over, decisions, strict=True)
            ],
            textposition="outside", cliponaxis=False, textfont={"size": 12}, hoverinfo="x+y",
        )
    )  # fmt: skip
    if least:
        figure.add_vline(x=1e3 * least, line={"color": ORANGE, "dash": "dash"})
        figure.add_annotation(
            x=1e3 * least, y=1, yref="paper", yanchor="bottom", text=f"floor {1e3 * least:.3g} ms", showarrow=False,
            font={"color": ORANGE}, xanchor="left",
        )  # fmt: skip
    longest = max((1e3 * r["cycle_s"] for r in rungs), default=1.0)
    figure.update_xaxes(
        title=f"median cycle{'' if found.get('in_turn') else ' alone'}, ms",
        range=[0, 2.8 * longest],
    )  # the words stand to the right of the bars
    figure.update_yaxes(autorange="reversed")
    style(figure, 170 + 50 * len(rungs)).update_layout(margin={"t": 95 if title else 75})
    return heading(figure, "A cycle's time, one change at a time", title, most=0)


def tree_sizes(found: Sequence[dict[str, Any]], title: str = "") -> go.Figure:
    """Time over plain decoding's against the number of draft nodes, with intervals; below 1 the tree pays.

    title: of what and where, below the heading.
    """
    sizes = [str(row["total_tokens"]) for row in found]
    verdicts = [row["verdict"] for row in found]
    figure = go.Figure(
        go.Scatter(
            x=sizes, y=[round(v["estimate"], 4) for v in verdicts], mode="markers+text", marker={"size": 11, "color": BLUE},
            text=[f"τ {row['acceptance_length']:.2f}" for row in found], textposition="middle right",
            error_y={
                "type": "data", "symmetric": False, "color": BLUE,
                "array": [round((v["high"] or v["estimate"]) - v["estimate"], 4) for v in verdicts],
                "arrayminus": [round(v["estimate"] - v["low"], 4) for v in verdicts],
            },
        )
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": GREY, "dash": "dash"}, annotation_text="plain decoding")
    figure.update_xaxes(title="draft nodes", type="category", range=[-0.4, len(found) - 0.4])
    figure.update_yaxes(title="time / plain's", rangemode="tozero")
    style(figure, 380).update_layout(margin={"t": 95 if title else 75})
    return heading(figure, "Time of EAGLE-3 over plain decoding's, by tree size", title)


def batches(found: Sequence[dict[str, Any]], title: str = "") -> go.Figure:
    """Tokens a second (left) and seconds of a whole decode (right) against the batch size, both ways; where speculative
    decoding is no longer shown to be faster, a line.

    title: of what and where, below the heading.
    """
    figure = go.Figure()
    at = [str(row["batch"]) for row in found]
    for name, key, paint in (("EAGLE-3", "eagle", BLUE), ("plain", "plain", GREY)):
        speed = [round(row[f"{key}_tokens_per_s"], 2) for row in found]
        latency = [round(median(row[f"{key}_s"]), 3) for row in found]
        line = {"color": paint}
        figure.add_scatter(x=at, y=speed, name=name, mode="lines+markers", line=line, xaxis="x", yaxis="y")
        figure.add_scatter(
            x=at,
            y=latency,
            name=name,
            mode="lines+markers",
            line=line,
            xaxis="x2",
            yaxis="y2",
            showlegend=False,
        )
    style(figure, 380)
    end = throughput.crossing(found)
    if end is not None:
        place = at.index(str(end))  # a shape's own "16" would be the sixteenth category
        for x in ("x", "x2"):
            figure.add_shape(
                type="line", x0=place, x1=place, xref=x, y0=0, y1=1, yref="paper", line={"color": ORANGE, "dash": "dash"}
            )  # fmt: skip
        # in the legend, where no line runs through it
        name = "from here on EAGLE-3 is not shown to be faster"
        figure.add_scatter(
            x=[None], y=[None], name=name, mode="lines", line={"color": ORANGE, "dash": "dash"}
        )
    figure.update_layout(
        margin={"t": 110 if title else 80},
        xaxis={"domain": [0, 0.44], "title": "batch", "type": "category"},
        xaxis2={"domain": [0.56, 1], "title": "batch", "type": "category", "anchor": "y2", "gridcolor": "rgba(128,128,128,0.25)"},
        yaxis={"title": "new tokens a second", "rangemode": "tozero"},
        yaxis2={
            "title": "seconds of a decode", "rangemode": "tozero", "anchor": "x2", "gridcolor": "rgba(128,128,128,0.25)"
        },
    )  # fmt: skip
    return heading(figure, "Throughput and latency against the batch", title)
