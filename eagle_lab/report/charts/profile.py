"""Charts of a profile: a cycle in time, the stages' shares, two ways to time them, what a delay does, the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from eagle_lab.report.charts.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    heading,
    style,
    whiskers,
)
from eagle_lab.report.profile import title
from eagle_lab.report.words import plain
from eagle_lab.studies.breakdown import HOT, cycle_times, disagreement, lane, over_floor, stages
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.whatif import slope

# a stage has one colour in all charts
STAGES = {
    "select": SKY,
    "draft": BLUE,
    "tree_mask": RED,
    "target": ORANGE,
    "accept": PINK,
    "commit": GREEN,
    "to_host": "#7570B3",
    "replay": "#A6761D",
    "rest": GREY,
    "prefill": "#1B9E9E",
}


def _colour(stage: str) -> str:
    return STAGES.get(stage, INK)


def timeline(record: ProfileRecord) -> go.Figure:
    """The median cycle: each call of each stage as a bar, on the host's lane and, where there is one, the device's."""
    figure, told = go.Figure(), set()
    lanes = {"host": ("start_s", "host_s")}
    if lane(record) == "device":
        lanes["device"] = ("device_start_s", "device_s")
    for name in dict.fromkeys(call.stage for call in record.timeline):
        calls = [call for call in record.timeline if call.stage == name]
        for where, (start, length) in lanes.items():
            figure.add_bar(
                base=[round(getattr(call, start) * 1e3, 4) for call in calls],
                x=[round(getattr(call, length) * 1e3, 4) for call in calls], y=[where] * len(calls), orientation="h",
                name=name, legendgroup=name, showlegend=name not in told, marker={"color": _colour(name), "line": {"width": 0}},
                hovertemplate=f"{name}: %{{x:.3f}} ms from %{{base:.3f}} ms<extra></extra>",
            )  # fmt: skip
            told.add(name)
    figure.update_layout(barmode="overlay", bargap=0.3)
    figure.update_xaxes(title="ms from the cycle's start")
    figure = style(figure, height=280 + 60 * len(lanes))
    # below the axis and its title, by pixels, whatever the height
    figure.update_layout(
        legend={"y": 0, "yref": "container", "yanchor": "bottom"}, margin={"t": 70, "b": 110}
    )
    return heading(figure, "One cycle (the median one)", title(record))


def shares(record: ProfileRecord) -> go.Figure:
    """Each stage's share of a cycle: the median of the cycles as a bar, their quartiles as its whisker."""
    rows = [s for s in stages(record) if s.in_cycle]
    figure = go.Figure()
    names = [s.name for s in rows]
    figure.add_bar(
        x=names, y=[round(s.median * 100, 3) for s in rows], marker={"color": list(map(_colour, names))},
        error_y=whiskers(((s.low * 100, s.median * 100, s.high * 100) for s in rows), 3, color=INK),
        hovertemplate="%{x}: %{y:.2f}% of a cycle<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(  # the figures stand above the whiskers, not across them
        x=names, y=[round(s.high * 100, 3) for s in rows],
        text=[f"{s.median:.1%}" if s.median >= 0.01 else f"{s.median:.2%}" for s in rows],
        mode="text", textposition="top center", hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_hline(y=HOT * 100, line={"dash": "dot", "color": INK}, annotation_text="hot above this")
    count = len(cycle_times(record))
    figure.update_yaxes(title=f"% of the cycle ({lane(record)} time)", rangemode="tozero")
    words = f"Share of a cycle: median and quartiles of {count} cycles"
    return heading(style(figure, height=420), words, title(record))


def _beside(stages: Sequence[str], **series: tuple[str, list[float]]) -> go.Figure:
    """Bars of each series' ms side by side on a logarithmic axis; series: its colour and values, by its name."""
    figure = go.Figure()
    for name, (paint, values) in series.items():
        figure.add_bar(
            x=stages, y=[round(max(1e-4, v), 5) for v in values], name=name, marker={"color": paint}
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(title="ms a cycle (logarithmic)", type="log", dtick=1)
    return style(figure, height=400).update_layout(legend={"y": -0.12, "yanchor": "top"}, margin={"t": 85})


def two_clocks(record: ProfileRecord) -> go.Figure:
    """Each stage by spans that only record, and with a synchronise around it."""
    stages, loose, tight = map(list, zip(*disagreement(record)[:-1], strict=True))
    figure = _beside(stages, spans=(BLUE, loose), synchronised=(ORANGE, tight))
    return heading(figure, "The same stages by two ways to time them", title(record))


def floor(record: ProfileRecord) -> go.Figure:
    """Measured time over the physical floor, for the cycle and the stages that have one."""
    rows = over_floor(record)
    series = {"floor": (GREY, [row.least for row in rows]), "measured": (BLUE, [row.took for row in rows])}
    figure = _beside([row.name for row in rows], **series)
    times = [f"{plain(row.times)}×" for row in rows]
    figure.data[1].update(text=times, textposition="outside", cliponaxis=False)
    return heading(figure, "Measured against the physical floor", title(record))


def delays(record: ProfileRecord) -> go.Figure:
    """Every pair of the what-ifs: how much delay went in, how much longer the decode took; slope 1 is the dotted line."""
    figure = go.Figure()
    most = max((s.waited_s * 1e3 for found in record.whatif for s in found.samples), default=0.0)
    for place, found in enumerate(record.whatif):
        # beside each other, for all had the same delays
        aside = 0.015 * most * (place - (len(record.whatif) - 1) / 2)
        put = [s.waited_s * 1e3 + aside for s in found.samples]
        got = [(s.delayed_s - s.baseline_s) * 1e3 for s in found.samples]
        low, at, high = slope(found)
        figure.add_scatter(
            x=[round(v, 3) for v in put], y=[round(v, 3) for v in got], mode="markers",
            name=f"{found.stage} ({found.where}): slope {at:.2f} [{low:.2f}, {high:.2f}]",
            marker={"color": _colour(found.stage), "size": 9, "symbol": "circle" if found.where == "host" else "x"},
        )  # fmt: skip
    ends = [0, round(most, 3)]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="slope 1", line={"color": INK, "dash": "dot"})
    figure.update_xaxes(title="delay put into a decode, ms")
    figure.update_yaxes(title="the decode grew by, ms")
    lines = 22 * (len(record.whatif) + 1)
    figure = style(figure, height=420 + lines)
    legend = {"orientation": "v", "y": 0, "yref": "container", "yanchor": "bottom"}
    figure.update_layout(legend=legend, margin={"b": 70 + lines})
    return heading(figure, "What a delay in one stage does to the whole", title(record))


def stage_bars(
    stages: Mapping[str, float | tuple[float, float, float]], title: str = "Where the cycle's time went"
) -> go.Figure:
    """Stage times in ms as bars, longest at the top; values in seconds, or (low, value, high) for whiskers."""
    found = {name: v if isinstance(v, tuple) else (v, v, v) for name, v in stages.items()}
    order = sorted(found, key=lambda name: found[name][1])
    ends = [(low * 1e3, middle * 1e3, high * 1e3) for low, middle, high in (found[name] for name in order)]
    figure = go.Figure(go.Bar(
        x=[round(middle, 3) for _, middle, _ in ends],
        y=[f"{name}  {plain(middle)} ms" for name, (_, middle, _) in zip(order, ends, strict=True)],
        orientation="h", marker={"color": SKY}, hovertemplate="%{y}<extra></extra>",
        error_x=whiskers(ends, 3, color=INK, visible=any(low < high for low, _, high in ends)),
    ))  # fmt: skip
    figure.update_xaxes(title="time (ms)", rangemode="tozero")
    figure.update_layout(title=title)
    return style(figure, 110 + 30 * len(order))
