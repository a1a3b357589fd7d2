"""Charts of the sweep: time against tree size over the machine's floor, and isolated beside end-to-end gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from eagle_lab.measure.environment import machine_key
from eagle_lab.report.charts.style import GREY, colour, faint, heading, style, whiskers
from eagle_lab.report.words import paired
from eagle_lab.studies.sweep import SweepRecord, Time, alone
from eagle_lab.studies.sweep_summary import floor_s, ratio
from eagle_lab.verdict.stats import median_interval
from eagle_lab.verdict.summary import verdict_of

HEADINGS: dict[Time, str] = {
    "seconds": "A tree's time until its mask is ready",
    "host_s": "A tree's time until the call returns",
    "graph_s": "A tree's time inside a graph",
}


def times(
    record: SweepRecord,
    what: Time = "seconds",
    builders: Sequence[str] | None = None,
    published: Mapping[str, tuple[int, float]] | None = None,
) -> go.Figure:
    """Median microseconds by size, one line a builder with its 95% interval, over the floor of one call and its bytes.

    Args: what: until the mask is ready, until the call returns, or a tree inside a graph; builders: None for all;
    published: by builder, somebody's (size, seconds), drawn as a cross.
    """
    figure, sizes = go.Figure(), record.settings.sizes
    for name in builders or record.settings.builders:
        found = [(size, record.samples(name, size, 1, what)) for size in sizes]
        known = {size: [x * 1e6 for x in median_interval(taken)] for size, taken in found if taken}
        if not known:
            continue
        ends = [(low, mid, high) for low, mid, high in known.values()]
        figure.add_scatter(
            x=list(known), y=[round(mid, 2) for _, mid, _ in ends], name=name, mode="lines+markers", line={"color": colour(name)},
            error_y=whiskers(ends, 2, thickness=1, width=3, color=faint(colour(name), 0.6)),
            hovertemplate=name + ", %{x} nodes: %{y:,.1f} µs<extra></extra>",
        )  # fmt: skip
    for name, (size, seconds) in (published or {}).items():
        figure.add_scatter(
            x=[size], y=[round(seconds * 1e6, 2)], name=f"{name}, as published", mode="markers",
            marker={"color": colour(name), "symbol": "x", "size": 11},
        )  # fmt: skip
    least = [(size, x) for size in sizes if (x := floor_s(record, size, 1, what)) is not None]
    if least:
        floor = [round(x * 1e6, 2) for _, x in least]
        where = [size for size, _ in least]
        figure.add_scatter(x=where, y=floor, name="floor", mode="lines", line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(type="log", title="draft nodes", tickvals=sizes, ticktext=list(map(str, sizes)))
    ticks = _ticks(figure)
    figure.update_yaxes(type="log", title="µs a tree", tickvals=ticks, ticktext=[f"{y:,g}" for y in ticks])
    figure = style(figure, 520).update_layout(legend={"y": -0.2, "yanchor": "top"}, margin={"t": 70})
    return heading(figure, HEADINGS[what], f"{machine_key(record.environment)}; medians, 95% intervals")


def _ticks(figure: go.Figure) -> list[float]:
    """Ticks of a logarithmic axis: decades, and 2 and 5 between them where there are few."""
    seen = [float(y) for trace in figure.data for y in trace.y]
    if not seen:
        return []
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]


def gains(record: SweepRecord) -> go.Figure:
    """Time over the baseline's of the record's decodes: the mask alone, and in cycles in turn or whole decodes, as they
    were paired, with their intervals.

    There is no row for the mask where the two strategies differ in more than that, and none for a verdict without a
    finite interval.
    """
    figure, compared = go.Figure(), record.end_to_end
    if compared is None:
        return _nothing(figure, "what a mask brings in decodes is not measured yet")
    settings, verdict = compared.settings, verdict_of(compared)
    name, baseline, size = settings.candidate, settings.baseline, settings.total_tokens
    builder, whole = alone(baseline, name), verdict.interval
    decodes = paired(settings.pairs_of)
    rows = {
        decodes: whole if all(map(math.isfinite, whole)) else None,
        "mask alone": ratio(record, builder, size) if builder else None,
    }
    known = {label: r for label, r in rows.items() if r}
    if not known:
        return _nothing(figure, "too few pairs of decodes for an interval")
    figure.add_scatter(
        x=[round(r[1], 4) for r in known.values()], y=list(known), name=name, mode="markers",
        marker={"size": 12, "color": colour(name)},
        error_x=whiskers(known.values(), color=colour(name)),
    )  # fmt: skip
    figure.add_vline(x=1, line={"color": GREY, "dash": "dot"})
    # decodes lie near 1, a mask alone far from it
    wide, near = (
        [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2],
        [0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.5, 2],
    )
    figure.update_xaxes(
        title=f"time over {baseline}'s, {size} nodes (below 1 is faster)", type="log",
        tickvals=wide if "mask alone" in known else near,
    )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=list(known), range=[-0.5, len(known) - 0.5])
    of = f"{name} against {baseline}, {machine_key(record.environment)}"
    style(figure, 280).update_layout(showlegend=False, margin={"t": 70})
    return heading(figure, f"The gain of the mask alone, and in {decodes}", of)


def _nothing(figure: go.Figure, words: str) -> go.Figure:
    figure.add_annotation(text=words, showarrow=False)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return style(figure, 120)
