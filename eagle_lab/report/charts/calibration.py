"""The charts of calibrate.ipynb: how often each design errs, and what it finds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import BLUE, GREEN, GREY, INK, ORANGE, style
from eagle_lab.verdict.calibration import BARS, BIASED, FIVE_FORKS, ONE_FORK, ORIGINAL

PAINTS = {ONE_FORK.name: GREEN, FIVE_FORKS.name: BLUE, BIASED.name: ORANGE}
PANELS = {
    "coverage": "95% interval covers",
    "false_verdicts": "false verdicts, A = B",
    "power_2": "power at a true 2%",
}


def _label(name: str) -> str:
    return "<br>".join(textwrap.wrap(name, 30))


def designs_figure(rows: Sequence[dict]) -> go.Figure:
    """Coverage, false verdicts and power at 2% of every design, in three panels.

    Args: rows: of `simulate.tabulate`. Dashed lines are the bars of `calibration.BARS` in their design's colour.
    """
    figure = make_subplots(
        1, 3, shared_yaxes=True, subplot_titles=list(PANELS.values()), horizontal_spacing=0.05
    )
    names = [_label(row["design"]) for row in rows]
    for column, metric in enumerate(PANELS, 1):
        shares = [row[metric] for row in rows]
        figure.add_bar(
            y=names,
            x=[0 if share is None else round(100 * share, 2) for share in shares],
            text=["no interval" if share is None else f"{share:.1%}" for share in shares],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            marker={"color": [PAINTS.get(row["design"], GREY) for row in rows]},
            hovertemplate="%{y}: %{x}%<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        for bar in (bar for bar in BARS if bar.metric == metric):
            at = names.index(_label(bar.design))
            for bound in (x for x in (bar.low, bar.high) if 0 < x < 1):
                figure.add_shape(
                    type="line", x0=100 * bound, x1=100 * bound, y0=at - 0.48, y1=at + 0.48,
                    line={"color": INK, "width": 2, "dash": "dot"}, row=1, col=column,
                )  # fmt: skip
        figure.update_xaxes(
            range=[0, 125], tickvals=[0, 50, 100], ticksuffix="%", title="share of runs", row=1, col=column
        )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11})
    figure.update_layout(title="Every design under the same noise (dotted: our bars)", bargap=0.3)
    style(figure, 560)
    return figure.update_layout(margin={"t": 95})


def power_figure(curves: Sequence[dict], delta: float = 0.01) -> go.Figure:
    """Share of ADOPT against the true effect. Args: curves: of `calibration.power_curves`; delta: the threshold."""
    figure = go.Figure()
    dashes = iter(("dot", "dash"))
    for curve in curves:
        name = curve["design"]
        ours = name in PAINTS
        figure.add_scatter(
            x=[round(100 * effect, 3) for effect in curve["effects"]],
            y=[round(100 * share, 2) for share in curve["adopt"]],
            mode="lines",
            name=name + (" (original)" if name == ORIGINAL else ""),
            line={
                "color": PAINTS.get(name, GREY),
                "width": 3 if ours else 2,
                "dash": "solid" if ours else next(dashes),
            },
            hovertemplate="true effect %{x}%: ADOPT in %{y}%<extra></extra>",
        )
    figure.add_vline(x=100 * delta, line={"color": INK, "width": 1, "dash": "dot"})
    figure.add_annotation(x=100 * delta, y=4, text=f" δ = {delta:.0%}", showarrow=False, xanchor="left")
    figure.update_xaxes(title="true effect: the candidate is faster by", ticksuffix="%", rangemode="tozero")
    figure.update_yaxes(title="runs that say ADOPT", ticksuffix="%", range=[0, 103])
    figure.update_layout(title="What each design finds: at 0 every ADOPT is false")
    style(figure, 460)
    legend = {"orientation": "v", "x": 1, "xanchor": "right", "y": 0.04, "yanchor": "bottom"}
    return figure.update_layout(legend=legend)
