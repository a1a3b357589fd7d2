"""What instrumentation costs: spans on against spans off as the two arms of a comparison, and the count beside it.

Verdict runs have their spans off; this is about profiles, whose spans are on. A measured interval can't resolve
a few microseconds in seconds, so the number of spans times the cost of one says what to expect.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle_lab import ROOT
from eagle_lab.decode.generate import generate
from eagle_lab.measure.old_records import Record, RecordError, read, write
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import prepare
from eagle_lab.runtime.clock import Spans, no_span, now
from eagle_lab.verdict.compare import Comparison, compare
from eagle_lab.verdict.stats import Verdict
from eagle_lab.verdict.summary import verdict_of

LIMIT = 0.01  # the interval of the ratio must lie within this of 1
STRATEGY = "rebuild"
SIZES = ("iterations", "forks", "max_new_tokens", "total_tokens", "depth", "top_k", "delta", "seed")


def command(settings: dict[str, Any]) -> str:
    """The command that runs calibrate.ipynb again as this record was made."""
    names = (*(() if settings["embedded"] else ("target", "draft")), "device", "dtype", *SIZES)
    words = ["papermill", "notebooks/calibrate.ipynb", "out.ipynb", "-p", "strategy", settings["candidate"]]
    for name in names:
        words += ["-p", name, str(settings[name])]
    return shlex.join([*words, "-p", "prompts", ",".join(settings["prompts"])])


def measure(pair: Pair, strategy: str = STRATEGY, **options: Any) -> Comparison:
    """Compare a strategy with itself, the candidate's spans on; `options` are `compare.compare`'s.

    The finished record is called overhead-… instead of comparison-…, so that `found` knows it.
    """
    done = compare(pair, baseline=strategy, candidate=strategy, spans=(False, True), **options)
    record = done.record | {"command": command(done.record["settings"])}
    path = done.path.with_name(done.path.name.replace("comparison-", "overhead-", 1))
    write(record, path)
    done.path.unlink()
    return Comparison(done.verdict, record, path)


def found(folder: str | Path = ROOT / "data" / "results") -> tuple[dict[Path, Record], list[str]]:
    """The finished overhead records of a folder, oldest first, and a sentence for each that can't be read."""
    records, skipped = {}, []
    for path in sorted(Path(folder).glob("overhead-*.json")):
        try:
            record = read(path)
            if record["kind"] != "comparison" or record["settings"]["spans"] != [False, True]:
                raise RecordError(f"{path} compares no spans.")
            verdict_of(record)
        except RecordError as error:
            skipped.append(str(error).replace(str(path), path.name))
        except (KeyError, TypeError, ValueError) as error:
            skipped.append(f"{path.name} is no whole comparison ({type(error).__name__}: {error}).")
        else:
            records[path] = record
    return records, skipped


def within(verdict: Verdict, limit: float = LIMIT) -> bool:
    """Whether the whole interval lies inside ±limit; never without an interval."""
    return 1 / (1 + limit) < verdict.low and verdict.high < 1 + limit


def span_cost(device: torch.device | str = "cpu", calls: int = 2000, rounds: int = 7) -> float:
    """Seconds that one span takes on the host more than none: median of `rounds` loops of `calls`."""

    def loop(span: Any) -> int:
        start = now(device)
        for _ in range(calls):
            with span("x"):
                pass
        return now(device) - start

    return float(np.median([loop(Spans(device)) - loop(no_span) for _ in range(rounds)])) / calls / 1e9


@dataclass(frozen=True)
class Expected:
    """Spans in one run, seconds that one costs, and what they should add to the run's time (a share)."""

    spans: int
    cost_s: float
    share: float


def expected(pair: Pair, record: Record) -> Expected | None:
    """What the spans of the record's first prompt should cost, from a decode that counts them; None without pairs."""
    settings, samples = record["settings"], record["samples"]
    prompt = prepare(pair.tokenizer, settings["prompts"][0])[0]
    taken = [s["baseline_s"] for s in samples if s["prompt"] == prompt.id]
    if not taken:
        return None
    spans = Spans(pair.device)
    sizes = {name: settings[name] for name in ("top_k", "depth", "total_tokens")}
    generate(
        pair, prompt.ids, settings["max_new_tokens"], strategy=settings["candidate"], record=False, span=spans, **sizes
    )  # fmt: skip
    count, cost = len(spans.read()), span_cost(pair.device)
    return Expected(count, cost, count * cost / float(np.median(taken)))


def words(record: Record, count: Expected | None = None) -> str:
    """One record in Markdown: the change with its interval, whether that is inside ±1%, and what was to be expected."""
    verdict, s = verdict_of(record), record["settings"]
    what = "Spans on against off" + (f", `{s['candidate']}`" if s["candidate"] != STRATEGY else "")
    pairs = f"{verdict.pairs} pairs in {verdict.forks} fork{'s' * (verdict.forks != 1)}"
    if not np.isfinite(verdict.high):
        told = f"{what}: too few pairs for an interval ({'; '.join(verdict.reasons)})."
    else:
        low, at, high = (100 * (x - 1) for x in (verdict.low, verdict.estimate, verdict.high))
        inside = "**inside**" if within(verdict) else "**not inside**"
        told = f"{what}: {at:+.2f}% [{low:+.2f}, {high:+.2f}] in {pairs}, {inside} ±{LIMIT:.0%}."
    told += f" {s['max_new_tokens']} new tokens, {s['total_tokens']} draft tokens, {s['device']}, {record['created'][:10]}."
    if count:
        told += f" A run has {count.spans} spans of {count.cost_s * 1e6:.2f} µs each: they should add {count.share:.4%}."
    return told


def committed_words(records: dict[Path, Record], skipped: Sequence[str]) -> str:
    """The committed overhead records in Markdown, a line each, and what was skipped."""
    lines = [f"- `{path.name}`: {words(record)}" for path, record in records.items()]
    lines += [f"- skipped: {sentence}" for sentence in skipped]
    return "\n".join(lines) or "No overhead record is in data/results/ yet."
