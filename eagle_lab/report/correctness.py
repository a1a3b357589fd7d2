"""The proof for a pair in words and a table; the checks are `studies.correctness`'s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from eagle_lab.report.charts.tree import token_text
from eagle_lab.report.words import render
from eagle_lab.studies.correctness import Accepted, Check, Outcome

COLOURS = {Outcome.PASSED: "#009E73", Outcome.FAILED: "#D55E00", Outcome.SKIPPED: "#8C8C8C"}


def words(check: Check, tokenizer: Any = None) -> str:
    """What was found by one check, a sentence without its full stop; a token is told as the tokenizer reads it, and by
    its id; by that alone where there is no tokenizer."""
    text = partial(token_text, tokenizer) if tokenizer else None
    return render("check.j2", check=check, kind=type(check).__name__, text=text).strip()


def paragraphs(checks: Sequence[Check], tokenizer: Any = None) -> str:
    """A paragraph for each check, as Markdown; `tokenizer` as in `words`."""
    # a token may be a mark of Markdown
    found = [re.sub(r"([*`<])", r"\\\1", words(check, tokenizer)) for check in checks]
    return "\n\n".join(
        f"**{check.name}: {check.outcome}.** {told}." for check, told in zip(checks, found, strict=True)
    )


def outcomes(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Each check's outcome in a word, a row each."""
    return [{"check": check.name, "outcome": str(check.outcome)} for check in checks]


def html(checks: Sequence[Check], tokenizer: Any = None) -> str:
    """The table, each outcome in its colour and in words; `tokenizer` as in `words`."""
    rows = [(check, COLOURS[check.outcome], words(check, tokenizer)) for check in checks]
    return render("correctness.html.j2", rows=rows)


def summary(checks: Sequence[Check]) -> str:
    """How many checks passed and how many could not run, as Markdown; for checks of which none failed."""
    counts = {outcome: sum(check.outcome == outcome for check in checks) for outcome in Outcome}
    return render("correctness.md.j2", passed=counts[Outcome.PASSED], skipped=counts[Outcome.SKIPPED])


def acceptance(rows: Sequence[Accepted]) -> list[dict[str, Any]]:
    """τ of each category and of all, a row each."""
    return [{"prompts": row.category or "all", "τ": f"{row.tau:.2f}", "cycles": row.cycles} for row in rows]
