"""What engines.ipynb measures: this kit beside the engines that are there, and a reason for each that isn't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.models.pair import Pair
from eagle_lab.report.page import told
from eagle_lab.runtime.checks import first_line
from eagle_lab.verdict.compare import Comparison, compare
from eagle_lab.verdict.summary import table

COLUMNS = ("E2E latency", "TTFT", "TPOT", "ITL", "a cycle", "mean_acceptance_length", "output throughput")


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


def metrics(found: Mapping[str, Comparison]) -> pd.DataFrame:
    """The medians of every arm that was measured, a row each: milliseconds, tokens a cycle, tokens/s."""
    rows = {}
    for name, comparison in found.items():
        arms = comparison.record.arms
        measured = {row.metric: row for row in table(comparison.record) if row.metric in COLUMNS}
        for arm, one in zip(("baseline", "candidate"), arms, strict=True):
            values = {metric: getattr(row, arm)[1] for metric, row in measured.items()}
            rows[f"{name}, {arm}"] = {"engine": f"{one.engine} {one.version}", **values}
    kept = pd.DataFrame.from_dict(rows, orient="index")
    return kept[[c for c in ("engine", *COLUMNS) if c in kept]].round(2)
