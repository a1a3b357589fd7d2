"""The widgets themselves: what each one is called, its range and its place. What they do is in `explorer`."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import ipywidgets as w
import plotly.graph_objects as go
import torch
from IPython import get_ipython

from eagle_lab.decode.attention import SPLIT
from eagle_lab.decode.masks import NEEDS
from eagle_lab.decode.strategy import AXES, Strategy, check, parse, waits_for_host
from eagle_lab.report.words import render
from eagle_lab.runtime import needs
from eagle_lab.runtime.needs import Needs
from eagle_lab.runtime.prepare import REGIONAL, fixed

PLAIN = "plain"  # the target alone, an arm like any other
FIELD = {"description_width": "112px"}
SIZES = ("total_tokens", "depth", "top_k", "temperature", "max_new_tokens")


def strategies(device: torch.device | str) -> list[str]:
    """Every choice of each axis in a strategy that can run on the device, the baseline first.

    Alone, all else as in the baseline; where it doesn't go with that, with the first choices that it does go with.
    """
    found = ["rebuild"]
    for axis, names in AXES.items():
        for name in names:
            if name != getattr(Strategy(), axis) and not _missing(axis, name, device):
                alone = (
                    axis == "mask"
                )  # goes with all that is usual, and a reader's builder must not run for a list
                way = next((text for text in _ways(axis, name) if alone or _runs(text, device)), None)
                found += [way] if way else []
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
        for attention, mask in product(reversed(SPLIT), masks):
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
        return w.HBox([self.start, self.stop, *more, self.status], layout={"flex_flow": "row wrap"})


@dataclass
class Controls:
    """All widgets of the console."""

    prompt: w.Textarea
    example: w.Dropdown
    arm: w.Dropdown
    more: w.Text
    device: w.Dropdown
    total_tokens: w.BoundedIntText
    depth: w.BoundedIntText
    top_k: w.BoundedIntText
    temperature: w.BoundedFloatText
    max_new_tokens: w.BoundedIntText
    run: Action
    check: Action
    compare: Action
    baseline: w.Dropdown
    more_baseline: w.Text
    iterations: w.BoundedIntText
    delta: w.BoundedFloatText
    rule: w.HTML
    finding: w.HTML
    finding_view: w.Output
    heading: w.HTML
    tried: w.Select
    save: w.Button
    save_csv: w.Button
    saved: w.HTML
    about: w.HTML
    meter: w.HTML
    story: w.HTML
    cycle: w.IntSlider
    cycle_view: w.Output
    verdict: w.HTML
    verdict_view: w.Output
    table: w.VBox
    result: w.VBox

    def view(self) -> w.VBox:
        """Everything in its place."""
        left = w.VBox([self.example, self.prompt], layout={"flex": "3 1 380px"})
        fields = [getattr(self, name) for name in SIZES]
        sizes = w.HBox([*fields, self.device], layout={"flex_flow": "row wrap"})
        right = w.VBox([self.arm, self.more, sizes], layout={"flex": "2 1 400px"})
        top = w.HBox([left, right], layout={"flex_flow": "row wrap"})
        actions = [
            self.run.row(),
            self.check.row(),
            self.compare.row(self.baseline, self.more_baseline, self.iterations, self.delta),
            self.rule,
        ]
        view = w.VBox(
            [w.HTML(render("console.html.j2")), top, *actions, self.finding, self.finding_view, self.table, self.result],
            layout={"overflow": "hidden"},
        )  # fmt: skip
        view.add_class("eagle-console")
        return view

    def busy(self, with_: Action | None) -> None:
        """While a work goes on, only its Stop can be pressed."""
        for action in (self.run, self.check, self.compare):
            action.start.disabled = with_ is not None
            action.stop.disabled = action is not with_
        self.tried.disabled = with_ is not None

    def say(self, action: Action, html: str) -> None:
        """Words beside one action; what stood beside the others is over."""
        for one in (self.run, self.check, self.compare):
            one.status.value = html if one is action else ""


def _number(name: str, value: int, low: int, high: int, tip: str) -> w.BoundedIntText:
    made = w.BoundedIntText(value=value, min=low, max=max(high, value), description=name, style=FIELD)
    made.layout.width, made.tooltip = "190px", f"{tip}; {low} to {made.max}"
    return made


def _share(name: str, value: float, low: float, high: float, tip: str) -> w.BoundedFloatText:
    made = w.BoundedFloatText(value=value, min=low, max=high, step=0.1, description=name, style=FIELD)
    made.layout.width, made.tooltip = "190px", f"{tip}; {low} to {high}"
    return made


def _choice(name: str, options: list[Any], value: Any, width: str = "98%") -> w.Dropdown:
    return w.Dropdown(options=options, value=value, description=name, style=FIELD, layout={"width": width})


def _more(tip: str, width: str) -> w.Text:
    return w.Text(
        placeholder=tip, description="and", continuous_update=False, style=FIELD, layout={"width": width}
    )


def _button(name: str, style: str, tip: str, width: str = "88px") -> w.Button:
    return w.Button(description=name, button_style=style, tooltip=tip, layout={"width": width})


def _action(name: str, style: str, tip: str) -> Action:
    stop = _button("Stop", "", f"end what {name} has begun", "64px")
    return Action(_button(name, style, tip), stop, w.HTML(layout={"flex": "1 1 300px"}))


def build(
    prompt: str, examples: list[tuple[str, str]], arm: str, baseline: str, device: str, sizes: dict[str, int],
    temperature: float, iterations: int, delta: float,
) -> Controls:  # fmt: skip
    """The widgets with their first values; `sizes` has total_tokens, depth, top_k and max_new_tokens."""
    names = arms(device)
    for name in (arm, baseline):
        names += [(name, name)] if name not in dict(names).values() else []
    heat = _share(
        "temperature", temperature, 0, 2, "0 is greedy; above it the target's distribution is sampled"
    )
    heading = w.HTML()
    tried = w.Select(options=[], rows=6, layout={"width": "99%"})
    tried.add_class("eagle-tried")
    save = _button("Save record", "", "all rows as JSON in the results folder", "110px")
    save_csv = _button("Save CSV", "", "all rows as CSV in the results folder", "110px")
    saved = w.HTML()
    table = w.VBox([heading, tried, w.HBox([save, save_csv, saved])], layout={"display": "none"})
    made = Controls(
        prompt=w.Textarea(value=prompt, placeholder="a prompt", layout={"width": "98%", "height": "118px"}),
        example=_choice("prompts", [("choose one…", ""), *examples], ""),
        arm=_choice("arm", names, arm),
        more=_more("such as top_p=0.9 or draft=FOLDER", "98%"),
        device=_choice("device", list(dict.fromkeys([*devices(), device])), device, "190px"),
        total_tokens=_number("total_tokens", sizes["total_tokens"], 1, 255, "nodes of the draft tree"),
        depth=_number("depth", sizes["depth"], 1, 12, "drafting steps after the first level"),
        top_k=_number("top_k", sizes["top_k"], 1, 16, "children of a node, and nodes of a frontier"),
        temperature=heat,
        max_new_tokens=_number("max_new_tokens", sizes["max_new_tokens"], 1, 512, "tokens to decode"),
        run=_action("Run", "primary", "decode the prompt"),
        check=_action("Check", "", "hold the arm's mask builder against the reference"),
        compare=_action("Compare", "", "time the arm against the baseline"),
        baseline=_choice("against", names, baseline, "240px"),
        more_baseline=_more("such as total_tokens=24", "210px"),
        iterations=_number("prompts", iterations, 1, 40, "prompts that both decode in turn, cycle by cycle"),
        delta=_share("±δ, %", 100 * delta, 0.1, 50, "the smallest difference worth acting on"),
        rule=w.HTML(),
        finding=w.HTML(),
        finding_view=w.Output(),
        heading=heading,
        tried=tried,
        save=save,
        save_csv=save_csv,
        saved=saved,
        about=w.HTML(),
        meter=w.HTML(),
        story=w.HTML(),
        cycle=w.IntSlider(
            value=1, min=1, max=1, description="cycle", continuous_update=False, layout={"width": "60%"}
        ),
        cycle_view=w.Output(),
        verdict=w.HTML(),
        verdict_view=w.Output(),
        table=table,
        result=w.VBox(),
    )
    for part in (made.baseline, made.more_baseline, made.iterations, made.delta):
        part.style.description_width, part.layout.margin = "initial", "2px 6px"
    made.iterations.layout.width = made.delta.layout.width = "115px"
    made.busy(None)
    return made


def chart(figure: go.Figure) -> dict[str, Any]:
    """A figure as an output that can be assigned to `Output.outputs`, which never captures and so can't hang."""
    # plotly's own writer of JSON, for what it makes of numpy and of None; never "responsive": in a view of widgets a
    # resize, as a change of theme is one, then takes the chart's height from a box that has none
    bundle = {
        "application/vnd.plotly.v1+json": json.loads(figure.to_json()) | {"config": {"displayModeBar": False}}
    }
    return {"output_type": "display_data", "data": bundle, "metadata": {}}


def page(html: str) -> dict[str, Any]:
    """HTML as an output that can be assigned to `Output.outputs`; scripts in it run."""
    return {"output_type": "display_data", "data": {"text/html": html}, "metadata": {}}


def dim(part: w.DOMWidget, stale: bool) -> None:
    """Show that something isn't of what the controls say now, or that it is again."""
    (part.add_class if stale else part.remove_class)("eagle-stale")


def fixed_pitch(text: str) -> str:
    """A line whose blanks a list of the browser keeps."""
    return text.replace(" ", "\u00a0")


class Refreshed(Protocol):
    """Something that wants to know when a cell has run."""

    def refresh(self) -> None:
        """Look again at what there is."""


def after_each_cell(explorer: Refreshed) -> None:
    """Refresh after every cell, as a cell may have added a strategy, for as long as the explorer lives."""
    shell = get_ipython()
    if shell is None:
        return
    alive = weakref.ref(explorer)

    def look(*_: object) -> None:
        found = alive()
        if found is None:
            shell.events.unregister("post_run_cell", look)
        else:
            found.refresh()

    shell.events.register("post_run_cell", look)
