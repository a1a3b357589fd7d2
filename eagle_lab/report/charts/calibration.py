"""The chart of calibrate.ipynb: how often each design errs, and what it finds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import BLUE, GREEN, GREY, ORANGE, style
from eagle_lab.verdict.calibration import BIASED, FIVE_FORKS, ONE_FORK

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

    Args: rows: of `simulate.tabulate`.
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
        figure.update_xaxes(
            range=[0, 125], tickvals=[0, 50, 100], ticksuffix="%", title="share of runs", row=1, col=column
        )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11})
    figure.update_layout(title="Every design under the same noise", bargap=0.3)
    style(figure, 560)
    return figure.update_layout(margin={"t": 95})
