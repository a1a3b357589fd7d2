"""All records of a folder as rows, and the comparisons among them as trends.

A trend holds one machine, one pair of strategies and one workload (models, sizes, threads): nothing else may stand
on one line, since a time says nothing about another machine's. What isn't a readable record is named and skipped.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle_lab import ROOT
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.records import Record, RecordError, header, read, schema_of
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.settings import ComparisonSettings
from eagle_lab.verdict.stats import Verdict
from eagle_lab.verdict.summary import fork_pairs, verdict_of

KEPT = ROOT / "data" / "results"


@dataclass(frozen=True)
class Row:
    """One record. `verdict` and what only a comparison has are None or empty for the other kinds."""

    file: str
    kind: str
    created: str
    machine: str
    commit: str
    pair: str = ""
    workload: str = ""
    finished: bool = True
    verdict: Verdict | None = None
    baseline_s: float | None = None  # median over the kept pairs


@dataclass(frozen=True)
class Trend:
    """The comparisons of one machine, strategy pair and workload, oldest first."""

    machine: str
    pair: str
    workload: str
    rows: tuple[Row, ...]


def load(folder: str | Path | None = None) -> tuple[list[Row], list[str]]:
    """Every record below the folder as a row, oldest first, and one sentence for each JSON file that is none.

    None is data/results, which may be absent: then there is no record. Raises ValueError where a named folder is not there.
    """
    if folder is None and not KEPT.is_dir():
        return [], []
    folder = KEPT if folder is None else Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"results folder {folder} is not there; name one that holds records.")
    rows, skipped = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            compared = schema_of(path) == ComparisonRecord.model_fields["schema_name"].default
            record = read(path, ComparisonRecord) if compared else header(path)
            rows.append(row_of(record, path.relative_to(folder).as_posix()))
        except RecordError as error:
            skipped.append(str(error).replace(f"{folder}/", ""))
    return sorted(rows, key=lambda row: (row.created, row.file)), skipped


def row_of(record: Record, file: str) -> Row:
    """One record's row."""
    environment = record.environment
    commit = (environment.commit or "unknown")[:9] + (" + changes" if environment.dirty else "")
    common = (file, record.kind, record.created.isoformat(), machine_key(environment), commit)
    if not isinstance(record, ComparisonRecord):
        return Row(*common)
    times = sorted(b for fork in fork_pairs(record) for b, _ in fork)
    return Row(
        *common,
        pair=pair_of(record.settings),
        workload=workload_of(record),
        finished=record.finished is not None,
        verdict=verdict_of(record),
        baseline_s=times[len(times) // 2] if times else None,
    )


def pair_of(settings: ComparisonSettings) -> str:
    """ "incremental against rebuild"; instrumented arms are other strategies than bare ones."""
    arms = zip((settings.baseline, settings.candidate), settings.spans, strict=True)
    baseline, candidate = (name + " with spans" * bool(spans) for name, spans in arms)
    return f"{candidate} against {baseline}"


def workload_of(record: ComparisonRecord) -> str:
    """What is decoded and how: two records are only points of one trend where this is equal."""
    s = record.settings
    random = " (random weights)" * s.target.startswith("shape:")
    words = [
        f"{Path(s.target).name} + {Path(s.draft).name}{random}", s.dtype, f"{s.total_tokens} draft tokens",
        f"depth {s.depth}", f"top_k {s.top_k}", f"{s.max_new_tokens} new",
    ]  # fmt: skip
    if s.temperature:
        words.append(f"T {s.temperature:g}")
    if s.device == "cpu":
        words.append(f"{record.environment.cpu.torch_threads} threads")
    return ", ".join(words)


def trends(rows: Sequence[Row]) -> list[Trend]:
    """The comparisons by machine, strategy pair and workload, in the order of their first record."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.verdict is not None:
            groups[row.machine, row.pair, row.workload].append(row)
    return [Trend(*key, tuple(found)) for key, found in groups.items()]


def ratio_text(verdict: Verdict) -> str:
    """The estimate with its interval as text, "–" where there is none."""
    if not math.isfinite(verdict.estimate):
        return "–"
    if not math.isfinite(verdict.high):
        return f"{verdict.estimate:.3f} (no interval)"
    return f"{verdict.estimate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The comparisons as text, oldest first."""
    return [
        {
            "when (UTC)": row.created[:16].replace("T", " "),
            "machine": row.machine,
            "candidate against baseline": row.pair,
            "decision": row.verdict.decision.value
            + " (provisional)" * row.verdict.provisional
            + " (unfinished)" * (not row.finished),
            "ratio": ratio_text(row.verdict),
            "pairs": f"{row.verdict.pairs} in {row.verdict.forks} forks",
            "baseline": "–" if row.baseline_s is None else f"{row.baseline_s * 1e3:.0f} ms",
            "workload": row.workload,
            "commit": row.commit,
            "file": row.file,
        }
        for row in rows
        if row.verdict is not None
    ]


def others(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The records of other kinds (a profile, a sweep, …) as text: listed, never on a trend."""
    return [
        {
            "when (UTC)": row.created[:16].replace("T", " "),
            "kind": row.kind,
            "machine": row.machine,
            "commit": row.commit,
            "file": row.file,
        }
        for row in rows
        if row.verdict is None
    ]


def words(trend: Trend) -> str:
    """One trend in a sentence: how many, the latest, and whether it differs from the one before it."""
    head = f"{trend.pair} on {trend.machine} ({trend.workload}): {len(trend.rows)} record{'s' * (len(trend.rows) != 1)}"
    told = [row.verdict for row in trend.rows if row.verdict is not None and math.isfinite(row.verdict.high)]
    latest = trend.rows[-1].verdict
    if latest is None or not told:
        return f"{head}, none with enough pairs for an interval."
    head += f", the latest {latest.decision.value}, {ratio_text(latest)}"
    if len(told) < 2 or latest is not told[-1]:
        return f"{head}."
    before = told[-2]
    apart = latest.low > before.high or latest.high < before.low
    change = (
        "its interval does not meet that of the one before, so something changed"
        if apart
        else "as the one before"
    )
    return f"{head}; {change} ({ratio_text(before)})."


def overview(rows: Sequence[Row], skipped: Sequence[str]) -> str:
    """What was found, in Markdown: counts by kind, machines, and what was skipped, by name."""
    if not rows and not skipped:
        return "There is no record here yet."
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(row.kind for row in rows).items()))
    machines = len({row.machine for row in rows})
    told = f"{len(rows)} record{'s' * (len(rows) != 1)} ({kinds or 'none'}) from {machines} machine{'s' * (machines != 1)}."
    return "\n".join([told, "", *(f"- skipped: {sentence}" for sentence in skipped)])


def trend_words(found: Sequence[Trend]) -> str:
    """All trends in Markdown, a line each."""
    return "\n".join(f"- {words(trend)}" for trend in found) or "No comparison has been recorded here yet."
