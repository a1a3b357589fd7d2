"""The charts of a comparison: both arms' times, what the verdict rests on, and where that comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.measure.records import InstanceSample, Sample
from eagle_lab.report.charts.style import GREY, INK, colour, faint, style
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Verdict, median_interval, over_instances
from eagle_lab.verdict.summary import (
    CANDIDATE,
    CONTROL,
    by_fork,
    counted,
    cycle_seconds,
    instance_estimates,
    judged,
    kept_instances,
    verdict_of,
)


def taken(record: ComparisonRecord, control: bool = False) -> list[Sample]:
    """The samples of the comparison, or of its A/A control, in the order taken."""
    return [s for s in record.samples if s.control == control]


def _pairs_axis(figure: go.Figure, count: int, unit: str, medians: bool = False) -> None:
    step = 1 if count <= 20 else 5 * math.ceil(count / 100)
    ticks = list(range(step, count + 1, step))
    figure.update_xaxes(
        title=f"{unit}, in the order measured",
        range=[0.4, count + (2.2 if medians else 0.6)],
        showgrid=False,
        tickvals=[*ticks, *([count + 1.45] if medians else [])],
        ticktext=[*map(str, ticks), *(["median"] if medians else [])],
    )


def _cycle(instance: InstanceSample) -> Sample:
    """An instance as a pair of mean cycles, to be drawn as one."""
    baseline_s, candidate_s = cycle_seconds(instance) if instance.seconds else (math.nan, math.nan)
    first = {CONTROL: "control first", CANDIDATE: "candidate first"}.get(instance.made[0], "baseline first")
    return Sample.model_construct(
        **instance.model_dump(include={"fork", "iteration", "prompt", "foreign_load", "dropped"}),
        baseline_s=baseline_s, candidate_s=candidate_s, order=f"made {first}", control=False,
    )  # fmt: skip


def paired_latencies(record: ComparisonRecord) -> go.Figure:
    """Both arms' times of every pair of decodes, or mean cycles of every instance, joined by a line; at the right each
    arm's median with its 95% interval."""
    cycles, settings = record.settings.pairs_of == "cycles", record.settings
    samples = [_cycle(i) for i in record.instances if i.seconds] if cycles else taken(record)
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
            x=numbers, y=[_ms(getattr(s, f"{arm}_s")) for s in samples], customdata=[_of(s) for s in samples],
            mode="markers", name=f"{arm}: {name}",
            marker={"color": colour(name), "size": 9, "symbol": _symbols(samples, symbol)},
            hovertemplate=f"{name}: %{{y:.1f}} ms<br>%{{customdata}}<extra></extra>",
        )  # fmt: skip
    what = "a cycle, the mean of each instance" if cycles else "each run"
    figure.update_layout(title=f"{settings.candidate} against {settings.baseline}: time of {what}")
    figure.update_yaxes(title="time of one cycle (ms)" if cycles else "time of one decode (ms)")
    _pairs_axis(figure, len(samples), "instance" if cycles else "pair", medians=True)
    return style(figure, 400)


def _of(sample: Sample) -> str:
    dropped = f"<br>dropped: {', '.join(sample.dropped)}" if sample.dropped else ""
    return f"{sample.prompt}, process {sample.fork}, {sample.order}{dropped}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def _symbols(samples: Sequence[Sample], usual: str) -> list[str]:
    return ["x-thin-open" if s.dropped else usual for s in samples]


def _median(figure: go.Figure, values: Sequence[float], paint: str, symbol: str, x: float) -> None:
    low, middle, high = median_interval(values)
    known = math.isfinite(low) and math.isfinite(high)
    told = f"95% interval {low:.1f} to {high:.1f}" if known else "too few for an interval"
    figure.add_scatter(
        x=[x], y=[round(middle, 2)], mode="markers", showlegend=False,
        marker={"color": paint, "size": 11, "symbol": symbol},
        error_y={"array": [round(high - middle, 2)], "arrayminus": [round(middle - low, 2)], "visible": known},
        hovertemplate=f"median %{{y:.1f}} ms<br>{told}<extra></extra>",
    )  # fmt: skip


def ratio_figure(record: ComparisonRecord, verdict: Verdict | None = None) -> go.Figure:
    """Candidate time / baseline time of every pair or instance, in the order measured, with the estimate, its interval
    and ±δ: what the verdict rests on.

    Args: record: a comparison's; verdict: the record's own where None. The A/A control is hollow and grey, what was
    dropped a cross. Cycles in turn: each dot is an instance, and a line with its band runs along as the estimate and the
    interval so far.
    """
    found, settings = verdict or verdict_of(record), record.settings
    paint, cycles = colour(settings.candidate), settings.pairs_of == "cycles"
    figure = go.Figure()
    limit, known = 1 + found.delta, found.known
    figure.add_hrect(y0=1 / limit, y1=limit, fillcolor=faint(GREY, 0.16), line_width=0, layer="below")
    figure.add_hline(y=1, line={"color": INK, "width": 1})
    if known:
        figure.add_hrect(
            y0=found.low, y1=found.high, fillcolor=faint(paint, 0.22), line_width=0, layer="below"
        )
    if math.isfinite(found.estimate):
        figure.add_hline(y=found.estimate, line={"color": paint, "width": 2, "dash": "dot"})
    count = _instance_dots(figure, record, paint) if cycles else _pair_dots(figure, record, paint)
    ends = f"[{found.low:.3f}, {found.high:.3f}]" if known else "(too few pairs for an interval)"
    ratio = f"{found.estimate:.3f} {ends}" if found.pairs else "no pair is left to judge"
    title = f"{found.decision.replace('_', ' ')}: {ratio}, grey band ±{found.delta:.1%}"
    figure.update_layout(title=title, showlegend=True)
    figure.update_yaxes(title="candidate / baseline time<br>(ratio, below 1 is faster)", tickformat=".3~f")
    _pairs_axis(figure, count, "instance" if cycles else "pair")
    return style(figure, 400)


def _pair_dots(figure: go.Figure, record: ComparisonRecord, paint: str) -> int:
    """A dot for each pair of decodes, the control's last; how many there are."""
    settings, at = record.settings, 0
    for name, dye, symbol, chosen in (
        (f"{settings.candidate} / {settings.baseline}", paint, "circle", taken(record)),
        ("A/A control", GREY, "circle-open", taken(record, control=True)),
    ):
        ratios = [_ratio(record, s) for s in chosen]
        _dots(figure, name, dye, symbol, [at + n + 1 for n in range(len(chosen))], ratios, chosen)
        at += len(chosen)
    return at


def _ratio(record: ComparisonRecord, sample: Sample) -> float:
    baseline, candidate = judged(record, sample)
    return round(candidate / baseline, 5)


def _instance_dots(figure: go.Figure, record: ComparisonRecord, paint: str) -> int:
    """Two dots for each instance, the control's beside it, and what the estimate was after each; how many instances."""
    settings, held = record.settings, [i for i in record.instances if i.seconds]
    if not held:
        return 0
    drawn = [_cycle(i) for i in held]
    for name, dye, symbol, session, aside in (
        ("A/A control", GREY, "circle-open", CONTROL, 0.22),
        (f"{settings.candidate} / {settings.baseline}", paint, "circle", CANDIDATE, 0.0),
    ):
        ratios = [round(math.exp(x), 5) for x in instance_estimates(held, session)]
        _dots(figure, name, dye, symbol, [n + 1 + aside for n in range(len(held))], ratios, drawn)
    kept = [n for n, i in enumerate(held) if not i.dropped]
    each = instance_estimates([held[n] for n in kept]) if kept else []
    ways = [
        over_instances(by_fork([held[n] for n in kept[: end + 1]], each[: end + 1]), settings.alpha)
        for end in range(len(kept))
    ]
    numbers = [n + 1 for n in kept]
    figure.add_scatter(
        x=numbers, y=[round(math.exp(at), 5) for _, at, _ in ways], mode="lines", name="estimate so far",
        line={"color": paint, "width": 2}, hovertemplate="so far %{y:.4f}<extra></extra>",
    )  # fmt: skip
    for pick in (0, 2):
        ends = [math.exp(way[pick]) if math.isfinite(way[pick]) else None for way in ways]
        figure.add_scatter(
            x=numbers, y=[end and round(end, 5) for end in ends], mode="lines", showlegend=False,
            line={"color": paint, "width": 1, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
    for number in range(1, len(held)):
        if held[number].fork != held[number - 1].fork:
            figure.add_vline(x=number + 0.6, line={"color": faint(GREY, 0.5), "width": 1, "dash": "dot"})
    # an interval of two instances may reach far beyond what there is to see
    far = max(1.5 * settings.delta, *(abs(math.log(y)) for t in figure.data[:2] for y in t.y)) * 1.15
    figure.update_yaxes(range=[math.exp(-far), math.exp(far)])
    return len(held)


def _dots(
    figure: go.Figure,
    name: str,
    paint: str,
    symbol: str,
    x: list[float],
    y: list[float],
    samples: list[Sample],
) -> None:
    figure.add_scatter(
        x=x, y=y, customdata=[_of(s) for s in samples], mode="markers", name=name,
        marker={"color": paint, "size": 9, "symbol": _symbols(samples, symbol)}, visible=bool(samples),
        hovertemplate="%{y:.3f}<br>%{customdata}<extra></extra>",
    )  # fmt: skip


def groups_figure(record: ComparisonRecord) -> go.Figure:
    """Each instance's ratio, or each pair's of whole decodes, by process and by prompt, with the group's mean; the control
    beside, hollow; empty where nothing was kept."""
    of: list[list[Any]]
    if record.settings.pairs_of == "cycles":
        of = [kept_instances(record)] * 2
        ways = [instance_estimates(of[0], session) for session in (CANDIDATE, CONTROL)]
        each = [[round(math.exp(x), 5) for x in way] for way in ways]
    else:
        of = [counted(record, control) for control in (False, True)]
        each = [[_ratio(record, sample) for sample in chosen] for chosen in of]
    paint = colour(record.settings.candidate)
    figure = make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=("by process", "by prompt")
    )
    for column, group in ((1, lambda s: f"process {s.fork}"), (2, lambda s: s.prompt)):
        names, beside = ([group(sample) for sample in chosen] for chosen in of)
        places = {name: n for n, name in enumerate(dict.fromkeys([*names, *beside]))}
        for label, dye, symbol, y, aside, at in (
            (record.settings.candidate, paint, "circle", each[0], -0.12, names),
            ("A/A control", GREY, "circle-open", each[1], 0.12, beside),
        ):
            figure.add_scatter(
                x=[places[name] + aside for name in at], y=y, mode="markers", name=label, showlegend=column == 1,
                marker={"color": dye, "size": 8, "symbol": symbol}, customdata=at,
                hovertemplate="%{customdata}: %{y:.4f}<extra></extra>", row=1, col=column,
            )  # fmt: skip
        means = {
            name: geometric_mean(y for y, n in zip(each[0], names, strict=True) if n == name)
            for name in dict.fromkeys(names)
        }
        figure.add_scatter(
            x=[places[name] - 0.12 for name in means], y=[round(m, 5) for m in means.values()], mode="markers", name="mean",
            showlegend=column == 1, marker={"color": INK, "size": 14, "symbol": "line-ew-open"},
            hovertemplate="mean %{y:.4f}<extra></extra>", row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(
            tickvals=list(places.values()), ticktext=list(places), tickangle=-40, row=1, col=column
        )
    figure.add_hline(y=1, line={"color": INK, "width": 1})
    figure.update_yaxes(title="candidate / baseline time (ratio)", tickformat=".3~f", col=1)
    style(figure.update_layout(title="Where the ratio comes from"), 430)
    title = {"y": 0.97, "yref": "container", "yanchor": "top"}
    # each panel has its own heading below
    return figure.update_layout(legend={"y": 1.08}, margin={"t": 82}, title=title)
