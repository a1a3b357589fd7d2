"""What engines.ipynb measures: this kit beside the engines that are there, and a reason for each that isn't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.measure.pairs import ARMS
from eagle_lab.models.pair import Pair
from eagle_lab.report.page import told
from eagle_lab.report.words import plain
from eagle_lab.runtime.checks import first_line
from eagle_lab.verdict.compare import Comparison, compare
from eagle_lab.verdict.summary import table

COLUMNS = ("E2E latency", "TTFT", "TPOT", "ITL", "a cycle", "mean_acceptance_length", "output throughput")
TITLES = {"mean_acceptance_length": "τ"}


def beside(
    pair: Pair, baseline: str, others: Mapping[str, str], **options: Any
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """The baseline against each other arm, by name; and for each that can't be compared, why.

    options: of `compare`.
    """
    found, missing = {}, {}
    for name, text in others.items():
        try:
            done = compare(pair, baseline=baseline, candidate=text, progress=False, **options)
            if done.verdict.pairs:
                found[name] = done
            else:  # the machine was busy with something else
                missing[name] = " ".join(told(done.record, done.verdict))
        except (EngineFailed, ValueError, OSError) as error:
            missing[name] = first_line(error)
    return found, missing


def metrics(found: Mapping[str, Comparison]) -> list[dict[str, str]]:
    """The medians of every arm that was measured, a row each, for `words.table`; "–" for what an engine doesn't tell."""
    measured = {name: {row.metric: row for row in table(done.record)} for name, done in found.items()}
    units = {row.metric: row.unit for rows in measured.values() for row in rows.values()}
    shown = []
    for name, done in found.items():
        arms = zip(ARMS, (f"baseline beside {name}", name), done.record.arms, strict=True)
        for side, label, one in arms:
            medians = {metric: getattr(row, side)[1] for metric, row in measured[name].items()}
            numbers = {
                f"{TITLES.get(m, m)}, {units[m]}": plain(medians.get(m, math.nan))
                for m in COLUMNS
                if m in units
            }
            shown.append({"arm": label, "engine": f"{one.engine} {one.version}", **numbers})
    return shown
