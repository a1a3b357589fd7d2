"""Charts of the optimizations: the ladder, the tree sizes, throughput against the batch, a cycle against its prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    heading,
    style,
    two_lines,
    whiskers,
)
from eagle_lab.report.words import plain
from eagle_lab.studies.ladder import Ladder, TreeSize
from eagle_lab.studies.scaling import Batch, ContextsRecord

DECIDED = {"ADOPT": GREEN, "REVERT": RED, "NO_DIFFERENCE": GREY, "INCONCLUSIVE": GREY}


def ladder(found: Ladder, title: str = "") -> go.Figure:
    """One bar a rung: its cycle in ms on a logarithmic axis, coloured by its verdict; the floor as a line.

    title: of what and where, below the heading; a part in brackets at its end goes on a line of its own.
    """
    rungs = [r for r in found.rungs if r.cycle_s]
    took = [1e3 * r.cycle_s for r in rungs if r.cycle_s]
    least = 1e3 * found.floor_s if found.floor_s else None
    decisions = [r.verdict.decision if r.verdict else "start" for r in rungs]
    over = [f" · {plain(ms / least)}× floor" if least else "" for ms in took]
    told = zip(took, over, decisions, strict=True)
    figure = go.Figure(go.Bar(
        y=[two_lines(r.change, r.strategy) for r in rungs], x=[round(ms, 3) for ms in took], orientation="h",
        marker_color=[DECIDED.get(d, BLUE) for d in decisions],
        text=[f" {plain(ms)} ms{o} · {d.replace('_', ' ')}" for ms, o, d in told], textposition="outside",
        cliponaxis=False, textfont={"size": 12}, hoverinfo="x+y",
    ))  # fmt: skip
    low, high = min([*took, least or math.inf]), max(took, default=1.0)
    if least:
        figure.add_vline(x=least, line={"color": ORANGE, "dash": "dash"})
        figure.add_annotation(
            x=math.log10(least), y=1, yref="paper", yanchor="bottom", text=f"floor {plain(least)} ms", showarrow=False,
            font={"color": ORANGE}, xanchor="left",
        )  # fmt: skip
    start = math.log10(low / 1.5)
    ends = math.log10(high) - start
    ticks = [n * 10.0**power for power in range(-4, 5) for n in ((1, 3) if ends > 1.5 else (1, 2, 5))]
    figure.update_xaxes(
        title=f"median cycle{'' if found.in_turn else ' alone'}, ms (logarithmic)",
        type="log",
        tickvals=[tick for tick in ticks if tick <= high],
        ticktext=[plain(tick, 1) for tick in ticks if tick <= high],
        range=[start, math.log10(high) + 0.9 * max(ends, 0.5)],  # the words stand to the right of the bars
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)  # the words stand where the lines would be
    style(figure, 170 + 50 * len(rungs)).update_layout(margin={"t": 95 if title else 75})
    return heading(figure, "A cycle's time, one change at a time", title, most=0)


def tree_sizes(found: Sequence[TreeSize], title: str = "") -> go.Figure:
    """Time over plain decoding's against the number of draft nodes, with intervals; below 1 the tree pays.

    title: of what and where, below the heading.
    """
    sizes, verdicts = [str(row.total_tokens) for row in found], [row.verdict for row in found]
    figure = go.Figure(go.Scatter(
        x=sizes, y=[round(v.estimate, 4) for v in verdicts], mode="markers+text", marker={"size": 11, "color": BLUE},
        name="EAGLE-3", text=[f"  τ {row.acceptance_length:.2f}" for row in found], textposition="middle right",
        error_y=whiskers((v.interval for v in verdicts), color=BLUE),
    ))  # fmt: skip
    line = {"color": GREY, "dash": "dash"}
    figure.add_hline(y=1, line=line)
    figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name="plain decoding")
    figure.update_xaxes(title="draft nodes", type="category", range=[-0.4, len(found) - 0.4])
    figure.update_yaxes(title="time / plain's", rangemode="tozero")
    style(figure, 380).update_layout(margin={"t": 115 if title else 90})
    return heading(figure, "Time of EAGLE-3 over plain decoding's, by tree size", title)


def batches(found: Sequence[Batch], title: str = "") -> go.Figure:
    """Against the batch size: tokens a second, seconds of a whole decode, and time over plain decoding's with intervals.

    title: of what and where, below the heading. Where trees differ, their nodes stand below the batch.
    """
    several = len({row.total_tokens for row in found}) > 1
    at = [two_lines(str(row.batch), str(row.total_tokens)) if several else str(row.batch) for row in found]
    figure = make_subplots(1, 3, horizontal_spacing=0.1)
    ways = (
        ("EAGLE-3", BLUE, [row.eagle_rate for row in found], [row.eagle_decode_s for row in found]),
        ("plain", GREY, [row.plain_rate for row in found], [row.plain_decode_s for row in found]),
    )
    for name, paint, *values in ways:
        for column, each in enumerate(values, 1):
            figure.add_scatter(
                x=at, y=[round(x, 3) for x in each], name=name, mode="lines+markers", line={"color": paint},
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    figure.add_scatter(
        x=at, y=[round(row.ratio[1], 4) for row in found], mode="markers", marker={"color": BLUE, "size": 9},
        error_y=whiskers((row.ratio for row in found), color=BLUE), showlegend=False, row=1, col=3,
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": INK, "dash": "dash"}, row=1, col=3)
    figure.update_xaxes(title="batch, below it draft nodes" if several else "batch", type="category")
    titles = ("new tokens a second", "seconds of a decode", "time / plain's")
    for column, words in enumerate(titles, 1):
        figure.update_yaxes(title=words, rangemode="tozero", row=1, col=column)
    style(figure, 380).update_layout(margin={"t": 110 if title else 80})
    return heading(figure, "Throughput and latency against the batch", title)


def contexts(record: ContextsRecord, title: str = "") -> go.Figure:
    """Against the prefix: the medians of a cycle and of a plain step with their quartiles, beside their floors, and how many
    times as fast as plain decoding that makes EAGLE-3.

    title: of what and where, below the heading.
    """
    rows = record.contexts
    figure, at = make_subplots(1, 2, horizontal_spacing=0.12), [f"{row.prefix:,}" for row in rows]
    ways = (
        ("EAGLE-3 cycle", BLUE, [row.eagle for row in rows], [row.floor_s for row in rows]),
        ("plain step", GREY, [row.plain for row in rows], [row.plain_floor_s for row in rows]),
    )
    for name, paint, turns, least in ways:
        ends = [
            (low * 1e3, middle * 1e3, high * 1e3) for low, middle, high in (one.quartiles for one in turns)
        ]
        figure.add_scatter(
            x=at, y=[round(middle, 4) for _, middle, _ in ends], name=name, mode="lines+markers", line={"color": paint},
            error_y=whiskers(ends, color=paint), row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=at, y=[round(s * 1e3, 4) if s else None for s in least], name=f"floor of the {name.split()[-1]}", mode="lines",
            line={"color": paint, "dash": "dash"}, row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(
        x=at, y=[round(record.speed(row), 4) for row in rows], mode="lines+markers", line={"color": BLUE},
        showlegend=False, row=1, col=2,
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": INK, "dash": "dash"}, row=1, col=2)
    figure.update_xaxes(title="tokens before the cycle", type="category")
    for column, words in enumerate(("median, ms", "times plain's speed"), 1):
        figure.update_yaxes(title=words, rangemode="tozero", row=1, col=column)
    style(figure, 380).update_layout(margin={"t": 110 if title else 80})
    return heading(figure, "A cycle against the length of its prefix", title)
