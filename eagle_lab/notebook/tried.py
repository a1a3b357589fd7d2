"""What was tried in the console: a row a run or comparison, as a line of its table, as a record and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Literal

from pydantic import Field

from eagle_lab.measure.records import Part, Record
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


COLUMNS = (("arm", 34), ("tree", 11), ("τ", 6), ("tokens/s", 10), ("ms/cycle", 10), ("verdict", 0))


def heading() -> str:
    """The names of the columns of `line`."""
    return "".join(name.ljust(width) for name, width in (("#", 4), *COLUMNS))


def line(row: Tried, number: int) -> str:
    """A row as text in columns, for a list of a fixed pitch."""
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
    return f"{number:<4}" + "".join(c.ljust(width) for c, (_, width) in zip(cells, COLUMNS, strict=True))


def as_csv(rows: list[Tried]) -> str:
    """All rows as CSV with a header; an empty cell stands for what a row doesn't have."""
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(Tried.model_fields), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(row.model_dump(mode="json") for row in rows)
    return text.getvalue()
