"""JupyterLab: the console. Controls to decode with, to look at a cycle, and to check and compare a strategy of one's own.

Nothing is captured: views get their outputs assigned, and text is the value of an HTML widget. Without a browser
everything works too, on values nobody sees. Long works go on in a thread, so that Stop can be pressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from eagle_lab.decode.generate import Cycle, check_prompt
from eagle_lab.decode.masks import MASK_BUILDERS, MaskBuilder
from eagle_lab.decode.strategy import check as check_strategy
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import cycles
from eagle_lab.measure import recorded_trees as recorded
from eagle_lab.measure.records import check_folder, made, write
from eagle_lab.models.pair import Pair, project_path
from eagle_lab.models.prompts import Prompt, load_prompts
from eagle_lab.notebook import cards, controls, tried
from eagle_lab.notebook.controls import PLAIN, SIZES, Action, Controls
from eagle_lab.notebook.live import Run, Stopped, Work, ids_of, seldom, watch
from eagle_lab.notebook.said import SAID, Of, Said, builder
from eagle_lab.report.charts.comparison import ratio_figure
from eagle_lab.report.charts.profile import stage_bars
from eagle_lab.report.charts.style import heading
from eagle_lab.report.charts.tree import cycle_figure, failure_figure, link_script
from eagle_lab.report.page import meaning as meaning_of
from eagle_lab.runtime.clock import Span
from eagle_lab.verdict.compare import RESULTS, Comparison, compare
from eagle_lab.verdict.mask_check import Finding, check, own, told

_marks = itertools.count(1)


def recorded_trees() -> list[list[int]]:
    """Parents of 40 of the trees of 63 tokens that real decodes left in data/trees; none where there is no such file."""
    return recorded.read(63).parents[:40].tolist() if recorded.DEFAULT.exists() else []


class Unsound(ValueError):
    """A mask builder of the reader's own does not equal the reference; Check shows where."""


@dataclass
class Entry:
    """A row of the table with its result: a run, or a comparison."""

    of: Of
    row: tried.Tried
    run: Run | None = None
    comparison: Comparison | None = None


class Explorer:
    """Controls and views over one pair. Display it; every button is a method too, which returns at once unless `wait`.

    Args: prompt: text, or token ids where the target has no tokenizer; strategy, baseline: what the controls begin with,
    "plain" for the target alone; prompts: what Compare decodes, as for `eagle_lab.compare`, None = the kit's own, or
    `prompt` where there is no tokenizer; trees: parents of recorded trees for Check beside those of the latest run, None
    = the kit's own.
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
        iterations: int = 6,
        delta: float = 0.01,
        seed: int = 0,
        prompts: str | Sequence[str | Prompt | Sequence[int]] | None = None,
        trees: Sequence[Sequence[int]] | None = None,
        results_dir: str | Path | None = None,
    ) -> None:
        for name in {strategy, baseline} - {PLAIN}:
            check_strategy(name, pair.device)
        self.prompts = "heldout" if prompts is None and pair.tokenizer else prompts
        self.trees = recorded_trees() if trees is None else list(trees)
        self.seed, self.results_dir = seed, RESULTS if results_dir is None else results_dir
        self.work = Work()
        self.entries: list[Entry] = []
        self.shown: Entry | None = None
        self._checked: MaskBuilder | None = None
        self._sound: set[MaskBuilder] = set()
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        kit = load_prompts("heldout")[:40] if pair.tokenizer else []
        examples = [(f"{p.category}: {p.text[:70]}", p.text) for p in kit if isinstance(p.text, str)]
        numbers = {
            "total_tokens": total_tokens, "depth": depth, "top_k": top_k, "temperature": temperature,
            "max_new_tokens": max_new_tokens, "iterations": iterations, "delta": delta,
        }  # fmt: skip
        self.controls = Controls(text, examples, strategy, baseline, str(pair.device), numbers)
        self.said = Said(pair, self.controls)
        self._connect()

    def _connect(self) -> None:
        c = self.controls
        for action, begin in zip(c.actions, (self.run, self.check, self.compare), strict=True):
            action.start.on_click(lambda _, begin=begin: begin())
            action.stop.on_click(lambda _: self.stop())
        c.save.on_click(lambda _: self._save(".json"))
        c.save_csv.on_click(lambda _: self._save(".csv"))
        c.cycle.observe(lambda _: self.show_cycle(), "value")
        c.tried.observe(lambda change: self.bring_back(change["new"]), "index")
        c.example.observe(lambda change: setattr(c.prompt, "value", change["new"] or c.prompt.value), "value")
        for name in SAID:
            getattr(c, name).observe(lambda _: self._mark(), "value")
        controls.after_each_cell(self.refresh)
        self._mark()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = self.controls.view._repr_mimebundle_(**options)
        return bundle | {"text/plain": "The console, which needs JupyterLab and a running kernel."}

    @property
    def last(self) -> Run | None:
        """The latest run; None before the first."""
        return next((entry.run for entry in reversed(self.entries) if entry.run), None)

    @property
    def comparison(self) -> Comparison | None:
        """The latest comparison; None before the first."""
        return next((entry.comparison for entry in reversed(self.entries) if entry.comparison), None)

    def refresh(self) -> None:
        """Offer the arms there are now, one from a notebook's cell included; a result of a builder since replaced dims."""
        offered = controls.arms(self.controls.device.value)
        for choice in (self.controls.arm, self.controls.baseline):
            kept = choice.value
            names = offered if kept in dict(offered).values() else [*offered, (kept, kept)]
            if list(choice.options) != names:
                choice.options = names
                choice.value = kept
        self._mark()

    def _mark(self) -> None:
        """Dim what is not of what the controls say; tell the rule that a comparison of them would have."""
        c, would = self.controls, self.said.now(True)
        same = would is not None and would.arms[0] == would.arms[1]
        c.rule.value = cards.html("rule", iterations=c.iterations.value, delta=c.delta.value / 100, same=same)
        if self.shown is not None:
            of = self.shown.of
            stale = of != self.said.now(len(of.arms) > 1)
            c.about.value = cards.html("about", of=of, own_head=self.said.own_head, stale=stale)
            (c.result.add_class if stale else c.result.remove_class)("eagle-stale")
        # a finding of a builder that no control names would stand between the controls and their result
        current = would is not None and self._checked is not None and self._checked in would.builders
        found = (c.finding, c.finding_view) if current else ()
        if c.findings.children != found:
            c.findings.children = found

    def stop(self) -> None:
        """End a run after its cycle, a check after its tree, a comparison after its stretch of text."""
        self.work.stop()
        c = self.controls
        for action in c.actions:
            if self.work.running and not action.stop.disabled:
                action.stop.disabled = True
                c.say(action, "stopping")

    def _begin(self, action: Action, job: Callable[[], Any], wait: bool, **values: Any) -> Any:
        """Do a long work of these values of the controls. What goes wrong is told beside its button, and raised as a
        sentence where a cell waits for it."""
        c = self.controls
        self.work.demand_free()
        c.say(action, "starting")  # at once, for listing the arms takes a while
        c.busy(action)
        try:
            self.refresh()
            for name, value in values.items():
                getattr(c, name).value = value
        except BaseException:  # an arm that is not in the list, or the kernel's own stop
            c.busy(None)
            c.say(action, None)
            raise

        def work() -> Any:
            try:
                return job()
            except Stopped:
                c.say(action, "stopped")
            except Exception as error:  # a reader's builder may raise anything, and a thread has nobody else
                words = self._told(error)
                if isinstance(error, Unsound):
                    c.say(action, "unsound")
                else:
                    action.status.value = cards.problem_card(words)
                if wait:
                    raise ValueError(words) from None
            finally:
                c.busy(None)
                self._mark()
            return None

        return self.work.start(work, wait)

    def _told(self, error: Exception) -> str:
        """Any error in a sentence: the reader's own line where it comes out of their builder."""
        of = None if isinstance(error, Unsound) else self.said.now(True)
        builds = [(a.strategy.mask, b) for a, b in zip(of.arms, of.builders, strict=True) if b] if of else []
        words = [told(build, error, mask) for mask, build in builds]
        return next((text for text in words if " in line " in text), words[0] if words else str(error))

    def _of(self, action: Action, compared: bool = False) -> Of:
        """What the controls say, every pair that this process decodes by loaded; words tell that it is being loaded."""
        c = self.controls
        if not self.said.loaded:
            c.say(action, "loading", device=c.device.value)
        of = self.said.of(compared)
        for head in filter(None, map(self.said.absent_head, of.arms)):
            c.say(action, "loading_head", head=head)
        return of

    def run(self, wait: bool = False) -> Run | None:
        """Decode the prompt. Where it can't be done the page says why; with `wait` that is raised as a ValueError."""
        return self._begin(self.controls.run, self._run, wait)

    def _run(self) -> Run:
        c = self.controls
        of = self._of(c.run)
        (arm,) = of.arms
        pair = self.said.pair_of(arm)
        prompt = ids_of(pair.tokenizer, c.prompt.value)
        check_prompt(pair, prompt, of.max_new_tokens)
        self._demand_sound(arm, c.run)
        c.say(c.run, "reading" if arm.plain else "preparing", tokens=len(prompt))
        run, draw = Run(of.max_new_tokens), seldom(self._draw_text)
        entry = Entry(of, tried.begun(of, self.said.pair, self.seed), run)

        def opened(span: Span) -> Iterator[Cycle]:
            return cycles(self.said.pair, arm, prompt, of.max_new_tokens, self.seed, span, record=True)

        def on_cycle(run: Run) -> None:
            if len(run.cycles) == 1:
                self._show(entry)
                c.say(c.run, "decoding")
            draw(run)
            self.work.go_on()

        def on_prefill() -> None:
            self.work.go_on()
            c.say(c.run, "reading", tokens=len(prompt))

        try:
            watch(pair, run, opened, on_prefill, on_cycle)
        finally:
            if run.cycles:
                entry.row = entry.row.model_copy(update=tried.measured(run))
                self._keep(entry)
        c.say(c.run, "stopped" if run.stopped else None)
        return run

    def _keep(self, entry: Entry) -> None:
        """Put a result into the table, and show it."""
        self.entries.append(entry)
        c = self.controls
        c.heading.value = cards.html("tried", columns=tried.heading())
        c.table.layout.display = ""
        self._show(entry)
        c.tried.options = [tried.line(one.row, number) for number, one in enumerate(self.entries, 1)]
        c.tried.index = len(self.entries) - 1

    def bring_back(self, index: int | None) -> None:
        """Show a row's result again, and set the controls to what it is of."""
        if index is None or self.controls.tried.disabled or self.entries[index] is self.shown:
            return
        entry = self.entries[index]
        for name, value in entry.of.said.items():
            getattr(self.controls, name).value = value
        self._show(entry)
        self.controls.tried.index = index

    def _show(self, entry: Entry) -> None:
        """Show a result: a run as far as it has come, or a comparison."""
        c, self.shown = self.controls, entry
        if (run := entry.run) is not None:
            self._draw_text(run)
            best = max(range(len(run.cycles)), key=lambda i: len(run.cycles[i].committed)) + 1
            c.cycle_view.outputs = ()
            tree = run.stages and run.cycles[0].parents
            c.result.children = (c.about, c.meter, c.story, *((c.cycle, c.cycle_view) if tree else ()))
            if tree:
                c.cycle.max = len(run.cycles)
                if c.cycle.value != best:
                    c.cycle.value = best  # its observer draws
                else:
                    self.show_cycle()
        if entry.comparison is not None:
            v, row = entry.comparison.verdict, entry.row
            meaning = meaning_of(v.decision) if entry.comparison.record.finished else ""
            c.verdict.value = cards.verdict_card(v, str(row.against), row.arm, meaning)
            c.verdict_view.outputs = (controls.chart(ratio_figure(entry.comparison.record, v)),)
            c.result.children = (c.about, c.verdict, c.verdict_view)
        self._mark()

    def _draw_text(self, run: Run) -> None:
        self.controls.meter.value = cards.html("meter", run=run)
        self.controls.story.value = cards.story(run)

    def cycle(self, number: int | None = None) -> Cycle:
        """A cycle of the run that is shown, by its number from 1; the slider's where None.

        Raises ValueError before the first run.
        """
        if self.shown is None or self.shown.run is None:
            raise ValueError("there is no cycle yet; press Run first.")
        return self.shown.run.cycles[(number or self.controls.cycle.value) - 1]

    def show_cycle(self) -> None:
        """Draw the cycle that the slider is on."""
        if self.shown is None or self.shown.run is None or not self.shown.run.stages:
            return
        number = self.controls.cycle.value
        figure = cycle_figure(self.cycle(), self.said.tokenizer, number)
        bars = stage_bars(self.shown.run.stage_ranges(number), "")
        heading(bars, f"Time of cycle {number} by stage", "whiskers: the run's shortest and longest")
        script = controls.page(link_script(f"eagle-link-{next(_marks)}"))
        self.controls.cycle_view.outputs = (controls.chart(figure), script, controls.chart(bars))

    def check(self, name: str | None = None, wait: bool = False) -> Finding | None:
        """Hold a strategy's mask builder against the reference and show what was found; the chosen arm's where None."""
        action, chosen = self.controls.check, {"arm": name} if name else {}
        return self._begin(action, lambda: self._check(self._of(action).arms[0], action), wait, **chosen)

    def _check(self, arm: Arm, action: Action) -> Finding:
        if arm.plain:
            raise ValueError("plain decoding has no mask to check.")
        c, mask = self.controls, arm.strategy.mask
        c.finding.value, c.finding_view.outputs, self._checked = "", (), None
        say = seldom(lambda count: c.say(action, "checking", name=mask, count=count))

        def on_tree(count: int) -> None:
            self.work.go_on()
            say(count)

        last, build = self.last, MASK_BUILDERS[mask]
        seen = [[*cycle.parents[1:]] for cycle in last.cycles if cycle.parents] if last else []
        finding = check(build, [*self.trees, *seen], self.said.pair.device, name=mask, on_tree=on_tree)
        if finding.ok:
            self._sound.add(build)
        self._checked = build
        c.finding.value = cards.finding_card(finding)
        if finding.expected is not None and finding.actual is not None and len(finding.parents) <= 63:
            figure = failure_figure(finding.parents, finding.expected, finding.actual, mask)
            c.finding_view.outputs = (controls.chart(figure),)
        c.say(action, None)
        self._mark()
        return finding

    def _demand_sound(self, arm: Arm, action: Action) -> None:
        """A reader's own mask builder must equal the reference before it decodes."""
        build = builder(arm)
        if build and own(build) and build not in self._sound:
            finding = self._check(arm, action)
            if not finding.ok:
                raise Unsound(finding.fault)

    def compare(self, candidate: str | None = None, wait: bool = False, **changes: Any) -> Comparison | None:
        """Time the arm against the baseline, cycle by cycle in this process, and show the estimate as it narrows.

        Args: candidate: another arm to choose first; changes: values that the controls of these names are given first. A
        comparison that is stopped has no verdict; its record keeps what was measured.
        """
        chosen = changes | ({"arm": candidate} if candidate else {})
        return self._begin(self.controls.compare, self._compare, wait, **chosen)

    def _compare(self) -> Comparison:
        c = self.controls
        of, total = self._of(c.compare, compared=True), c.iterations.value
        for arm in of.arms:
            self._demand_sound(arm, c.compare)
        c.say(c.compare, "agreeing")
        entry, begun, stretches = Entry(of, tried.begun(of, self.said.pair, self.seed)), perf_counter(), 0

        def say() -> None:
            found = entry.comparison
            taken = len(found.record.iterations) if found else 0
            left = (perf_counter() - begun) / taken * (total - taken) if taken else None
            so_far = found.verdict if found else None
            c.say(
                c.compare, "comparing", cycles=stretches, taken=taken, total=total, left=left, so_far=so_far
            )

        say_seldom = seldom(say)

        def on_stretch(_: object) -> None:
            nonlocal begun, stretches
            begun, stretches = begun if stretches else perf_counter(), stretches + 1
            say_seldom()
            self.work.go_on()

        def on_sample(found: Comparison) -> None:
            entry.comparison = found
            self._show(entry)
            say()
            if len(found.record.iterations) < total:
                self.work.go_on()

        try:
            entry.comparison = compare(
                self.said.pair, baseline=of.arms[1], candidate=of.arms[0], seed=self.seed, iterations=total,
                prompts=[ids_of(None, c.prompt.value)] if self.prompts is None else self.prompts, forks=1,
                delta=c.delta.value / 100, results_dir=self.results_dir, progress=False,
                on_sample=on_sample, on_stretch=on_stretch, **{name: of.said[name] for name in SIZES},
            )  # fmt: skip
            c.say(c.compare, None)
        except Stopped:
            if entry.comparison is None:
                raise
            taken = len(entry.comparison.record.iterations)
            c.say(c.compare, "kept", taken=taken, total=total, path=entry.comparison.path)
        entry.row = entry.row.model_copy(update=tried.judged(entry.comparison))
        self._keep(entry)
        return entry.comparison

    def save(self, ending: str = ".json") -> Path:
        """Write the table into the results folder, as a record or, with ".csv", as CSV; returns where.

        Raises ValueError where the folder can't be written.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
        path = check_folder(self.results_dir) / f"console-{stamp}{ending}"
        rows = [entry.row for entry in self.entries]
        if ending == ".csv":
            path.write_text(tried.as_csv(rows), encoding="utf-8")
            return path
        pair = self.said.pair
        target, draft = project_path(pair.target_name), project_path(pair.draft_name)
        write(tried.ConsoleRecord(**made(str(pair.device)), target=target, draft=draft, tried=rows), path)
        return path

    def _save(self, ending: str) -> None:
        try:
            self.controls.saved.value = cards.progress("saved", path=self.save(ending))
        except ValueError as error:
            self.controls.saved.value = cards.problem_card(str(error))
