"""The records of a folder in tables and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eagle_lab.measure.records import Record, Reported
from eagle_lab.report.words import ratio, render
from eagle_lab.verdict.history import Arm, Row, Trend, Workload, compared


def arms_text(arms: tuple[Arm, Arm]) -> str:
    """ "incremental against rebuild"; instrumented arms say so. A long arm can be broken after a comma."""
    baseline, candidate = (arm.strategy.replace(",", ", ") + " with spans" * arm.spans for arm in arms)
    return f"{candidate} against {baseline}"


def workload_text(w: Workload) -> str:
    """What was decoded, in short."""
    return render("workload.j2", w=w).strip()


def commit_text(record: Record | Reported) -> str:
    """The first digits of the commit, and whether there were changes."""
    if isinstance(record, Reported):
        return record.commit[:9]
    environment = record.environment
    return (environment.commit or "unknown")[:9] + " + changes" * bool(environment.dirty)


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The comparisons as text, oldest first."""
    return [
        {
            "when (UTC)": f"{row.record.created:%Y-%m-%d %H:%M}",
            "machine": row.machine,
            "candidate against baseline": arms_text(row.arms),
            "verdict": row.verdict.decision
            + " (provisional)" * row.verdict.provisional
            + " (unfinished)" * (row.record.finished is None),
            "ratio": ratio(row.verdict.interval),
            "commit": commit_text(row.record),
            "file": row.file,
        }
        for row in compared(rows)
    ]


def others(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The records of other kinds (a profile, a sweep, …) as text: listed, never on a trend."""
    ours = compared(rows)
    return [
        {
            "when (UTC)": f"{row.record.created:{'%Y-%m-%d' if isinstance(row.record, Reported) else '%Y-%m-%d %H:%M'}}",
            "kind": row.record.kind,
            "machine": row.machine,
            "commit": commit_text(row.record),
            "file": row.file,
        }
        for row in rows
        if row not in ours
    ]


def overview(rows: Sequence[Row], skipped: Sequence[str]) -> str:
    """What was found, in Markdown: counts by kind, machines, and what was skipped, by name."""
    kinds = sorted(Counter(row.record.kind for row in rows).items())
    machines = len({row.machine for row in rows})
    return render("history.md.j2", rows=rows, kinds=kinds, machines=machines, skipped=skipped).strip()


def trend_words(found: Sequence[Trend]) -> str:
    """All trends in Markdown, a line each: how many, the latest, and whether it differs from the one before it."""
    told = [
        (trend, arms_text(trend.arms), workload_text(trend.workload), trend.commits or []) for trend in found
    ]
    return render("trends.md.j2", trends=told).strip()
