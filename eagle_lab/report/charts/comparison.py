"""The two charts of a comparison: both arms' times, and what the verdict rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from eagle_lab.measure.records import Sample
from eagle_lab.report.charts.style import GREY, INK, colour, faint, style
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Verdict, median_interval
from eagle_lab.verdict.summary import verdict_of


def taken(record: ComparisonRecord, control: bool = False) -> list[Sample]:
    """The samples of the comparison, or of its A/A control, in the order taken."""
    return [s for s in record.samples if s.control == control]


def _pairs_axis(figure: go.Figure, count: int, medians: bool = False) -> None:
    step = 1 if count <= 20 else 5 * math.ceil(count / 100)
    ticks = list(range(step, count + 1, step))
    figure.update_xaxes(
        title="pair, in the order measured",
        range=[0.4, count + (2.2 if medians else 0.6)],
        showgrid=False,
        tickvals=[*ticks, *([count + 1.45] if medians else [])],
        ticktext=[*map(str, ticks), *(["median"] if medians else [])],
    )


def paired_latencies(record: ComparisonRecord) -> go.Figure:
    """Both arms' times of every pair, joined by a line; at the right each arm's median with its 95% interval."""
    samples, settings = taken(record), record.settings
    numbers = list(range(1, len(samples) + 1))
    figure = go.Figure()
    joints: list[Any] = [[], []]
    for number, sample in zip(numbers, samples, strict=True):
        joints[0] += [number, number, None]
        joints[1] += [_ms(sample.baseline_s), _ms(sample.candidate_s), None]
    thin = {"color": GREY, "width": 1}
    figure.add_scatter(x=joints[0], y=joints[1], mode="lines", line=thin, hoverinfo="skip", showlegend=False)
    for arm, symbol, place in (("baseline", "circle", 1.2), ("candidate", "diamond", 1.7)):
        name = getattr(settings, arm)
        kept = [getattr(s, f"{arm}_s") * 1e3 for s in samples if not s.dropped]
        if kept:
            _median(figure, kept, colour(name), symbol, len(samples) + place)
        figure.add_scatter(
            x=numbers,
            y=[_ms(getattr(s, f"{arm}_s")) for s in samples],
            customdata=[f"{s.prompt}, fork {s.fork}, {s.order}{_why(s)}" for s in samples],
            mode="markers",
            name=f"{arm}: {name}",
            marker={"color": colour(name), "size": 9, "symbol": _symbols(samples, symbol)},
            hovertemplate=f"{name}: %{{y:.1f}} ms<br>%{{customdata}}<extra></extra>",
        )
    figure.update_layout(title=f"{settings.candidate} against {settings.baseline}: time of each run")
    figure.update_yaxes(title="time of one decode (ms)")
    _pairs_axis(figure, len(samples), medians=True)
    return style(figure, 400)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def _why(sample: Sample) -> str:
    return f"<br>dropped: {', '.join(sample.dropped)}" if sample.dropped else ""


def _symbols(samples: Sequence[Sample], usual: str) -> list[str]:
    return ["x-thin-open" if s.dropped else usual for s in samples]


def _median(figure: go.Figure, values: Sequence[float], paint: str, symbol: str, x: float) -> None:
    low, middle, high = median_interval(values)
    known = math.isfinite(low) and math.isfinite(high)
    told = f"95% interval {low:.1f} to {high:.1f}" if known else "too few for an interval"
    figure.add_scatter(
        x=[x],
        y=[round(middle, 2)],
        mode="markers",
        showlegend=False,
        marker={"color": paint, "size": 11, "symbol": symbol},
        error_y={
            "array": [round(high - middle, 2)],
            "arrayminus": [round(middle - low, 2)],
            "visible": known,
        },
        hovertemplate=f"median %{{y:.1f}} ms<br>{told}<extra></extra>",
    )


def ratio_figure(record: ComparisonRecord, verdict: Verdict | None = None) -> go.Figure:
    """Candidate time / baseline time of every pair, with the estimate, its interval and ±δ: what the verdict rests on.

    Args: record: a comparison's; verdict: the record's own where None. The A/A control's pairs are hollow and grey,
    dropped ones are crosses.
    """
    found, settings = verdict or verdict_of(record), record.settings
    paint = colour(settings.candidate)
    samples = taken(record) + taken(record, control=True)
    figure = go.Figure()
    limit, known = 1 + found.delta, math.isfinite(found.high)
    figure.add_hrect(y0=1 / limit, y1=limit, fillcolor=faint(GREY, 0.16), line_width=0, layer="below")
    figure.add_hline(y=1, line={"color": INK, "width": 1})
    if known:
        figure.add_hrect(
            y0=found.low, y1=found.high, fillcolor=faint(paint, 0.22), line_width=0, layer="below"
        )
    if math.isfinite(found.estimate):
        figure.add_hline(y=found.estimate, line={"color": paint, "width": 2, "dash": "dot"})
    numbers = iter(range(1, len(samples) + 1))
    for name, dye, symbol, chosen in (
        (f"{settings.candidate} / {settings.baseline}", paint, "circle", taken(record)),
        ("A/A control", GREY, "circle-open", taken(record, control=True)),
    ):
        figure.add_scatter(
            x=[next(numbers) for _ in chosen],
            y=[round(s.candidate_s / s.baseline_s, 4) for s in chosen],
            customdata=[f"{s.prompt}, fork {s.fork}, {s.order}{_why(s)}" for s in chosen],
            mode="markers",
            name=name,
            marker={"color": dye, "size": 9, "symbol": _symbols(chosen, symbol)},
            visible=bool(chosen),
            hovertemplate="%{y:.3f}<br>%{customdata}<extra></extra>",
        )
    ends = f"[{found.low:.3f}, {found.high:.3f}]" if known else "(too few pairs for an interval)"
    ratio = f"{found.estimate:.3f} {ends}" if found.pairs else "no pair is left to judge"
    title = f"{found.decision.replace('_', ' ')}: {ratio}, grey band ±{found.delta:.1%}"
    figure.update_layout(title=title, showlegend=True)
    figure.update_yaxes(title="candidate / baseline time<br>(ratio, below 1 is faster)", tickformat=".3~f")
    _pairs_axis(figure, len(samples))
    return style(figure, 400)
