"""The simulated error rates and those of many short runs, in tables and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from eagle_lab.report.words import percent, render, signed_percent
from eagle_lab.verdict.calibration import (
    BIASED,
    CYCLES,
    CYCLES_HERE,
    FIVE_FORKS,
    ONE_FORK,
    USUAL,
    CalibrationRecord,
    design_of,
    findings,
    rates,
    simulated,
)

METRICS = {
    "coverage": "95% interval covers the truth",
    "false_verdicts": "false verdicts when A = B",
    "no_difference": "NO DIFFERENCE when A = B",
    "told_1": "1% told from none",
    "power_1": "power at 1%",
    "power_2": "power at 2%",
    "power_5": "power at 5%",
}


def rate(row: Mapping[str, Any], metric: str) -> str:
    """A simulated share as text; "< 0.03%" where none of the repetitions had it, "–" where the design has no such share."""
    share = row.get(metric)
    if share is None:
        return "–"
    # 0 of n: the upper end of a one-sided 95% interval is 3 / n
    return percent(share) if share else f"< {percent(3 / row['repetitions'], 2)}"


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of `simulate.tabulate` as text, with the metrics' names as columns."""
    return [
        {"design and analysis": row["design"]} | {name: rate(row, key) for key, name in METRICS.items()}
        for row in rows
    ]


def finding(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says, in Markdown."""
    found = {row["design"]: row for row in rows}
    names = {
        "usual": USUAL,
        "one": ONE_FORK,
        "biased": BIASED,
        "five": FIVE_FORKS,
        "here": CYCLES_HERE,
        "cycles": CYCLES,
    }
    picked = {name: found[design.name] for name, design in names.items()}
    return render("calibration.md.j2", **picked, bias=BIASED.process_bias, rate=rate).strip()


def of_runs(record: CalibrationRecord) -> str:
    """Many short runs with planted delays: what was found, beside the same design simulated, in Markdown."""
    found = sorted(rates(record), key=lambda r: (r.load, r.planted))
    measured = [list(of_load) for _, of_load in groupby(found, key=lambda r: r.load)]
    return render(
        "calibrated.md.j2", s=record.settings, measured=measured, simulated=simulated(record),
        design=design_of(record), environment=record.environment, runs=len(record.runs),
    ).strip()  # fmt: skip


def runs_table(record: CalibrationRecord) -> list[dict[str, str]]:
    """What each run said, as text."""
    return [
        {"planted": signed_percent(f.planted) if f.planted else "nothing", "in truth": f"{f.truth:.4f}", "verdict": str(f.verdict)}
        for f in findings(record)
    ]  # fmt: skip
