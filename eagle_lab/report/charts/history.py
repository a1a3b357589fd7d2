"""The chart of history.ipynb, each machine with its own panel and axis; and all of a folder's records as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import GREY, INK, apart, faint, style, whiskers
from eagle_lab.report.history import arms_text, commit_text, others, table, workload_text
from eagle_lab.report.words import render
from eagle_lab.verdict.history import Compared, Row, Trend, compared, trends

LEGEND = 118  # characters of a legend's line that a page has room for
PANEL, BETWEEN, LINE = 170, 95, 18  # pixels: of a machine's panel, between two, of a legend's line
SYMBOLS = (
    "circle", "diamond", "square", "triangle-up", "star", "hexagon", "triangle-down", "cross", "x", "pentagon", "star-diamond",
)  # fmt: skip
TICKS = tuple(round(n * 10.0**power, 3) for power in range(-2, 4) for n in (1, 1.5, 2, 3, 5, 7))
MOST = 14  # days that a page has room for


def trends_figure(found: Sequence[Trend], delta: float = 0.01) -> go.Figure:
    """Candidate / baseline time of the records in the order measured, a panel each machine, a line each strategy pair and
    workload, which the legend numbers as `trend_words` does. A colour is a strategy pair's, so a line of the same pair
    on another workload differs by its symbol.

    Args: found: of `history.trends`; delta: half the width of the grey band. Hollow markers are provisional
    verdicts; a record without an interval has no error bar. An empty figure says so.
    """
    machines = list(dict.fromkeys(trend.machine for trend in found))
    panels = max(1, len(machines))
    tall = panels * PANEL + (panels - 1) * BETWEEN
    figure = make_subplots(panels, 1, subplot_titles=machines or None, vertical_spacing=BETWEEN / tall)
    lines, paints = 0, apart({trend.arms: trend.arms[1].strategy for trend in found})
    for number, machine in enumerate(machines, 1):
        here = [(n, trend) for n, trend in enumerate(found, 1) if trend.machine == machine]
        files = [row.file for row in sorted(_drawn([t for _, t in here]), key=lambda row: row.record.created)]
        for place, (n, trend) in enumerate(here):
            line = _line(trend, n, paints[trend.arms], SYMBOLS[place % len(SYMBOLS)], files)
            lines += line.name.count("<br>") + 1
            figure.add_trace(line, row=number, col=1)
        band = {"fillcolor": faint(GREY, 0.16), "line_width": 0, "layer": "below"}
        figure.add_hrect(y0=1 / (1 + delta), y1=1 + delta, **band, row=number, col=1)
        figure.add_hline(y=1, line={"color": INK, "width": 1}, row=number, col=1)
        _axes(figure, number, [trend for _, trend in here], files)
    if not machines:
        figure.add_annotation(text="no comparison recorded yet", showarrow=False)
    figure.update_yaxes(title={"text": "candidate / baseline", "font": {"size": 13}})
    figure.update_layout(
        title=f"Ratio in the order measured (below 1 is faster), grey band ±{delta:.0%}", showlegend=True
    )
    style(figure, 80 + tall + 60 + lines * LINE + 40)
    legend = {
        "orientation": "v",
        "y": -65 / tall,
        "yanchor": "top",
        "font": {"size": 12},
        "maxheight": lines * LINE + 60,
    }
    return figure.update_layout(margin={"t": 80, "b": 100 + lines * LINE}, legend=legend, meta="panels")


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
            "chart": trends_figure([trend]).update_layout(
                title=None, annotations=(), margin={"t": 20, "b": 60}, showlegend=False, height=320
            ).to_html(full_html=False, include_plotlyjs=False),
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


def _drawn(found: Sequence[Trend]) -> list[Compared]:
    return [row for trend in found for row in trend.rows if row.verdict.pairs]


def _created(row: Compared) -> datetime:
    return row.record.created.astimezone(UTC)


def _axes(figure: go.Figure, number: int, here: Sequence[Trend], files: Sequence[str]) -> None:
    """The axes of a machine: a place for each record, the day below its first one; ratios on a logarithmic axis where they differ much."""
    rows = {row.file: row for row in _drawn(here)}
    days: dict[str, int] = {}
    for place, file in enumerate(files):
        days.setdefault(f"{_created(rows[file]):%d %b %Y}", place)
    step = -(-len(days) // MOST) or 1
    figure.update_xaxes(
        range=[-0.6, len(files) - 0.4], tickvals=list(days.values())[::step],
        ticktext=[day[:6] for day in days][::step],
        tickfont={"size": 11}, showgrid=False, zeroline=False, row=number, col=1,
    )  # fmt: skip
    ratios = [1.0, *(row.verdict.estimate for row in rows.values())]
    if max(ratios) > 2 * min(ratios):
        figure.update_yaxes(
            type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS], row=number, col=1
        )
    else:
        figure.update_yaxes(tickformat=".3~f", row=number, col=1)


def _line(trend: Trend, number: int, paint: str, symbol: str, files: Sequence[str]) -> go.Scatter:
    rows = _drawn([trend])
    verdicts = [row.verdict for row in rows]
    target = trend.workload.target.rpartition("/")[2]
    return go.Scatter(
        x=[files.index(row.file) for row in rows],
        y=[round(v.estimate, 4) for v in verdicts],
        error_y=whiskers(v.interval for v in verdicts),
        customdata=[
            f"{row.verdict}<br>{row.file}, {_created(row):%Y-%m-%d %H:%M} UTC<br>commit {commit_text(row.record)}"
            for row in rows
        ],
        mode="lines+markers",
        name="<br>".join(wrap(f"{number}: {arms_text(trend.arms)} ({target})", LEGEND)),
        legendrank=number,
        line={"color": paint, "width": 1.5},
        marker={"color": paint, "size": 10, "symbol": [symbol + "-open" * v.provisional for v in verdicts]},
        hovertemplate="%{customdata}<extra></extra>",
    )
