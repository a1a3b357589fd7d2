"""A comparison's record → one Markdown page for a pull request. The record alone is enough, on any machine."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from eagle_lab.measure.records import Difference
from eagle_lab.report.words import change, render, spread
from eagle_lab.verdict.consistency import Consistency
from eagle_lab.verdict.record import ComparisonRecord, Forecast, TreeChosen
from eagle_lab.verdict.stats import Decision, Verdict
from eagle_lab.verdict.summary import Factors, Row, Summary, summarise


def report(record: ComparisonRecord, picture: str | None = None) -> str:
    """The page as Markdown; `picture` is the file name of a chart that lies beside it."""
    return render("page.md.j2", picture=picture, **_values(record, summarise(record)))


def part(name: str, record: ComparisonRecord, summary: Summary) -> str:
    """One part of the page: "verdict", "correctness", "plausible" (ceiling and consistency) or "machine"."""
    return render(f"page_{name}.md.j2", **_values(record, summary)).strip()


def section(record: ComparisonRecord) -> str:
    """One comparison as a part of another page: verdict, table, ceiling and consistency."""
    return part("section", record, summarise(record))


def moved(factors: Factors) -> str:
    """Which of the two factors moved: those whose interval leaves out 1."""
    names = {"cycles needed": factors.cycles, "the time of a cycle": factors.cycle_s}
    return render(
        "moved.j2", names=[name for name, (low, _, high) in names.items() if not low <= 1 <= high]
    ).strip()


def _values(record: ComparisonRecord, summary: Summary) -> dict[str, Any]:
    checked, s = record.correctness, record.settings
    # a plain arm has no tree, and a record begun by hand no arms
    sizes = ("top_k", "depth", "total_tokens")
    trees = [tuple(map(arm.keys.get, sizes)) for arm in record.arms] or [(s.top_k, s.depth, s.total_tokens)]
    return {
        "moved": moved(summary.factors) if summary.factors else "",
        "trees": [tree for tree in dict.fromkeys(trees) if all(tree)],
        "alike": len(set(trees)) == 1,
        "chosen": [
            render("event.j2", e=event, record=record).strip()
            for event in record.events
            if isinstance(event, TreeChosen)
        ],
        "record": record,
        "summary": summary,
        "line": sentence(record, summary.verdict),
        "meaning": meaning(summary.verdict.decision),
        "told": told(record, summary.verdict),
        "rows": table_rows(summary.rows),
        "baseline": difference_words(checked.baseline),
        "candidate": difference_words(checked.candidate),
        "parted": [difference_words(where) for where in summary.agreement.parted],
        "per": "a cycle" if record.settings.pairs_of == "cycles" else "a run",
        "consistency": consistency_words(summary.consistency, record) if summary.consistency else "",
    }


def write_report(record: ComparisonRecord, path: Path, picture: bytes | None = None) -> Path:
    """Write the page at `path` (.md), with its table as CSV beside it, and its chart where there is one."""
    chart = path.with_suffix(".svg")
    if picture is not None:
        chart.write_bytes(picture)
    path.write_text(report(record, chart.name if picture is not None else None), encoding="utf-8")
    path.with_suffix(".csv").write_text(csv_text(summarise(record).rows), encoding="utf-8")
    return path


def csv_text(rows: list[Row]) -> str:
    """The table's rows as CSV, a number a cell: each arm's median with its interval, candidate / baseline with its own."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    parts = ("baseline", "candidate", "ratio")
    ends = ("low", "estimate", "high")
    lines.writerow(["metric", "unit", *(f"{part}_{end}" for part in parts for end in ends)])
    for row in rows:
        numbers = [x if math.isfinite(x) else "" for part in parts for x in getattr(row, part)]
        lines.writerow([row.metric, row.unit, *numbers])
    return out.getvalue()


def sentence(record: ComparisonRecord, verdict: Verdict) -> str:
    """The verdict line: who against whom, the decision, the ratio with its interval, what stands behind it."""
    return f"{record.settings.candidate} against {record.settings.baseline}: {verdict}"


def told(record: ComparisonRecord, verdict: Verdict) -> list[str]:
    """The verdict's reasons, then what happened during the run, a sentence each."""
    events = (render("event.j2", e=event, record=record).strip() for event in record.events)
    return [*reasons(verdict), *events]


def reasons(verdict: Verdict) -> list[str]:
    """A verdict's reasons, a sentence each."""
    return [render("reason.j2", r=reason, v=verdict).strip() for reason in verdict.reasons]


def forecast_words(found: Forecast) -> str:
    """What a run should be able to tell, in a sentence."""
    return render("forecast.j2", f=found).strip()


def meaning(decision: Decision) -> str:
    """What to do about a decision."""
    return render("meaning.j2", decision=decision).strip()


def difference_words(where: Difference | None) -> str:
    """ "identical", or the near tie that parted two decodes."""
    return render("difference.j2", d=where).strip()


def consistency_words(found: Consistency, record: ComparisonRecord) -> str:
    """Whether the part accounts for the whole, in two sentences."""
    return render("consistency.md.j2", c=found, cycles=record.settings.pairs_of == "cycles").strip()


def table_rows(rows: list[Row]) -> list[dict[str, str]]:
    """The table's rows as text, for Markdown and for a notebook's data frame."""
    return [
        {
            "metric": row.metric,
            "unit": row.unit,
            "baseline": spread(row.baseline),
            "candidate": spread(row.candidate),
            "Δ": change(row.ratio),
        }
        for row in rows
    ]
