"""The widgets themselves: what each one is called, its range and its place. What they do is in `explorer`."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as w
import plotly.graph_objects as go
import torch
from IPython import get_ipython

from eagle_lab.decode.attention import SPLIT
from eagle_lab.decode.masks import NEEDS
from eagle_lab.decode.strategy import AXES, Strategy, check, parse, waits_for_host
from eagle_lab.notebook.cards import progress
from eagle_lab.report.charts.style import PLOTLY
from eagle_lab.report.words import render
from eagle_lab.runtime import needs
from eagle_lab.runtime.needs import Needs
from eagle_lab.runtime.prepare import REGIONAL, fixed

PLAIN = "plain"  # the target alone, an arm like any other
FIELD = {"description_width": "112px"}
WRAP = {"flex_flow": "row wrap"}
SIZES = ("total_tokens", "depth", "top_k", "temperature", "max_new_tokens")


def strategies(device: torch.device | str) -> list[str]:
    """Every choice of each axis in a strategy that can run on the device, the baseline first.

    Alone, all else as in the baseline; where it doesn't go with that, with the first choices that it does go with.
    """
    found = ["rebuild"]
    for axis, names in AXES.items():
        for name in names:
            if name != getattr(Strategy(), axis) and not _missing(axis, name, device):
                # a mask goes with all that is usual, and a reader's builder must not run for a list
                ways = (way for way in _ways(axis, name) if axis == "mask" or _runs(way, device))
                found += itertools.islice(ways, 1)
    return found


def _missing(axis: str, name: str, device: torch.device | str) -> str | None:
    """Why a choice can't run here; of a mask by its needs alone, without looking at the builder."""
    found = NEEDS.get(name, Needs()) if axis == "mask" else AXES[axis][name].needs
    return needs.missing(name, found, device)


def _ways(axis: str, name: str) -> Iterator[str]:
    """The choice alone, then with each mask, then with what a product that starts early needs too."""
    homes = [choice for choices in AXES.values() for choice in choices]

    def short(axis: str, name: str) -> str:
        return name if homes.count(name) == 1 else f"{axis}={name}"

    yield short(axis, name)
    if axis == "mask":
        return
    masks = [short("mask", mask) for mask in AXES["mask"]]
    for mask in masks:
        yield f"{mask},{axis}={name}"
    if axis == "product":
        # the attention of one kernel before that of several
        for attention, mask in itertools.product(reversed(SPLIT), masks):
            yield f"{mask},attention={attention},product={name},runtime={REGIONAL}"


def _runs(text: str, device: torch.device | str) -> bool:
    """Whether `check` accepts a strategy."""
    plan = parse(text)
    # `check` would refuse this too, but to say which masks do go it tries every builder, so a reader's after every cell
    if fixed(plan.runtime) and waits_for_host(plan.mask):
        return False
    try:
        check(plan, device)
    except ValueError:
        return False
    return True


def devices() -> list[str]:
    """The devices of this machine."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def arms(device: torch.device | str) -> list[tuple[str, str]]:
    """What can decode on the device, as (what the list says, name): every strategy, and plain decoding."""
    found = []
    for name in strategies(device):
        plan = parse(name)
        changed = [axis for axis in AXES if getattr(plan, axis) != getattr(Strategy(), axis)]
        slow = "; compiles first, minutes" if plan.runtime.startswith("compile") else ""
        found.append((f"{name}   ({' + '.join(changed) or 'the baseline'}{slow})", name))
    return [*found, ("plain   (the target alone, without a head)", PLAIN)]


@dataclass(frozen=True)
class Action:
    """A long work: its button, its own Stop, and what is said beside them."""

    start: w.Button
    stop: w.Button
    status: w.HTML

    def row(self, *more: w.Widget) -> w.HBox:
        """All in a row, `more` before what is said."""
        return w.HBox([self.start, self.stop, *more, self.status], layout=WRAP)


def _number(name: str, value: float, low: float, high: float, tip: str, width: str = "190px") -> Any:
    kind, step = (w.BoundedFloatText, 0.1) if isinstance(low, float) else (w.BoundedIntText, 1)
    most = max(high, value)
    return kind(
        value=value, min=low, max=most, step=step, description=name, style=FIELD, layout={"width": width},
        tooltip=f"{tip}; {low:g} to {most:g}",
    )  # fmt: skip


def _choice(name: str, options: list[Any], value: Any, width: str = "98%") -> w.Dropdown:
    return w.Dropdown(options=options, value=value, description=name, style=FIELD, layout={"width": width})


def _more(tip: str, width: str) -> w.Text:
    layout = {"width": width}
    return w.Text(placeholder=tip, description="and", continuous_update=False, style=FIELD, layout=layout)


def _button(name: str, style: str, tip: str, width: str = "88px") -> w.Button:
    return w.Button(description=name, button_style=style, tooltip=tip, layout={"width": width})


def _action(name: str, style: str, tip: str) -> Action:
    stop = _button("Stop", "", f"end what {name} has begun", "64px")
    return Action(_button(name, style, tip), stop, w.HTML(layout={"flex": "1 1 300px"}))


class Controls:
    """All widgets of the console, and `view` with each in its place.

    Args: prompt, arm, baseline, device: what they begin with; examples: prompts to choose from, as (what the list says,
    text); numbers: first values of total_tokens, depth, top_k, temperature, max_new_tokens, iterations and delta (a share).
    """

    def __init__(
        self, prompt: str, examples: list[tuple[str, str]], arm: str, baseline: str, device: str,
        numbers: Mapping[str, float],
    ) -> None:  # fmt: skip
        names = arms(device)
        names += [(name, name) for name in dict.fromkeys((arm, baseline)) if name not in dict(names).values()]
        n = numbers
        self.example = _choice("examples", [("choose one…", ""), *examples], "")
        self.prompt = w.Textarea(
            value=prompt, placeholder="a prompt", layout={"width": "98%", "height": "118px"}
        )
        self.arm = _choice("arm", names, arm)
        self.more = _more("such as top_p=0.9 or draft=FOLDER", "98%")
        self.device = _choice("device", list(dict.fromkeys([*devices(), device])), device, "190px")
        self.total_tokens = _number("total_tokens", n["total_tokens"], 1, 255, "nodes of the draft tree")
        self.depth = _number("depth", n["depth"], 1, 12, "drafting steps after the first level")
        self.top_k = _number("top_k", n["top_k"], 1, 16, "children of a node, and nodes of a frontier")
        heat = "0 is greedy; above it the target's distribution is sampled"
        self.temperature = _number("temperature", n["temperature"], 0.0, 2.0, heat)
        self.max_new_tokens = _number("max_new_tokens", n["max_new_tokens"], 1, 512, "tokens to decode")
        self.run = _action("Run", "primary", "decode the prompt")
        self.check = _action("Check", "", "hold the arm's mask builder against the reference")
        self.compare = _action("Compare", "", "time the arm against the baseline")
        self.baseline = _choice("against", names, baseline, "228px")
        self.more_baseline = _more("such as depth=5", "175px")
        self.iterations = _number("prompts", n["iterations"], 1, 40, "decoded by both arms in turn", "115px")
        least = "the smallest difference worth acting on"
        self.delta = _number("±δ, %", 100 * n["delta"], 0.1, 50.0, least, "115px")
        self.heading, self.saved, self.rule, self.finding = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.about, self.meter, self.story, self.verdict = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.finding_view, self.cycle_view, self.verdict_view = w.Output(), w.Output(), w.Output()
        self.tried = w.Select(options=[], rows=6, layout={"width": "99%"})
        self.tried.add_class("eagle-tried")
        self.save = _button("Save record", "", "all rows as JSON in the results folder", "110px")
        self.save_csv = _button("Save CSV", "", "all rows as CSV in the results folder", "110px")
        self.cycle = w.IntSlider(
            value=1, min=1, max=1, description="cycle", continuous_update=False, layout={"width": "60%"}
        )
        saves = w.HBox([self.save, self.save_csv, self.saved])
        self.table = w.VBox([self.heading, self.tried, saves], layout={"display": "none"})
        self.findings, self.result = w.VBox(), w.VBox()
        self.actions = (self.run, self.check, self.compare)
        self.view = self._placed()
        self.busy(None)

    def _placed(self) -> w.VBox:
        rival = (self.baseline, self.more_baseline, self.iterations, self.delta)
        for part in rival:
            part.style.description_width, part.layout.margin = "initial", "2px 6px"
        sizes = w.HBox([*(getattr(self, name) for name in SIZES), self.device], layout=WRAP)
        left = w.VBox([self.example, self.prompt], layout={"flex": "3 1 380px"})
        right = w.VBox([self.arm, self.more, sizes], layout={"flex": "2 1 400px"})
        rows = (
            w.HBox([left, right], layout=WRAP),
            self.run.row(),
            self.check.row(),
            self.compare.row(*rival),
        )
        arrive = w.Output(outputs=(page(render("arrive.html.j2", mark=f"eagle-arrive-{id(self)}")),))
        arrive.add_class("eagle-arrive")
        below = (self.rule, self.findings, self.table, self.result, arrive)
        view = w.VBox([w.HTML(render("console.html.j2")), *rows, *below], layout={"overflow": "hidden"})
        view.add_class("eagle-console")
        return view

    def busy(self, with_: Action | None) -> None:
        """While a work goes on, only its Stop can be pressed."""
        for action in self.actions:
            action.start.disabled = with_ is not None
            action.stop.disabled = action is not with_
        self.tried.disabled = with_ is not None

    def say(self, action: Action, what: str | None, **values: Any) -> None:
        """What goes on in words beside one action, None: nothing does; what stood beside the others is over."""
        for one in self.actions:
            one.status.value = progress(what, **values) if what and one is action else ""


def chart(figure: go.Figure) -> dict[str, Any]:
    """A figure as an output that can be assigned to `Output.outputs`, which never captures and so can't hang."""
    # plotly's own writer of JSON, for what it makes of numpy and of None; never "responsive": in a view of widgets a
    # resize, as a change of theme is one, then takes the chart's height from a box that has none
    bundle = {PLOTLY: json.loads(figure.to_json()) | {"config": {"displayModeBar": False}}}
    return {"output_type": "display_data", "data": bundle, "metadata": {}}


def page(html: str) -> dict[str, Any]:
    """HTML as an output that can be assigned to `Output.outputs`; scripts in it run."""
    return {"output_type": "display_data", "data": {"text/html": html}, "metadata": {}}


def after_each_cell(method: Callable[[], None]) -> None:
    """Call a method after every cell, as a cell may have added a strategy, for as long as its object lives."""
    shell = get_ipython()
    if shell is None:
        return
    alive = weakref.WeakMethod(method)

    def look(*_: object) -> None:
        found = alive()
        if found is None:
            shell.events.unregister("post_run_cell", look)
        else:
            found()

    shell.events.register("post_run_cell", look)
