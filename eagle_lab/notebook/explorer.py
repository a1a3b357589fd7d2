"""JupyterLab: controls to decode with, to look at a cycle, and to check and compare a strategy of one's own.

Nothing is captured: views get their outputs assigned, and text is the value of an HTML widget. Without a browser
everything works too, on values nobody sees. Runs and comparisons go on in a thread, so that Stop can be pressed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eagle_lab.decode.generate import Cycle
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.strategy import check as check_strategy
from eagle_lab.decode.strategy import parse
from eagle_lab.engines.arm import whole
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt, load_prompts
from eagle_lab.notebook import cards, controls
from eagle_lab.notebook.live import Live, Run, ids_of
from eagle_lab.report.charts.comparison import ratio_figure
from eagle_lab.report.charts.profile import stage_bars
from eagle_lab.report.charts.tree import cycle_figure, failure_figure, link_script
from eagle_lab.report.page import meaning as meaning_of
from eagle_lab.studies import recorded_trees as recorded
from eagle_lab.verdict.compare import Comparison, compare
from eagle_lab.verdict.mask_check import Finding, check, own, told

_marks = itertools.count(1)


def recorded_trees(count: int = 40) -> list[list[int]]:
    """Parents of some of the trees of 63 tokens that real decodes left in data/trees; none where there is no such file."""
    return recorded.read(63).parents[:count].tolist() if recorded.DEFAULT.exists() else []


class Stopped(RuntimeError):
    """The reader pressed Stop during a comparison."""


class Unsound(ValueError):
    """A mask builder of the reader's own does not equal the reference; Check shows where."""


class Explorer:
    """Controls and views over one pair. `view` is what to display; every button is a method too.

    Args: prompt: text, or token ids where the target has no tokenizer; prompts: what Compare decodes, as for
    `eagle_lab.compare`, None = the kit's own, or `prompt` where there is no tokenizer; trees: parents of recorded
    trees for Check beside those of the latest run, None = the kit's own.
    """

    def __init__(
        self,
        pair: Pair,
        prompt: str | Sequence[int] = "",
        *,
        strategy: str = "rebuild",
        baseline: str = "rebuild",
        total_tokens: int = 63,
        depth: int = 7,
        top_k: int = 10,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        pairs: int = 6,
        seed: int = 0,
        prompts: str | Sequence[str | Prompt | Sequence[int]] | None = None,
        trees: Sequence[Sequence[int]] | None = None,
        results_dir: str | Path | None = None,
    ) -> None:
        for name in (strategy, baseline):
            check_strategy(name, pair.device)
        self.pairs_by_device = {str(pair.device): pair}
        self.prompts = "heldout" if prompts is None and pair.tokenizer else prompts
        self.trees = recorded_trees() if trees is None else list(trees)
        self.seed, self.results_dir = seed, results_dir
        self.live = Live()
        self.last: Run | None = None
        self.comparison: Comparison | None = None
        self._cancel = threading.Event()
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        kit = load_prompts("heldout")[:40] if pair.tokenizer else []
        examples = [(f"{p.category}: {p.text[:60]}", p.text) for p in kit if isinstance(p.text, str)]
        sizes = {
            "total_tokens": total_tokens,
            "depth": depth,
            "top_k": top_k,
            "max_new_tokens": max_new_tokens,
        }
        self.controls = controls.build(
            text, examples, strategy, baseline, str(pair.device), sizes, temperature, pairs
        )
        self.view = self.controls.view()
        self._connect()

    def _connect(self) -> None:
        c = self.controls
        c.run.on_click(lambda _: self.run())
        c.stop.on_click(lambda _: self.stop())
        c.check.on_click(lambda _: self.check())
        c.compare.on_click(lambda _: self.compare())
        c.cycle.observe(lambda _: self.show_cycle(), "value")
        c.device.observe(lambda _: self.refresh(), "value")
        c.example.observe(lambda change: setattr(c.prompt, "value", change["new"] or c.prompt.value), "value")
        controls.after_each_cell(self)

    @property
    def pair(self) -> Pair:
        """The pair on the chosen device, loaded there on first use; ValueError for one that was put together by hand."""
        device = self.controls.device.value
        if device not in self.pairs_by_device:
            known = next(iter(self.pairs_by_device.values()))
            if not known.origin:
                raise ValueError(f"this pair was put together by hand, so it can't be loaded on {device}.")
            here = {"device": device, "dtype": None, "device_map": None, "tp_plan": None}
            kept = {name: value for name, value in known.origin.items() if name not in here}
            self.pairs_by_device[device] = load(**kept, device=device)
        return self.pairs_by_device[device]

    def refresh(self) -> None:
        """Offer the strategies there are now, one from a notebook's cell included."""
        names = controls.strategies(self.controls.device.value)
        for choice in (self.controls.strategy, self.controls.baseline):
            kept = choice.value
            offered = names if kept in names else [*names, kept]
            if list(choice.options) != offered:
                choice.options = offered
                choice.value = kept

    def sizes(self) -> dict[str, Any]:
        """The tree, the temperature and the length as the controls say."""
        names = ("total_tokens", "depth", "top_k", "temperature", "max_new_tokens")
        return {name: getattr(self.controls, name).value for name in names}

    def run(self, wait: bool = False) -> Run | None:
        """Decode the prompt; returns at once unless `wait`.

        Where it can't be done the page says why and None is returned; with `wait` that is raised as a ValueError.
        """
        c = self.controls

        def begin() -> Run:
            prompt, pair = ids_of(self.pair.tokenizer, c.prompt.value), self.pair
            self._demand_sound(c.strategy.value)
            c.legend.value = cards.legend(c.depth.value)
            c.busy(True)
            options = {"strategy": c.strategy.value, "seed": self.seed, **self.sizes()}
            run = self.live.start(pair, prompt, options, self._on_cycle, self._on_end, wait)
            if wait and run.error is not None:
                raise run.error
            return run

        return self._try(begin, wait)

    def _on_cycle(self, run: Run) -> None:
        self.controls.meter.value = cards.meter(run, done=False)
        self.controls.story.value = cards.story(run, self.pair.tokenizer)

    def _on_end(self, run: Run) -> None:
        c, self.last = self.controls, run
        try:
            if run.error is not None:
                self._try(run.reraise, False)
                return
            c.meter.value = cards.meter(run, done=True)
            if not run.cycles:  # interrupted before the first one
                return
            c.cycle.max = len(run.cycles)
            best = max(range(len(run.cycles)), key=lambda i: len(run.cycles[i].committed)) + 1
            if c.cycle.value != best:
                c.cycle.value = best  # its observer draws
            else:
                self.show_cycle()
        finally:
            c.busy(False)

    def cycle(self, number: int | None = None) -> Cycle:
        """A cycle of the latest run by its number from 1; the slider's where None.

        Raises ValueError before the first run.
        """
        if self.last is None or not self.last.cycles:
            raise ValueError("there is no cycle yet; press Run first.")
        return self.last.cycles[(number or self.controls.cycle.value) - 1]

    def show_cycle(self) -> None:
        """Draw the cycle that the slider is on."""
        if self.last is None or self.last.error is not None:
            return
        number = self.controls.cycle.value
        figure = cycle_figure(self.cycle(), self.pair.tokenizer, number)
        bars = stage_bars(
            self.last.stage_ranges(number),
            f"Time of cycle {number} by stage; whiskers: the run's shortest and longest",
        )
        script = controls.page(link_script(f"eagle-link-{next(_marks)}"))
        self.controls.cycle_view.outputs = (controls.chart(figure), script, controls.chart(bars))

    def stop(self) -> None:
        """End a run after its cycle, a comparison after its pair."""
        self.live.stop()
        self._cancel.set()

    def check(self, name: str | None = None) -> Finding:
        """Hold a strategy's mask builder against the reference and show what was found; the chosen one where None."""
        mask = parse(name or self.controls.strategy.value).mask
        seen = [[*c.parents[1:]] for c in self.last.cycles] if self.last else []
        finding = check(MASK_BUILDERS[mask], [*self.trees, *seen], self.pair.device, name=mask)
        self.controls.finding.value = cards.finding_card(finding)
        drawn: tuple[Any, ...] = ()
        if finding.expected is not None and len(finding.parents) <= 63:
            figure = failure_figure(finding.parents, finding.expected, finding.actual, mask)
            drawn = (controls.chart(figure),)
        self.controls.finding_view.outputs = drawn
        return finding

    def _demand_sound(self, strategy: str) -> None:
        """A reader's own mask builder must equal the reference before it decodes."""
        if own(MASK_BUILDERS[parse(strategy).mask]) and not (finding := self.check(strategy)).ok:
            raise Unsound(finding.fault)

    def compare(self, candidate: str | None = None, wait: bool = False, **changes: Any) -> None:
        """Time the strategy against the baseline in pairs and show the verdict; returns at once unless `wait`.

        Args: candidate: another strategy to choose first; changes: arguments of `eagle_lab.compare` that differ from
        what the controls say.
        """
        c = self.controls
        self.refresh()
        c.strategy.value = candidate or c.strategy.value

        def begin() -> None:
            for name in (c.strategy.value, c.baseline.value):
                self._demand_sound(name)
            self._cancel.clear()
            c.bar.value, c.bar.max, c.bar.layout.visibility = 0, c.pairs.value, "visible"
            c.busy(True)
            if wait:
                self._compare(changes)
                return
            work = threading.Thread(
                target=self._try, args=(lambda: self._compare(changes), False), daemon=True
            )
            work.start()

        self._try(begin, wait)

    def _on_sample(self, found: Comparison) -> None:
        taken, planned = len(found.record.iterations), found.record.settings.iterations
        self.controls.bar.max, self.controls.bar.value = planned, taken
        if self._cancel.is_set():
            raise Stopped(
                f"stopped after {taken} of {planned} pairs, which are in the record; there is no verdict."
            )

    def _compare(self, changes: dict[str, Any]) -> None:
        c = self.controls
        settings = {
            "baseline": c.baseline.value, "candidate": whole(c.strategy.value, c.baseline.value), "prompts": self.prompts,
            "seed": self.seed,
            "iterations": c.pairs.value, "forks": 1, "results_dir": self.results_dir, **self.sizes(),
        }  # fmt: skip
        try:
            if settings["prompts"] is None:
                settings["prompts"] = [ids_of(None, c.prompt.value)]
            found = compare(self.pair, progress=False, on_sample=self._on_sample, **(settings | changes))
            self.comparison = found
            meaning = meaning_of(found.verdict.decision)
            c.verdict.value = cards.verdict_card(found.verdict, c.baseline.value, c.strategy.value, meaning)
            c.verdict_view.outputs = (controls.chart(ratio_figure(found.record, found.verdict)),)
        finally:
            c.bar.layout.visibility = "hidden"
            c.busy(False)

    def _try(self, work: Callable[[], Any], wait: bool) -> Any:
        """Do it; what goes wrong is told on the page in a sentence, and raised as one where a cell waits for it."""
        self.controls.status.value = ""
        try:
            return work()
        except (
            Exception
        ) as error:  # a reader's builder may raise anything, and a thread has nobody else to tell
            strategy = self.controls.strategy.value
            if isinstance(error, Unsound):  # Check has shown that already
                words = str(error)
            else:
                words = told(MASK_BUILDERS[parse(strategy).mask], error, strategy)
                self.controls.status.value = cards.problem_card(words)
            if wait:
                raise ValueError(words) from None
            return None
