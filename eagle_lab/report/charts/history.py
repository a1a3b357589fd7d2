"""The chart of history.ipynb, each machine with its own panel and axis; and all of a folder's records as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, timedelta
from pathlib import Path
from textwrap import wrap

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import GREY, INK, colour, faint, style, whiskers
from eagle_lab.report.history import arms_text, commit_text, others, table, workload_text
from eagle_lab.report.words import render
from eagle_lab.verdict.history import Row, Trend, compared, trends

LEGEND = 100  # characters of a legend's line that a page has room for
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "hexagon")


def trends_figure(found: Sequence[Trend], delta: float = 0.01) -> go.Figure:
    """Candidate / baseline time over the records' dates, a panel each machine, a line each strategy pair and workload.

    Args: found: of `history.trends`; delta: half the width of the grey band. Hollow markers are provisional
    verdicts; a record without an interval has no error bar. An empty figure says so.
    """
    machines = list(dict.fromkeys(trend.machine for trend in found))
    figure = make_subplots(
        max(1, len(machines)),
        1,
        subplot_titles=machines or None,
        vertical_spacing=0.5 / max(1, len(machines)) ** 1.5,
    )
    for number, machine in enumerate(machines, 1):
        here = [trend for trend in found if trend.machine == machine]
        for place, trend in enumerate(here):
            figure.add_trace(_line(trend, SYMBOLS[place % len(SYMBOLS)]), row=number, col=1)
        band = {"fillcolor": faint(GREY, 0.16), "line_width": 0, "layer": "below"}
        figure.add_hrect(y0=1 / (1 + delta), y1=1 + delta, **band, row=number, col=1)
        figure.add_hline(y=1, line={"color": INK, "width": 1}, row=number, col=1)
        figure.update_xaxes(range=_dates(here), row=number, col=1)
    if not machines:
        figure.add_annotation(text="no comparison recorded yet", showarrow=False)
    figure.update_yaxes(title="candidate / baseline", tickformat=".3~f")
    figure.update_xaxes(type="date", tickformat="%d %b %Y<br>%H:%M", nticks=6)
    figure.update_layout(
        title=f"Ratio over time (below 1 is faster), grey band ±{delta:.0%}", showlegend=True
    )
    style(figure, 180 + 330 * max(1, len(machines)))
    legend = {"orientation": "v", "y": -0.5 / max(1, len(machines)) ** 1.3, "yanchor": "top"}
    return figure.update_layout(margin={"t": 90}, legend=legend)


def html(rows: Sequence[Row], skipped: Sequence[str]) -> str:
    """Every record as one page that needs no server and no network, to be filtered by machine and arm.

    Args: of `history.load`.
    """
    found = trends(rows)
    sections = [
        {
            "machine": trend.machine,
            "arms": [arm.strategy for arm in trend.arms],
            "title": arms_text(trend.arms),
            "workload": workload_text(trend.workload),
            "commits": trend.commits if trend.changed else None,
            "chart": trends_figure([trend]).update_layout(title=None, annotations=(), margin_t=20, showlegend=False, height=320)
            .to_html(full_html=False, include_plotlyjs=False),
        }
        for trend in found
    ]  # fmt: skip
    ours = compared(rows)
    compared_rows = list(zip([[arm.strategy for arm in row.arms] for row in ours], table(ours), strict=True))
    return render(
        "history.html.j2", sections=sections, compared=compared_rows, others=others(rows), skipped=skipped,
        machines=sorted({row.machine for row in rows}),
        arms=sorted({arm.strategy for row in ours for arm in row.arms}),
        plotly=get_plotlyjs(), script=Path(__file__).with_name("history.js").read_text(),
    )  # fmt: skip


def _dates(here: Sequence[Trend]) -> list[str]:
    """The axis of a machine: its records' dates with room at both ends, for a lone record too."""
    dates = [row.record.created.astimezone(UTC) for trend in here for row in trend.rows]
    room = max(timedelta(hours=12), (max(dates) - min(dates)) / 20)
    return [(min(dates) - room).isoformat(), (max(dates) + room).isoformat()]


def _line(trend: Trend, symbol: str) -> go.Scatter:
    rows = [row for row in trend.rows if row.verdict.pairs]
    verdicts = [row.verdict for row in rows]
    paint = colour(trend.arms[1].strategy)
    name = wrap(f"{arms_text(trend.arms)} ({trend.machine})", LEGEND)
    return go.Scatter(
        x=[row.record.created.isoformat() for row in rows],
        y=[round(v.estimate, 4) for v in verdicts],
        error_y=whiskers(v.interval for v in verdicts),
        customdata=[f"{row.verdict}<br>{row.file}<br>commit {commit_text(row.record)}" for row in rows],
        mode="lines+markers",
        name="<br>".join([*name, workload_text(trend.workload)]),
        line={"color": paint, "width": 1.5},
        marker={"color": paint, "size": 10, "symbol": [symbol + "-open" * v.provisional for v in verdicts]},
        hovertemplate="%{customdata}<extra></extra>",
    )
