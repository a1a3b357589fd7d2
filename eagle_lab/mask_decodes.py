"""What the best mask builder of a sweep brings in whole decodes: `compare` against `rebuild`, and both gains in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_lab import sweep_report
from eagle_lab.compare import compare
from eagle_lab.models import Pair
from eagle_lab.prompts import Prompt
from eagle_lab.records import Record
from eagle_lab.stats import Verdict
from eagle_lab.summary import ceiling, verdict_of

NODES = 63


def in_decodes(
    record: Record,
    pair: Pair,
    *,
    nodes: int = NODES,
    iterations: int = 20,
    forks: int = 1,
    max_new_tokens: int = 32,
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    results_dir: str | Path | None = None,
) -> dict[str, Any]:
    """The fastest builder of `nodes` against `rebuild` in whole decodes on the sweep's device; → JSON values.

    "builder", "nodes" and "comparison", the record of the comparison. Raises ValueError where the sweep has no number.
    """
    top = sweep_report.best(record, nodes)
    if top is None:
        raise ValueError(f"the sweep has no builder with a time at {nodes} nodes.")
    done = compare(
        pair, baseline=sweep_report.BASELINE, candidate=top[0], total_tokens=nodes, iterations=iterations, forks=forks,
        max_new_tokens=max_new_tokens, prompts=prompts, results_dir=results_dir, progress=False,
    )  # fmt: skip
    return {"builder": top[0], "nodes": nodes, "comparison": done.record}


def verdicts(record: Record) -> dict[str, Verdict]:
    """The verdict on the builder that was tried in whole decodes, by its name; empty where none was."""
    found = record.get("end_to_end")
    return {found["builder"]: verdict_of(found["comparison"])} if found else {}


def whole_words(record: Record) -> str:
    """The gain alone beside the gain in whole decodes, and the most that it could have been, as Markdown."""
    found = record.get("end_to_end")
    if not found:
        return "What the best builder brings in whole decodes is not measured yet."
    name, nodes, compared = found["builder"], found["nodes"], found["comparison"]
    words = sweep_report.beside(record, name, nodes, verdict_of(compared))
    target = compared["settings"]["target"].rpartition("/")[2]
    top = ceiling(compared)
    most = (
        f" The mask takes {top.share:.2%} of a decode, so no builder could bring more than {top.gain:.2%}."
        if top
        else ""
    )
    return f"{words}{most} ({target}, {compared['settings']['dtype']})"
