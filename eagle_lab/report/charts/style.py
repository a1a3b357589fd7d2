"""Every chart's one look, and the two charts of a comparison.

`style` and `colour` are what makes all figures one family: a colour belongs to a strategy, not to a place in a
legend, so that "doubling" is the same green in every notebook. Text and lines are greys that read on white and on
JupyterLab's dark theme alike, the ground is transparent. A chart that isn't here comes through `style` too.
Source of the palette: Okabe and Ito, Color Universal Design (2008), without black and yellow, which need one theme.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import plotly.graph_objects as go
import plotly.io as pio

from eagle_lab.measure.records import Sample
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Verdict, median_interval
from eagle_lab.verdict.summary import verdict_of

BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C",
)  # fmt: skip
# colour-blind safe as a set; the last three are darker sisters for what has no place of its own
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#A6761D", "#7570B3", "#1B9E9E")
COLOURS = {
    "rebuild": BLUE,
    "incremental": RED,
    "incremental_inplace": ORANGE,
    "doubling": GREEN,
    "mine": PINK,
    "walk": "#A6761D",
    "carried": "#7570B3",
    "bitpacked": "#1B9E9E",
    "host_walk": "#999933",
    "triton": SKY,
    "cuda": "#AA4499",
    # by runtime
    "eager": BLUE,
    "plain": GREY,
    "cuda_graph": GREEN,
    "compile": ORANGE,
    "compile+cuda_graph": PINK,
}
# an accepted draft token by its depth, from 1; the bonus, which the target itself chose, is orange
DEPTH_COLOURS = (SKY, "#3D9BD3", "#1F82C2", BLUE, "#4F72BA", "#8474BC", "#B077A0", PINK)
BONUS = ORANGE
INK = "#777777"  # text: contrast 4.5 on white, 4.2 on JupyterLab's dark ground
GRID = "rgba(128,128,128,0.25)"

if "PLOTLY_RENDERER" not in os.environ and "notebook" in (pio.renderers.default or ""):
    # plotly's own choice in a notebook writes 5 MB of JavaScript beside each chart
    pio.renderers.default = "plotly_mimetype"
# still pictures beside the interactive ones, where PLOTLY_RENDERER asks for them: sharp, and as wide as the page
pio.renderers["png"].width, pio.renderers["png"].scale = 900, 2


def colour(strategy: object) -> str:
    """The colour of a strategy by its name, always the same, also for a name that is new here."""
    name = str(strategy).removeprefix("mask=").removeprefix("runtime=")
    return COLOURS.get(name) or PALETTE[crc32(name.encode()) % len(PALETTE)]


def faint(strategy_colour: str, opacity: float) -> str:
    """A colour "#rrggbb" as rgba with an opacity from 0 to 1, for bands and fills."""
    red, green, blue = (int(strategy_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def depth_colour(depth: int) -> str:
    """The colour of an accepted token by how deep in its tree it was drafted; depth 0 is the bonus."""
    return BONUS if depth == 0 else DEPTH_COLOURS[min(depth, len(DEPTH_COLOURS)) - 1]


def style(figure: go.Figure, height: int | None = None) -> go.Figure:
    """Give a figure the kit's look, in place, and return it; `height` in pixels."""
    axis = dict.fromkeys(("gridcolor", "linecolor", "zerolinecolor", "tickcolor"), GRID) | {
        "automargin": True
    }
    figure.update_layout(
        template="none",  # plotly's default one adds 17 kB to every chart
        font={"family": "system-ui, DejaVu Sans, sans-serif", "size": 13, "color": INK},
        title={"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        legend={"bgcolor": "rgba(0,0,0,0)", "orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        hoverlabel={"font": {"family": "DejaVu Sans Mono, monospace", "size": 13}},
        modebar={
            "bgcolor": "rgba(0,0,0,0)",
            "color": INK,
            "activecolor": ORANGE,
            # the first sends the data to somebody's server; the rest are no use here
            "remove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
        },
    )
    if height:
        figure.update_layout(height=height)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def heading(figure: go.Figure, words: str, small: str = "", most: int = 80) -> go.Figure:
    """Give a styled figure its heading, in place, and return it: `small` below it, its part in brackets on a line of its
    own where the whole is longer than `most` characters, and room for all of it."""
    lines = [small] if small else []
    if len(small) > most and small.endswith(")") and " (" in small:
        before, _, inside = small[:-1].rpartition(" (")
        lines = [before, inside]
    figure.update_layout(title_text=words + "".join(f"<br><sup>{line}</sup>" for line in lines))
    return figure.update_layout(margin_t=figure.layout.margin.t + 18 * max(0, len(lines) - 1))


def has_browser() -> bool:
    """Whether a still picture can be made here: kaleido and a Chromium or Chrome."""
    if importlib.util.find_spec("kaleido") is None:
        return False
    from choreographer.browsers.chromium import Chromium

    return bool(Chromium.find_browser(skip_local=False))


def picture(figure: go.Figure, kind: str = "svg") -> bytes | None:
    """The figure as a still picture, "svg" or "png"; None where no browser can draw it (see `has_browser`)."""
    if not has_browser():
        return None
    return figure.to_image(format=kind, width=900, height=figure.layout.height or 420)


def _kept(record: ComparisonRecord, control: bool = False) -> list[Sample]:
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
    samples, settings = _kept(record), record.settings
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
    samples = _kept(record) + _kept(record, control=True)
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
        (f"{settings.candidate} / {settings.baseline}", paint, "circle", _kept(record)),
        ("A/A control", GREY, "circle-open", _kept(record, control=True)),
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
