"""The simulated error rates and an A/A run in tables and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eagle_lab.report.page import reasons
from eagle_lab.report.words import percent, render
from eagle_lab.verdict.calibration import BIASED, FIVE_FORKS, ONE_FORK, USUAL, scatter, simulated_scatter
from eagle_lab.verdict.stats import Forks, Verdict

METRICS = {
    "coverage": "95% interval covers the truth",
    "false_verdicts": "false verdicts when A = B",
    "no_difference": "NO DIFFERENCE when A = B",
    "power_1": "power at 1%",
    "power_2": "power at 2%",
    "power_5": "power at 5%",
}
FEWEST_PAIRS = 6


def rate(row: Mapping[str, Any], metric: str) -> str:
    """A simulated share as text; "< 0.03%" where none of the repetitions had it, "–" where the design has no such share."""
    share = row[metric]
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
    usual, one, biased, five = (found[d.name] for d in (USUAL, ONE_FORK, BIASED, FIVE_FORKS))
    return render(
        "calibration.md.j2",
        usual=usual,
        one=one,
        biased=biased,
        five=five,
        bias=BIASED.process_bias,
        rate=rate,
    ).strip()


def same_words(verdict: Verdict, forks: Forks) -> str:
    """What an A/A comparison's verdict says about the machine, in Markdown.

    Args: verdict: of the baseline against itself; forks: the pairs behind it.
    """
    enough = verdict.pairs >= FEWEST_PAIRS
    return render(
        "same.md.j2",
        verdict=verdict,
        reasons=reasons(verdict),
        here=scatter(forks) if enough else None,
        assumed=simulated_scatter(),
    ).strip()
