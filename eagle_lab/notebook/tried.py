"""What was tried in the console: a row a run or comparison, as a line of its table, as a record and as CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field

from eagle_lab.engines.arm import written
from eagle_lab.engines.here import base_arm
from eagle_lab.measure.records import Part, Record
from eagle_lab.models.pair import Pair
from eagle_lab.notebook.live import Run
from eagle_lab.notebook.said import Of
from eagle_lab.verdict.compare import Comparison
from eagle_lab.verdict.stats import Decision


class Tried(Part):
    """One run, or one comparison `against` another arm, which has the verdict and the name of its own record.

    arm: its written form without tree and sampling; against: its written form on top of the arm's. tokens: new ones; tau:
    tokens committed a cycle; tokens_per_s: after the first cycle, so without prefill; cycle_s: median seconds of a cycle,
    the first left out. A ratio is of times, arm over `against`.
    """

    arm: str
    against: str | None = None
    device: str
    prompt: str | None = None
    total_tokens: int | None = None
    depth: int | None = None
    top_k: int | None = None
    temperature: float
    top_p: float = 1.0
    top_k_sampling: int = 0
    max_new_tokens: int
    seed: int
    stopped: bool = False
    tokens: int | None = None
    cycles: int | None = None
    tau: float | None = None
    tokens_per_s: float | None = None
    cycle_s: float | None = None
    verdict: Decision | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    record: str | None = None


class ConsoleRecord(Record):
    """The table of a console, in order of time. Times are one run's each, under whatever load there was."""

    schema_name: Literal["eagle_lab.console.v1"] = Field("eagle_lab.console.v1", alias="schema")
    target: str
    draft: str
    tried: list[Tried] = []


def begun(of: Of, pair: Pair, seed: int) -> Tried:
    """The row of a result before there is one."""
    arm, since = of.arms[0], base_arm(pair)
    own = {} if arm.plain else asdict(arm.shape)
    return Tried(
        arm=written(arm, replace(since, shape=arm.shape, sampling=arm.sampling)),
        against=written(of.arms[1], arm) if len(of.arms) > 1 else None,
        prompt=of.prompt, device=of.device, max_new_tokens=of.max_new_tokens, seed=seed,
        **own, **asdict(arm.sampling),
    )  # fmt: skip


def measured(run: Run) -> dict[str, Any]:
    """What a run adds to its row."""
    return {
        "stopped": run.stopped, "tokens": len(run.tokens), "cycles": len(run.cycles),
        "tau": run.acceptance_length, "tokens_per_s": run.speed, "cycle_s": run.cycle_time,
    }  # fmt: skip


def judged(found: Comparison) -> dict[str, Any]:
    """What a comparison adds to its row; one that was stopped has no verdict."""
    v, ended = found.verdict, found.record.finished is not None
    ends = zip(("low", "ratio", "high"), v.interval, strict=True)
    known = {name: end for name, end in ends if math.isfinite(end)}
    return {
        "verdict": v.decision if ended else None,
        "stopped": not ended,
        "record": found.path.name,
        **known,
    }


COLUMNS = (("arm", 34), ("tree", 11), ("τ", 6), ("tokens/s", 10), ("ms/cycle", 10), ("verdict", 0))


def heading() -> str:
    """The names of the columns of `line`."""
    return "".join(name.ljust(width) for name, width in (("#", 4), *COLUMNS))


def line(row: Tried, number: int) -> str:
    """A row as text in columns, for a list of a fixed pitch: its blanks are such that a browser keeps."""
    arm = f"{row.arm} : {row.against}" if row.against else row.arm
    arm = arm.replace("mask=", "")
    tree = "–" if row.total_tokens is None else f"{row.total_tokens}/{row.depth}/{row.top_k}"
    figures = [
        "–" if value is None else f"{value:.{digits}f}"
        for value, digits in ((row.tau, 2), (row.tokens_per_s, 1), (row.cycle_s and row.cycle_s * 1e3, 1))
    ]
    words = "stopped" if row.stopped else "" if row.verdict is None else row.verdict.replace("_", " ")
    if row.ratio is not None:
        words += f" {row.ratio:.3f}"
    cells = [arm if len(arm) < 34 else arm[:32] + "…", tree, *figures, words]
    text = "".join(c.ljust(width) for c, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"{number:<4}{text}".replace(" ", "\u00a0")


def as_csv(rows: list[Tried]) -> str:
    """All rows as CSV with a header; an empty cell stands for what a row doesn't have."""
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(Tried.model_fields), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(row.model_dump(mode="json") for row in rows)
    return text.getvalue()
