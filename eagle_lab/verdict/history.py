"""All records of a folder as rows, and the comparisons among them as trends.

A trend holds one machine, one pair of strategies and one workload (models, sizes, threads): nothing else may stand
on one line, since a time says nothing about another machine's. What isn't a readable record is named and skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eagle_lab import ROOT
from eagle_lab.engines.revision import git
from eagle_lab.measure.records import RESULTS, Record, RecordError, Reported, header, read, schema_of
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Verdict
from eagle_lab.verdict.summary import verdict_of

COMPARISON = ComparisonRecord.model_fields["schema_name"].default


@dataclass(frozen=True)
class Arm:
    """A strategy, and whether it was instrumented: with spans it is another one than without."""

    strategy: str
    spans: bool = False


@dataclass(frozen=True)
class Workload:
    """What is decoded and how: two records are points of one trend only where this is equal. threads: None on a GPU."""

    target: str
    draft: str
    dtype: str
    total_tokens: int
    depth: int
    top_k: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k_sampling: int
    threads: int | None
    quantization: str = ""


@dataclass(frozen=True)
class Row:
    """One record of any kind: what every record has."""

    file: str
    record: Record | Reported

    @property
    def machine(self) -> str:
        """The machine that it is from."""
        return self.record.hardware


@dataclass(frozen=True)
class Compared(Row):
    """A comparison, judged anew."""

    record: ComparisonRecord
    verdict: Verdict

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Baseline and candidate."""
        s = self.record.settings
        return Arm(s.baseline, s.spans[0]), Arm(s.candidate, s.spans[1])

    @property
    def workload(self) -> Workload:
        """What was decoded."""
        s, cpu = self.record.settings, self.record.environment.cpu
        threads = cpu.torch_threads if s.device == "cpu" else None
        return Workload(
            s.target, s.draft, s.dtype, s.total_tokens, s.depth, s.top_k, s.max_new_tokens, s.temperature, s.top_p,
            s.top_k_sampling, threads, str(s.load.get("quantization", "")),
        )  # fmt: skip


@dataclass(frozen=True)
class Trend:
    """The comparisons of one machine, pair of arms and workload, oldest first."""

    machine: str
    arms: tuple[Arm, Arm]
    workload: Workload
    rows: tuple[Compared, ...]

    @property
    def latest(self) -> Verdict:
        """The newest record's verdict."""
        return self.rows[-1].verdict

    @property
    def row_before(self) -> Compared | None:
        """The record that the latest is held against: the last one before it with an interval."""
        return next((row for row in reversed(self.rows[:-1]) if row.verdict.known), None)

    @property
    def before(self) -> Verdict | None:
        """Its verdict."""
        return self.row_before.verdict if self.row_before else None

    @property
    def changed(self) -> bool:
        """Whether the latest interval does not meet that of the one before."""
        before, latest = self.before, self.latest
        return before is not None and latest.known and (latest.low > before.high or latest.high < before.low)

    @property
    def upgrades(self) -> list[tuple[str, str]]:
        """Engines outside this process with another version than in the record before: what each was, and what it is."""
        if self.row_before is None or not self.rows[-1].record.settings.outside:
            return []
        arms = zip(self.row_before.record.arms, self.rows[-1].record.arms, strict=False)
        both = [[f"{arm.engine} {arm.version}" for arm in pair] for pair in arms]
        return list(dict.fromkeys((before, after) for before, after in both if before != after))

    @cached_property
    def commits(self) -> list[str] | None:
        """The commits after the record before, up to the latest, newest first, a line each; None where git can't tell."""
        if self.row_before is None:
            return None
        first, last = (row.record.environment.commit for row in (self.row_before, self.rows[-1]))
        if not first or not last:
            return None
        said = git(ROOT, "log", "--oneline", "--no-decorate", f"{first}..{last}", seconds=20)
        return None if said is None else said.splitlines()


def load(folder: str | Path | None = None) -> tuple[list[Row], list[str]]:
    """Every record below the folder as a row, oldest first, and one sentence for each JSON file that is none.

    None is data/results, which may be absent: then there is no record. Raises ValueError where a named folder is not there.
    """
    if folder is None and not RESULTS.is_dir():
        return [], []
    folder = RESULTS if folder is None else Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"results folder {folder} is not there; name one that holds records.")
    rows: list[Row] = []
    skipped = []
    for path in sorted(folder.rglob("*.json")):
        try:
            rows.append(_row(path, path.relative_to(folder).as_posix()))
        except RecordError as error:
            skipped.append(str(error).replace(f"{folder}/", ""))
    return sorted(rows, key=lambda row: (row.record.created, row.file)), skipped


def _row(path: Path, name: str) -> Row:
    if schema_of(path) != COMPARISON:
        return Row(name, header(path))
    record = read(path, ComparisonRecord)
    return Compared(name, record, verdict_of(record))


def compared(rows: Sequence[Row]) -> list[Compared]:
    """The comparisons among the rows."""
    return [row for row in rows if isinstance(row, Compared)]


def chosen(rows: Sequence[Row], machine: str | None = None, arm: str | None = None) -> list[Row]:
    """The rows of the machines and arms whose names hold these words, in any case; None leaves all of them.

    Only a comparison has arms. Raises ValueError where there are rows and none is left: it names what there is.
    """
    kept = [row for row in rows if _holds(machine, [row.machine])]
    if rows and not kept:
        raise ValueError(
            f"no record is from a machine called {machine!r}; there are {_names(row.machine for row in rows)}."
        )
    if arm is None:
        return kept
    found = [row for row in compared(kept) if _holds(arm, [a.strategy for a in row.arms])]
    if kept and not found:
        there = _names(a.strategy for row in compared(kept) for a in row.arms)
        raise ValueError(f"no comparison here has an arm called {arm!r}; there are {there or 'none'}.")
    return list(found)


def _holds(word: str | None, names: list[str]) -> bool:
    return word is None or any(word.casefold() in name.casefold() for name in names)


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def trends(rows: Sequence[Row]) -> list[Trend]:
    """The comparisons by machine, arms and workload, in the order of their first record."""
    groups: dict[tuple[str, tuple[Arm, Arm], Workload], list[Compared]] = defaultdict(list)
    for row in compared(rows):
        groups[row.machine, row.arms, row.workload].append(row)
    return [Trend(*key, tuple(found)) for key, found in groups.items()]
