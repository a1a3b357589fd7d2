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
from eagle_lab.runtime import needs
from eagle_lab.runtime.needs import Needs
from eagle_lab.runtime.prepare import REGIONAL, fixed

WIDE = {"description_width": "110px"}


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


@dataclass
class Controls:
    """All widgets of the explorer."""

    prompt: w.Textarea
    example: w.Dropdown
    strategy: w.Dropdown
    device: w.Dropdown
    total_tokens: w.IntSlider
    depth: w.IntSlider
    top_k: w.IntSlider
    temperature: w.FloatSlider
    max_new_tokens: w.IntSlider
    run: w.Button
    stop: w.Button
    baseline: w.Dropdown
    pairs: w.IntSlider
    check: w.Button
    compare: w.Button
    status: w.HTML
    bar: w.IntProgress
    meter: w.HTML
    legend: w.HTML
    story: w.HTML
    cycle: w.IntSlider
    cycle_view: w.Output
    finding: w.HTML
    finding_view: w.Output
    verdict: w.HTML
    verdict_view: w.Output

    def view(self) -> w.VBox:
        """Everything in its place."""
        left = w.VBox([self.prompt, w.HBox([self.run, self.stop]), self.status], layout={"flex": "1 1 420px"})
        tree = (self.total_tokens, self.depth, self.top_k, self.temperature, self.max_new_tokens)
        right = w.VBox([self.example, self.strategy, self.device, *tree])
        own = w.HBox([self.baseline, self.pairs, self.check, self.compare], layout={"flex_flow": "row wrap"})
        children = [
            w.HBox([left, right], layout={"flex_flow": "row wrap"}),
            *(self.meter, self.legend, self.story, self.cycle, self.cycle_view),
            *(own, self.bar, self.finding, self.finding_view, self.verdict, self.verdict_view),
        ]
        return w.VBox(children, layout={"overflow": "hidden"})

    def busy(self, working: bool) -> None:
        """While a run or a comparison goes on, only Stop can be pressed."""
        for button in (self.run, self.check, self.compare):
            button.disabled = working
        self.stop.disabled = not working


def _slider(name: str, value: int, low: int, high: int) -> w.IntSlider:
    return w.IntSlider(
        value=value, min=low, max=max(high, value), description=name, continuous_update=False, style=WIDE
    )


def _choice(name: str, options: list[Any], value: Any) -> w.Dropdown:
    return w.Dropdown(options=options, value=value, description=name, style=WIDE)


def _button(name: str, style: str, tip: str) -> w.Button:
    return w.Button(description=name, button_style=style, tooltip=tip)


def build(
    prompt: str, examples: list[tuple[str, str]], strategy: str, baseline: str, device: str, sizes: dict[str, int],
    temperature: float, pairs: int,
) -> Controls:  # fmt: skip
    """The widgets with their first values; `sizes` has total_tokens, depth, top_k and max_new_tokens."""
    names = strategies(device)
    for name in (strategy, baseline):
        names += [name] if name not in names else []
    made = Controls(
        prompt=w.Textarea(value=prompt, placeholder="a prompt", layout={"width": "98%", "height": "160px"}),
        example=_choice("prompts", [("choose one…", ""), *examples], ""),
        strategy=_choice("strategy", names, strategy),
        device=_choice("device", list(dict.fromkeys([*devices(), device])), device),
        total_tokens=_slider("tree size", sizes["total_tokens"], 1, 255),
        depth=_slider("depth", sizes["depth"], 1, 12),
        top_k=_slider("top_k", sizes["top_k"], 1, 16),
        temperature=w.FloatSlider(
            value=temperature,
            min=0,
            max=2,
            step=0.1,
            description="temperature",
            continuous_update=False,
            style=WIDE,
        ),
        max_new_tokens=_slider("new tokens", sizes["max_new_tokens"], 1, 512),
        run=_button("Run", "primary", "decode the prompt"),
        stop=_button("Stop", "warning", "end after the cycle that is being decoded"),
        baseline=_choice("baseline", names, baseline),
        pairs=_slider("pairs", pairs, 1, 40),
        check=_button("Check", "", "hold the strategy's mask builder against the reference"),
        compare=_button("Compare", "", "time the strategy against the baseline, in pairs"),
        status=w.HTML(),
        bar=w.IntProgress(value=0, min=0, max=1, description="pairs", layout={"visibility": "hidden"}),
        meter=w.HTML(),
        legend=w.HTML(),
        story=w.HTML(),
        cycle=w.IntSlider(
            value=1, min=1, max=1, description="cycle", continuous_update=False, layout={"width": "60%"}
        ),
        cycle_view=w.Output(),
        finding=w.HTML(),
        finding_view=w.Output(),
        verdict=w.HTML(),
        verdict_view=w.Output(),
    )
    made.busy(False)
    return made


def chart(figure: go.Figure) -> dict[str, Any]:
    """A figure as an output that can be assigned to `Output.outputs`, which never captures and so can't hang."""
    # plotly's own writer of JSON, for what it makes of numpy and of None; never "responsive": in a view of widgets a
    # resize, as a change of theme is one, then takes the chart's height from a box that has none
    bundle = {
        "application/vnd.plotly.v1+json": json.loads(figure.to_json()) | {"config": {"displaylogo": False}}
    }
    return {"output_type": "display_data", "data": bundle, "metadata": {}}


def page(html: str) -> dict[str, Any]:
    """HTML as an output that can be assigned to `Output.outputs`; scripts in it run."""
    return {"output_type": "display_data", "data": {"text/html": html}, "metadata": {}}


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
