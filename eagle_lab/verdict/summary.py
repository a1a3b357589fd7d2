"""What a comparison's record says: verdict, table, ceiling, consistency. The record alone is enough, on any machine."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from eagle_lab.measure.records import Sample
from eagle_lab.verdict.consistency import Consistency, consistency
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import (
    Decision,
    Interval,
    Reason,
    Verdict,
    Why,
    hodges_lehmann,
    judge,
    look_alpha,
    median_interval,
    signed_rank_interval,
    t_interval,
)

# too few left: less than this share of the planned pairs survived
ENOUGH_PAIRS = 0.5


def counted(record: ComparisonRecord, control: bool = False) -> list[Sample]:
    """The samples that weren't dropped, of the comparison or of its A/A control."""
    return [s for s in record.samples if s.control == control and not s.dropped]


def fork_pairs(record: ComparisonRecord, control: bool = False) -> list[list[tuple[float, float]]]:
    """(baseline, candidate) seconds of the kept pairs, by fork; of the A/A control where asked."""
    forks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for sample in counted(record, control):
        forks[sample.fork].append((sample.baseline_s, sample.candidate_s))
    return [forks[number] for number in sorted(forks)]


def shortfalls(record: ComparisonRecord) -> list[Reason]:
    """What is missing or was dropped: nothing is ever silently short."""
    found = []
    for control in (False, True):
        taken = [s for s in record.samples if s.control == control]
        dropped = [s for s in taken if s.dropped]
        if dropped:
            causes = tuple(sorted({cause for s in dropped for cause in s.dropped}))
            found.append(
                Reason(why=Why.DROPPED, count=len(dropped), of=len(taken), control=control, causes=causes)
            )
    taken_pairs = len([s for s in record.samples if not s.control])
    if taken_pairs < record.settings.iterations and not record.stopped_early:
        found.append(Reason(why=Why.NOT_TAKEN, count=taken_pairs, of=record.settings.iterations))
    return found


def verdict_of(record: ComparisonRecord) -> Verdict:
    """The verdict that the samples support by the rule that the settings declared: the one place that computes it."""
    settings = record.settings
    alpha = look_alpha(settings.alpha, settings.looks) if settings.looks else settings.alpha
    forks, short = fork_pairs(record), shortfalls(record)
    if not forks:
        return Verdict(
            decision=Decision.INCONCLUSIVE, estimate=math.nan, low=0.0, high=math.inf, equivalence=(0.0, math.inf),
            method="none", pairs=0, forks=0, delta=settings.delta, alpha=alpha, provisional=True,
            reasons=(Reason(why=Why.NO_PAIRS), *short),
        )  # fmt: skip
    control = fork_pairs(record, control=True)
    verdict = judge(forks, settings.delta, alpha, control=control or None)
    planned = record.stopped_early or settings.iterations
    doubts = []
    if verdict.pairs < ENOUGH_PAIRS * planned:
        doubts.append(Reason(why=Why.PAIRS_LOST, count=verdict.pairs, of=planned))
    if settings.control_forks and not control:
        doubts.append(Reason(why=Why.NO_CONTROL))
    decision = Decision.INCONCLUSIVE if doubts else verdict.decision
    return verdict.model_copy(update={"decision": decision, "reasons": (*verdict.reasons, *doubts, *short)})


def shift(forks: list[list[float]], alpha: float = 0.05) -> Interval:
    """Low, estimate and high of paired differences: signed rank in one fork, t over the forks' estimates in more."""
    if len(forks) == 1:
        low, high = signed_rank_interval(np.asarray(forks[0]), alpha)
        return float(low), float(hodges_lehmann(forks[0])), float(high)
    estimates = [float(hodges_lehmann(fork)) for fork in forks]
    low, high = t_interval(estimates, alpha)
    return float(low), float(np.mean(estimates)), float(high)


def part_pairs(record: ComparisonRecord) -> list[list[tuple[float, float]]]:
    """Seconds of each call of the part, (baseline, candidate) on the same tree of the same decode, by fork."""
    calls: dict[int, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for part in record.parts:
        calls[part.fork][part.arm] = part.calls_s
    # an arm that replays a captured cycle has no span to time; arms that part at a near tie end with other cycles
    both = [c for _, c in sorted(calls.items()) if c.get("baseline") and c.get("candidate")]
    return [list(zip(c["baseline"], c["candidate"], strict=False)) for c in both]


@dataclass(frozen=True)
class Row:
    """One metric of the table: the arms' medians with intervals, and candidate / baseline with its interval."""

    metric: str
    unit: str
    baseline: Interval
    candidate: Interval
    ratio: Interval


def _row(metric: str, unit: str, scale: float, forks: list[list[tuple[float, float]]]) -> Row:
    flat = [pair for fork in forks for pair in fork]
    arms = [median_interval([pair[arm] * scale for pair in flat]) for arm in (0, 1)]
    low, at, high = shift([[math.log(c / b) for b, c in fork] for fork in forks])
    return Row(metric, unit, arms[0], arms[1], (math.exp(low), math.exp(at), math.exp(high)))


def table(record: ComparisonRecord) -> list[Row]:
    """The original investigation's table: end-to-end latency, mask construction, token throughput."""
    forks, parts = fork_pairs(record), part_pairs(record)
    rows = []
    if forks:
        rows.append(_row("end-to-end latency", "ms", 1e3, forks))
    if parts:
        rows.append(_row("mask construction, a call", "ms", 1e3, parts))
    if forks:
        speed: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for s in counted(record):
            speed[s.fork].append((s.new_tokens / s.baseline_s, s.new_tokens / s.candidate_s))
        rows.append(_row("throughput", "tokens/s", 1, [speed[k] for k in sorted(speed)]))
    return rows


@dataclass(frozen=True)
class Ceiling:
    """The part's share of the baseline's time and what its removal would bring at most (Amdahl): share / (1 - share)."""

    share: float
    gain: float
    calls: float


def part_share(record: ComparisonRecord, arm: str = "baseline") -> tuple[float, float] | None:
    """The part's share of a whole decode in one arm ("baseline", "candidate"), and its calls; None where the part was
    not measured."""
    parts, kept = part_pairs(record), counted(record)
    if not parts or not kept:
        return None
    which = ("baseline", "candidate").index(arm)
    whole = float(np.median([(s.baseline_s, s.candidate_s)[which] for s in kept]))
    call = float(np.median([pair[which] for fork in parts for pair in fork]))
    calls = float(np.median([s.cycles for s in kept]))
    return call * calls / whole, calls


def ceiling(record: ComparisonRecord) -> Ceiling | None:
    """The most that any change of the part can bring; None where the part was not measured."""
    found = part_share(record)
    if found is None:
        return None
    share, calls = found
    return Ceiling(share, share / (1 - share) if share < 1 else math.inf, calls)


def consistency_of(record: ComparisonRecord) -> Consistency | None:
    """Does the part's measured change, times its calls, account for the end-to-end change? None where unmeasured."""
    parts, forks, top = part_pairs(record), fork_pairs(record), ceiling(record)
    if top is None:
        return None
    part = shift([[c - b for b, c in fork] for fork in parts])
    whole = shift([[c - b for b, c in fork] for fork in forks])
    return consistency(part, top.calls, whole)


@dataclass(frozen=True)
class Summary:
    """What one record says, computed once; None for what it has not measured. control: the A/A control, judged alike."""

    verdict: Verdict
    rows: list[Row]
    control: Verdict | None
    ceiling: Ceiling | None
    consistency: Consistency | None
    acceptance_length: float | None


def summarise(record: ComparisonRecord) -> Summary:
    """Everything that is derived from a record's samples."""
    settings, control = record.settings, fork_pairs(record, control=True)
    return Summary(
        verdict_of(record),
        table(record),
        judge(control, settings.delta, settings.alpha) if control else None,
        ceiling(record),
        consistency_of(record),
        acceptance_length(record),
    )


def acceptance_length(record: ComparisonRecord) -> float | None:
    """τ over all pairs of the comparison: new tokens a cycle; None where there is none."""
    taken = [s for s in record.samples if not s.control]
    cycles = sum(s.cycles for s in taken)
    return sum(s.new_tokens for s in taken) / cycles if cycles else None
