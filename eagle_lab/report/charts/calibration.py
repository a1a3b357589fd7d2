"""The charts of calibrate.ipynb: how often each design errs, what it finds, and what short runs found."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.report.calibration import rate
from eagle_lab.report.charts.style import BLUE, GREEN, GREY, INK, ORANGE, SKY, style
from eagle_lab.report.words import signed_percent
from eagle_lab.verdict.calibration import (
    BIASED,
    CYCLES,
    CYCLES_HERE,
    FIVE_FORKS,
    ONE_FORK,
    CalibrationRecord,
    findings,
)

PAINTS = {
    ONE_FORK.name: SKY,
    FIVE_FORKS.name: BLUE,
    BIASED.name: ORANGE,
    CYCLES.name: GREEN,
    CYCLES_HERE.name: GREEN,
}
PANELS = {
    "coverage": "95% interval covers",
    "false_verdicts": "false verdicts, A = B",
    "power_2": "power at a true 2%",
}


def designs_figure(rows: Sequence[dict]) -> go.Figure:
    """Coverage, false verdicts and power at 2% of every design, in three panels.

    Args: rows: of `simulate.tabulate`.
    """
    figure = make_subplots(
        1, 3, shared_yaxes=True, subplot_titles=list(PANELS.values()), horizontal_spacing=0.05
    )
    names = ["<br>".join(textwrap.wrap(row["design"], 30)) for row in rows]
    for column, metric in enumerate(PANELS, 1):
        shares = [row[metric] for row in rows]
        figure.add_bar(
            y=names, x=[0 if share is None else round(100 * share, 2) for share in shares], orientation="h",
            text=["no interval" if row[metric] is None else rate(row, metric) for row in rows], textposition="outside",
            cliponaxis=False, marker={"color": [PAINTS.get(row["design"], GREY) for row in rows]},
            hovertemplate="%{y}: %{x}%<extra></extra>", showlegend=False, row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(
            range=[0, 125], tickvals=[0, 50, 100], ticksuffix="%", title="share of runs", row=1, col=column
        )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11})
    figure.update_layout(title="Every design under the same noise", bargap=0.3)
    return style(figure, 640).update_layout(margin={"t": 95})


def runs_figure(record: CalibrationRecord) -> go.Figure:
    """Each run's estimate and interval for each planted delay, sorted; a panel a load, a line at what the delay came to.

    The planted seconds are more of a cycle than was asked for where the cycles of a run were fast.
    """
    loads = list(dict.fromkeys(run.load for run in record.runs))
    titles = [f"one core busy {load:.0%} of the time" if load else "quiet" for load in loads]
    figure = make_subplots(
        1, max(1, len(loads)), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04
    )
    for column, load in enumerate(loads, 1):
        each = findings(record, load)
        for n, planted in enumerate(record.settings.planted):
            here = sorted((f for f in each if f.planted == planted), key=lambda f: f.verdict.estimate)
            paint = (GREY, SKY, BLUE, ORANGE)[n % 4]
            place = [n + 0.8 * (k + 0.5) / max(1, len(here)) for k in range(len(here))]
            figure.add_scatter(
                x=place, y=[round(f.verdict.estimate, 5) for f in here], mode="markers", showlegend=False,
                marker={"color": paint, "size": 5},
                error_y={
                    "array": [round(f.verdict.high - f.verdict.estimate, 5) for f in here],
                    "arrayminus": [round(f.verdict.estimate - f.verdict.low, 5) for f in here],
                    "thickness": 1, "width": 0,
                },
                hovertemplate="%{y:.4f}<extra></extra>", row=1, col=column,
            )  # fmt: skip
            truth = round(fmean(f.truth for f in here), 5) if here else None
            figure.add_scatter(
                x=[n, n + 0.8], y=[truth] * 2, mode="lines", line={"color": INK, "width": 1}, showlegend=False,
                hoverinfo="skip", row=1, col=column,
            )  # fmt: skip
        names = [signed_percent(p) if p else "nothing" for p in record.settings.planted]
        figure.update_xaxes(
            tickvals=[n + 0.4 for n in range(len(names))], ticktext=names, zeroline=False, row=1, col=column
        )
    figure.update_yaxes(title="found: time over the baseline's", tickformat=".3~f", col=1)
    figure.update_layout(title="What short runs found of a planted delay, with 95% intervals")
    return style(figure, 420)
