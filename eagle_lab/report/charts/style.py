"""Every chart's one look.

`style` and `colour` are what makes all figures one family: a colour belongs to a strategy, not to a place in a
legend, so that "doubling" is the same green in every notebook. Text and lines are greys that read on white and on
JupyterLab's dark theme alike, the ground is transparent. A chart that isn't here comes through `style` too.
Source of the palette: Okabe and Ito, Color Universal Design (2008), without black and yellow, which need one theme.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar
from zlib import crc32

import plotly.graph_objects as go
import plotly.io as pio

Shown = TypeVar("Shown")  # what a chart gives a colour: anything that a dict takes as a key

BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C",
)  # fmt: skip
# colour-blind safe as a set; the last three are darker sisters for what has no place of its own
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#A6761D", "#7570B3", "#1B9E9E")
# for a dozen at once: 17 or more apart (CIE76), also as the red- and the green-blind see them, and on either theme
APART = (
    BLUE, ORANGE, GREEN, RED, PINK, SKY, "#671FF9", "#47D175", "#8E4723", "#9682FB", "#AE0475", "#D5A8A8",
)  # fmt: skip
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
DEPTH_COLOURS = (SKY, GREEN, "#7570B3", PINK, "#A6761D", BLUE, "#66A61E", RED)
BONUS = ORANGE
PLOTLY = "application/vnd.plotly.v1+json"  # a chart's kind among a notebook's outputs
THUMBNAIL = (288, 180)  # pixels
SECOND_LINE = "<br><sub>"
INK = "#777777"  # text: contrast 4.5 on white, 4.2 on JupyterLab's dark ground
GRID = "rgba(128,128,128,0.25)"
AXIS = {**dict.fromkeys(("gridcolor", "linecolor", "zerolinecolor", "tickcolor"), GRID), "automargin": True}

if "PLOTLY_RENDERER" not in os.environ and "notebook" in (pio.renderers.default or ""):
    # plotly's own choice in a notebook writes 5 MB of JavaScript beside each chart
    pio.renderers.default = "plotly_mimetype"
# still pictures beside the interactive ones, where PLOTLY_RENDERER asks for them. JupyterLab shows these first, at their own
# size, and cuts off what is wider than its page: 930 pixels in a window of 1,100
pio.renderers["png"].width, pio.renderers["png"].scale = 900, 1


def colour(strategy: object) -> str:
    """The colour of a strategy by its name, always the same, also for a name that is new here."""
    name = str(strategy).removeprefix("mask=").removeprefix("runtime=")
    return COLOURS.get(name) or PALETTE[crc32(name.encode()) % len(PALETTE)]


def apart(names: Mapping[Shown, str]) -> dict[Shown, str]:
    """A colour for each of what one chart shows, no two alike up to a dozen; beyond that they repeat.

    Args: names: of each, the strategy whose own colour it takes if `APART` has that and nothing took it before.
    """
    found: dict[Shown, str] = {}
    for one, name in names.items():
        own = COLOURS.get(name)
        if own in APART and own not in found.values():
            found[one] = own
    free = [paint for paint in APART if paint not in found.values()] or APART
    return found | {one: free[n % len(free)] for n, one in enumerate(o for o in names if o not in found)}


def faint(strategy_colour: str, opacity: float) -> str:
    """A colour "#rrggbb" as rgba with an opacity from 0 to 1, for bands and fills."""
    red, green, blue = (int(strategy_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def depth_colour(depth: int) -> str:
    """The colour of an accepted token by how deep in its tree it was drafted; depth 0 is the bonus."""
    return BONUS if depth == 0 else DEPTH_COLOURS[min(depth, len(DEPTH_COLOURS)) - 1]


def style(figure: go.Figure, height: int | None = None) -> go.Figure:
    """Give a figure the kit's look, in place, and return it; `height` in pixels."""
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
    return figure.update_xaxes(**AXIS).update_yaxes(**AXIS)


def heading(figure: go.Figure, words: str, small: str = "", most: int = 80) -> go.Figure:
    """Give a styled figure its heading, in place, and return it: `small` below it, its part in brackets on a line of its
    own where the whole is longer than `most` characters, and room for all of it."""
    lines = [small] if small else []
    if len(small) > most and small.endswith(")") and " (" in small:
        before, _, inside = small[:-1].rpartition(" (")
        lines = [before, inside]
    figure.update_layout(title_text=words + "".join(f"<br><sup>{line}</sup>" for line in lines))
    return figure.update_layout(margin_t=figure.layout.margin.t + 18 * max(0, len(lines) - 1))


def whiskers(ends: Iterable[tuple[float, float, float]], digits: int = 4, **more: Any) -> dict[str, Any]:
    """Error bars from each value's low, middle, high; of no length where an end is unknown. more: plotly's own settings."""
    known = [e if math.isfinite(e[0]) and math.isfinite(e[2]) else (e[1], e[1], e[1]) for e in ends]
    above = [round(high - middle, digits) for _, middle, high in known]
    below = [round(middle - low, digits) for low, middle, _ in known]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **more}


def has_browser() -> bool:
    """Whether a still picture can be made here: kaleido and a Chromium or Chrome."""
    if importlib.util.find_spec("kaleido") is None:
        return False
    from choreographer.browsers.chromium import Chromium

    return bool(Chromium.find_browser(skip_local=False))


def picture(figure: go.Figure) -> bytes | None:
    """The figure as an SVG picture; None where no browser can draw it (see `has_browser`)."""
    if not has_browser():
        return None
    return figure.to_image(format="svg", width=900, height=figure.layout.height or 420)


def two_lines(name: str, below: str) -> str:
    """A label of two lines, the second one smaller."""
    return f"{name}{SECOND_LINE}{below}</sub>"


def thumbnail(chart: dict[str, Any]) -> bytes | None:
    """A chart of a notebook's outputs as a small PNG without title and legend; None where no browser can draw it."""
    if not has_browser():
        return None
    figure = go.Figure(chart["data"], chart["layout"], skip_invalid=True)
    figure.update_layout(title_text="", showlegend=False, margin={"t": 30, "r": 30})
    for bars in figure.select_traces({"type": "bar", "orientation": "h"}):
        bars.y = [str(name).partition(SECOND_LINE)[0] for name in bars.y]  # too small to be read here
    if figure.layout.meta == "panels":  # one above the other, with no room for dates between them
        figure.update_xaxes(showticklabels=False).update_yaxes(title_text="").update_layout(margin_b=20)
    return figure.to_image(format="png", width=THUMBNAIL[0] * 2.5, height=THUMBNAIL[1] * 2.5, scale=0.4)
