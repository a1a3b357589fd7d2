"""What a comparison's record says: verdict, table, ceiling, consistency. The record alone is enough, on any machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from eagle_lab.measure.records import Counts, Difference, InstanceSample, Sample
from eagle_lab.verdict.consistency import Consistency, consistency
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import (
    Decision,
    Interval,
    Reason,
    Verdict,
    Why,
    calm_rounds,
    hodges_lehmann,
    judge,
    judge_instances,
    look_alpha,
    median_interval,
    over_instances,
    ratios_of,
    shift,
    t_interval,
)

V = TypeVar("V")

# too few left: less than this share of the planned pairs survived
ENOUGH_PAIRS = 0.5
# an effect is believed up to so many times its part's ceiling, as the part is measured in other, few decodes
CEILING_SLACK = 2.0
# processes with whole decodes that an interval takes, or pairs in one: two leave Student's t one degree of freedom
ENOUGH_WHOLES = 3
NORMAL_MEDIAN = 0.6745  # of the absolute value of a standard normal draw


def counted(record: ComparisonRecord, control: bool = False) -> list[Sample]:
    """The pairs of whole decodes that weren't dropped, of the comparison or of its A/A control."""
    return [s for s in record.samples if s.control == control and not s.dropped]


def kept_instances(record: ComparisonRecord) -> list[InstanceSample]:
    """The instances that weren't dropped and are long enough to hold a stretch."""
    return [i for i in record.instances if not i.dropped and i.seconds]


def fork_pairs(record: ComparisonRecord) -> list[list[tuple[float, float]]]:
    """(baseline, candidate) seconds of the kept pairs of whole decodes, by fork."""
    return _of_samples(counted(record), lambda s: (s.baseline_s, s.candidate_s))


def judged_pairs(record: ComparisonRecord, control: bool = False) -> list[list[tuple[float, float]]]:
    """What pairs of whole decodes are judged by, by fork: seconds, or by the rule "time per token" seconds a new token."""
    return _of_samples(counted(record, control), lambda s: judged(record, s))


def judged(record: ComparisonRecord, sample: Sample) -> tuple[float, float]:
    """What one pair of whole decodes is judged by."""
    if record.settings.rule == "same text":
        return sample.baseline_s, sample.candidate_s
    left, right = _new_tokens(sample)
    return sample.baseline_s / left, sample.candidate_s / right


def _new_tokens(sample: Sample) -> tuple[int, int]:
    return sample.new_tokens, sample.candidate_tokens or sample.new_tokens


def _of_samples(
    samples: Sequence[Sample], value: Callable[[Sample], tuple[float | None, float | None] | None]
) -> list[list[tuple[float, float]]]:
    """(baseline, candidate) values of samples, by fork, without those that lack one."""
    each = [(sample, *(value(sample) or (None, None))) for sample in samples]
    kept = [(sample, (left, right)) for sample, left, right in each if left and right]
    return by_fork([sample for sample, _ in kept], [pair for _, pair in kept])


CONTROL, CANDIDATE = 1, 2  # sessions of a comparison's instance


def against_baseline(logs: NDArray, session: int) -> NDArray:
    """Log seconds [..., sessions] → log(session / baseline) [...]: against the mean of sessions 0 and 1, which are the
    baseline; session 1, the control, against session 0."""
    return logs[..., session] - logs[..., _bases(session)].mean(-1)


def _bases(session: int) -> list[int]:
    return [0] if session == CONTROL else [0, 1]


def between_steps(logs: NDArray, order: NDArray, session: int = CANDIDATE) -> NDArray:
    """Hodges-Lehmann estimate of log(session / baseline) [...] from steps that followed each other directly.

    Args: logs: log seconds of the steps in the order taken [..., steps]; order: who took each [..., steps].
    A machine's speed drifts from cycle to cycle, so two steps in a row differ least by chance. Where the session went
    second and where it went first are estimated apart, then averaged: so no step is in two differences of one estimate,
    and for equal sessions each is symmetric about 0 however skewed their noise. Where the two were never neighbours, the
    means of their steps are held against each other.
    """
    base = np.isin(order, _bases(session))
    mine, change = order == session, np.diff(logs)
    after = _estimates(change, base[..., :-1] & mine[..., 1:])
    before = _estimates(-change, mine[..., :-1] & base[..., 1:])
    means = [(logs * who).sum(-1) / who.sum(-1) for who in (mine, base)]
    found = np.stack([after, before])
    known = ~np.isnan(found)
    both = np.where(known, found, 0).sum(0) / np.maximum(1, known.sum(0))
    return np.where(known.any(0), both, means[0] - means[1])


def _estimates(d: NDArray, counted: NDArray) -> NDArray:
    """Hodges-Lehmann of those of d [..., n] that are counted, [...]; NaN where none is."""
    counts, found = counted.sum(-1), np.full(counted.shape[:-1], math.nan)
    for count in np.unique(counts[counts > 0]):  # as many differences each: one array
        here = counts == count
        found[here] = hodges_lehmann(d[here][counted[here]].reshape(-1, count))
    return found


def stretch_logs(instances: Sequence[InstanceSample], session: int = CANDIDATE) -> list[NDArray]:
    """log(session / baseline) of each stretch, float64 [stretches], by instance; of cycles in slices without what was late."""
    return [
        calm_rounds(slice_logs(i), session, _bases(session)).rounds
        if i.slices
        else against_baseline(np.log(np.asarray(i.seconds)), session)
        for i in instances
    ]


def instance_estimates(instances: Sequence[InstanceSample], session: int = CANDIDATE) -> list[float]:
    """Each instance's estimate of log(session / baseline).

    Where each stretch is a cycle of every session: from cycles that were made at once, slice by slice (`calm_rounds`), or
    from steps that followed each other (`between_steps`), which neither drift nor another program's burst moves much. Where
    sessions need unlike numbers of cycles: the ratio of their times for the whole text.
    """
    if all(map(_by_cycles, instances)):
        return [_from_cycles(i, session) for i in instances]
    return estimates_by_sums(instances, session)


def _by_cycles(instance: InstanceSample) -> bool:
    """Whether each stretch is known to be one cycle of every session."""
    steps = sum(map(len, instance.order))
    return len(instance.order) * len(instance.seconds[0]) == steps > 0


def estimates_by_sums(instances: Sequence[InstanceSample], session: int = CANDIDATE) -> list[float]:
    """log(session / baseline) of each instance by the sessions' time for all stretches, whatever disturbed it."""
    return [float(against_baseline(np.log(np.asarray(i.seconds).sum(0)), session)) for i in instances]


def _from_cycles(instance: InstanceSample, session: int) -> float:
    if instance.slices:
        return calm_rounds(slice_logs(instance), session, _bases(session)).ratio
    return float(between_steps(step_logs(instance), np.asarray(instance.order).ravel(), session))


def slice_logs(instance: InstanceSample) -> NDArray:
    """Log seconds of an instance's slices [stretches, sessions, slices]; a cycle is one where they don't match."""
    counts = {len(slices) for stretch in instance.slices for slices in stretch}
    return np.log(np.asarray(instance.slices if len(counts) == 1 else instance.seconds)).reshape(
        len(instance.seconds), len(instance.seconds[0]), -1
    )


def step_logs(instance: InstanceSample) -> NDArray:
    """Log seconds of cycles that followed each other directly, where each stretch is a cycle of every session
    [stretches × sessions]."""
    return np.take_along_axis(np.log(np.asarray(instance.seconds)), np.asarray(instance.order), 1).ravel()


def cycle_noise(instances: Sequence[InstanceSample]) -> float:
    """The noise of one cycle that is held against another one, a standard deviation on the log scale: of cycles in slices
    what is left of it after their weights. Infinite for instances of one cycle."""
    if not all(i.slices for i in instances):
        return step_noise([step_logs(i) for i in instances if not i.slices])
    rounds = stretch_logs(instances, CONTROL)
    freedom = sum(len(each) - 1 for each in rounds)
    around = sum(float(((each - each.mean()) ** 2).sum()) for each in rounds)
    return math.sqrt(around / freedom / 2) if freedom else math.inf


def step_noise(logs: Sequence[NDArray]) -> float:
    """The noise of one cycle that follows another directly, a standard deviation on the log scale.

    logs: of each decode, [cycles]. From the median of the absolute differences, so that bursts don't count. Infinite for decodes of
    one cycle.
    """
    steps = np.concatenate([np.abs(np.diff(each)) for each in logs])
    return float(np.median(steps)) / NORMAL_MEDIAN / math.sqrt(2) if steps.size else math.inf


def by_fork(taken: Sequence[InstanceSample | Sample], values: Sequence[V]) -> list[list[V]]:
    """Values of instances or samples, by fork."""
    forks: dict[int, list[V]] = defaultdict(list)
    for one, value in zip(taken, values, strict=True):
        forks[one.fork].append(value)
    return [forks[number] for number in sorted(forks)]


def dropped_of(taken: Sequence[Sample | InstanceSample], control: bool = False) -> list[Reason]:
    """How many were dropped and for what, as a reason; none where nothing was."""
    dropped = [s for s in taken if s.dropped]
    causes = tuple(sorted({cause for s in dropped for cause in s.dropped}))
    found = Reason(why=Why.DROPPED, count=len(dropped), of=len(taken), control=control, causes=causes)
    return [found] if dropped else []


def shortfalls(record: ComparisonRecord) -> list[Reason]:
    """What is missing or was dropped: nothing is ever silently short."""
    controls = [s for s in record.samples if s.control]
    found = [*dropped_of(record.iterations), *dropped_of(controls, control=True)]
    taken_pairs = len(record.iterations)
    if taken_pairs < record.settings.iterations and not record.stopped_early and not record.settings.minutes:
        found.append(Reason(why=Why.NOT_TAKEN, count=taken_pairs, of=record.settings.iterations))
    return found


def judge_kept(
    kept: Sequence[InstanceSample],
    delta: float = 0.01,
    alpha: float = 0.05,
    session: int = CANDIDATE,
    base: int = 0,
    one_scatter: bool = True,
) -> Verdict:
    """The verdict on a session of instances against another one, by their control and their sums too.

    base: 0 for the baseline, which stepped twice, or a session from 2 on; one_scatter: whether the times of
    all sessions scatter alike, so that the baseline's control speaks for each.
    """
    with_control = [i.of((0, 1, session)) for i in kept]
    # sessions are judged against the first of all; of two, the second is judged as a control is
    views, last = ([i.of((base, session)) for i in kept], CONTROL) if base else (with_control, CANDIDATE)
    return judge_instances(
        by_fork(kept, instance_estimates(views, last)), pairs=sum(len(i.seconds) for i in kept), delta=delta, alpha=alpha,
        control=by_fork(kept, instance_estimates(with_control, CONTROL)), sums=by_fork(kept, estimates_by_sums(views, last)),
        control_of="both" if one_scatter else "neither" if base else "baseline",
    )  # fmt: skip


def verdict_of(record: ComparisonRecord) -> Verdict:
    """The verdict that the samples support by the rule that the settings declared: the one place that computes it."""
    settings = record.settings
    alpha = look_alpha(settings.alpha, settings.looks) if settings.looks else settings.alpha
    short, kept = shortfalls(record), kept_instances(record)
    cycles = settings.pairs_of == "cycles"
    forks = judged_pairs(record)
    if not (kept if cycles else forks):
        return Verdict(
            decision=Decision.INCONCLUSIVE, estimate=math.nan, low=0.0, high=math.inf, equivalence=(0.0, math.inf),
            method="none", pairs=0, forks=0, delta=settings.delta, alpha=alpha, provisional=True,
            reasons=(Reason(why=Why.NO_PAIRS), *short),
        )  # fmt: skip
    control, delta = judged_pairs(record, control=True), settings.delta
    verdict = (
        judge_kept(kept, delta, alpha) if cycles else judge(forks, delta, alpha, control=control or None)
    )
    planned = record.stopped_early or settings.iterations
    left, doubts = len(kept) if cycles else verdict.pairs, []
    if left < ENOUGH_PAIRS * planned and settings.minutes is None:
        doubts.append(Reason(why=Why.PAIRS_LOST, count=left, of=planned))
    if settings.control_forks and not control:
        doubts.append(Reason(why=Why.NO_CONTROL))
    if beyond := beyond_ceiling(record, verdict):
        doubts.append(beyond)
    decision = Decision.INCONCLUSIVE if doubts else verdict.decision
    hosts = len({place.machine for place in record.places})
    over = [Reason(why=Why.OVER_MACHINES, count=hosts)] if hosts > 1 else []
    return verdict.model_copy(
        update={"decision": decision, "reasons": (*verdict.reasons, *doubts, *short, *over)}
    )


@dataclass(frozen=True)
class OnMachine:
    """What one host of a cluster says alone: its name, its hardware by `machine_key`, its forks' verdict."""

    machine: str
    hardware: str
    verdict: Verdict


def by_machine(record: ComparisonRecord) -> list[OnMachine]:
    """Each host's own estimate; nothing for a record that was not taken on a cluster."""
    found = []
    for machine in dict.fromkeys(place.machine for place in record.places):
        places = [place for place in record.places if place.machine == machine]
        forks = {place.fork for place in places}
        kept = {
            field: [one for one in getattr(record, field) if one.fork in forks]
            for field in ("instances", "samples", "parts")
        }
        alone = record.model_copy(update=kept | {"places": places})
        found.append(OnMachine(machine, alone.hardware, verdict_of(alone)))
    return found


def differs_in_mask(record: ComparisonRecord) -> bool:
    """Whether the arms differ in the mask's builder and in nothing else, so that the measured part is all that changed."""
    # with it comes torch, for which a pipeline's verdict doesn't wait
    from eagle_lab.engines.arm import parse

    s = record.settings
    try:
        one = parse(s.baseline)
        other = parse(s.candidate, one)
    except ValueError:  # a builder of somebody's own
        return False
    moved = replace(one, strategy=replace(one.strategy, mask=other.strategy.mask))
    return s.spans[0] == s.spans[1] and one != other and moved == other


def beyond_ceiling(record: ComparisonRecord, verdict: Verdict) -> Reason | None:
    """The doubt about a verdict that says more than what differs between the arms could bring; None where it says no more.

    What differs must be the measured part alone. Faster: the most is what the baseline would gain without the part;
    slower: what the candidate would. Doubted where the effect that is worth acting on, or the whole interval, lies beyond
    `CEILING_SLACK` times that.
    """
    if verdict.decision not in (Decision.ADOPT, Decision.REVERT):
        return None
    faster = verdict.decision is Decision.ADOPT
    found = part_share(record, "baseline" if faster else "candidate")
    if found is None or found[0] >= 1:
        return None
    most = gain(found[0])
    ends = (1 / verdict.estimate, 1 / verdict.high) if faster else (verdict.estimate, verdict.low)
    effect, least = (end - 1 for end in ends)
    if max(verdict.delta, least) <= CEILING_SLACK * most or not differs_in_mask(record):
        return None
    return Reason(why=Why.BEYOND_CEILING, times=effect / most if most else None, most=most)


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


def _row(
    metric: str, unit: str, scale: float, forks: list[list[tuple[float, float]]], beside: bool = False
) -> Row:
    """beside: whether it only stands beside the verdict, so that two processes give no interval."""
    flat = [pair for fork in forks for pair in fork]
    arms = [median_interval([pair[arm] * scale for pair in flat]) for arm in (0, 1)]
    low, at, high = shift([[math.log(c / b) for b, c in fork] for fork in forks])
    if beside and 1 < len(forks) < ENOUGH_WHOLES:
        low, high = -math.inf, math.inf
    return Row(metric, unit, arms[0], arms[1], ratios_of((low, at, high)))


def cycle_seconds(instance: InstanceSample) -> tuple[float, float]:
    """Seconds of a cycle in turn, of the baseline's sessions and of the candidate's: in slices without what was late, else
    the mean."""
    if instance.slices and _by_cycles(instance):
        found = calm_rounds(slice_logs(instance), CANDIDATE, (0, 1))
        return found.base_s, found.base_s * math.exp(found.ratio)
    sums = np.asarray(instance.seconds).sum(0)
    cycles = [instance.cycles(session) for session in range(3)]
    return float((sums[0] + sums[1]) / (cycles[0] + cycles[1])), float(sums[CANDIDATE] / cycles[CANDIDATE])


def calm_cycle_s(instances: Sequence[InstanceSample], arm: int = 0) -> float:
    """Seconds of a cycle of the baseline (0) or the candidate (1), the median over instances."""
    return float(np.median([cycle_seconds(i)[arm] for i in instances]))


def _in_turn(record: ComparisonRecord) -> list[Row]:
    """The rows that cycles in turn give: a cycle, and where the arms need unlike numbers of them a token."""
    kept, verdict = kept_instances(record), verdict_of(record)
    if not kept:
        return []
    each = [cycle_seconds(i) for i in kept]
    cycle = _row("a cycle", "ms", 1e3, by_fork(kept, each))
    ratio = verdict.interval
    if not any(i.cycles(CANDIDATE) != i.cycles(0) for i in kept):
        return [replace(cycle, ratio=ratio)]
    tokens = [
        (one * i.cycles(0) / sum(i.tokens), other * i.cycles(CANDIDATE) / sum(i.tokens))
        for i, (one, other) in zip(kept, each, strict=True)
    ]
    return [cycle, replace(_row("time per output token", "ms", 1e3, by_fork(kept, tokens)), ratio=ratio)]


def table(record: ComparisonRecord) -> list[Row]:
    """Cycles in turn, where they were taken, then the original investigation's table: end-to-end latency, mask
    construction, token throughput; and the prefill with the first cycle."""
    forks, parts = fork_pairs(record), part_pairs(record)
    rows = _in_turn(record)
    kept = counted(record)
    whole: list[tuple[str, str, float, list[list[tuple[float, float]]]]] = [
        ("E2E latency", "ms", 1e3, forks),
        ("of it prefill and first cycle", "ms", 1e3, _of_samples(kept, lambda s: s.first_s)),
        ("mask construction, a call", "ms", 1e3, parts),
        ("output throughput", "tokens/s", 1, _of_samples(kept, _throughput)),
    ]
    if record.settings.outside:
        whole[1] = ("TTFT", *whole[1][1:])
        whole.insert(2, ("TPOT", "ms", 1e3, _of_samples(kept, _time_per_output_token)))
        whole.insert(3, ("ITL", "ms", 1e3, _of_samples(kept, lambda s: s.gap_s)))
    beside = record.settings.pairs_of == "cycles"
    rows += [_row(*row, beside) for row in whole if row[3]]
    found = factors(record)
    return [*rows, found.acceptance_length] if found else rows


def _throughput(sample: Sample) -> tuple[float, float]:
    left, right = _new_tokens(sample)
    return left / sample.baseline_s, right / sample.candidate_s


def _time_per_output_token(sample: Sample) -> tuple[float, float] | None:
    """Seconds after the first token a token after the first, as servers' benchmarks count."""
    left, right = _new_tokens(sample)
    if sample.first_s is None or min(left, right) < 2:
        return None
    first, other = sample.first_s
    return (sample.baseline_s - first) / (left - 1), (sample.candidate_s - other) / (right - 1)


@dataclass(frozen=True)
class Factors:
    """The ratio of times as a product, candidate over baseline: cycles needed for a token, times the time of a cycle.

    Each with its interval over the iterations. acceptance_length: tokens a cycle (τ, the bonus counted) of both arms, pooled
    over all their cycles.
    """

    cycles: Interval
    cycle_s: Interval
    acceptance_length: Row


def factors(record: ComparisonRecord) -> Factors | None:
    """The two factors; None where one arm doesn't tell its cycles, or both need the same by nature, in this process.

    Pairs of whole decodes: the time of a cycle has the prefill's share in it.
    """
    if record.settings.pairs_of == "cycles":
        kept: Sequence[InstanceSample | Sample] = (instances := kept_instances(record))
        each = [
            ((i.cycles(0) + i.cycles(1)) / 2, float(i.cycles(CANDIDATE)), sum(i.tokens)) for i in instances
        ]
        sums = [((tokens, one), (tokens, other)) for one, other, tokens in each]
        took = by_fork(instances, [cycle_seconds(i) for i in instances])
    else:
        told = [(s, left, right) for s in counted(record) for left, right in [s.counts or (None, None)]]
        both = [
            (s, one, other) for s, one, other in told if one and other and _cycled(one) and _cycled(other)
        ]
        kept = [s for s, _, _ in both]
        sums = [((one.committed, one.cycles), (other.committed, other.cycles)) for _, one, other in both]
        took = by_fork(
            kept, [(s.baseline_s / one.cycles, s.candidate_s / other.cycles) for s, one, other in both]
        )
    lengths = by_fork(kept, [(tokens / one, more / other) for (tokens, one), (more, other) in sums])
    alike = all(left == right for fork in lengths for left, right in fork)
    if not lengths or (alike and not record.settings.outside):
        return None
    tau = _row("mean_acceptance_length", "tokens/cycle", 1, lengths)
    tau = replace(
        tau, baseline=_pooled([one for one, _ in sums]), candidate=_pooled([other for _, other in sums])
    )
    low, at, high = tau.ratio
    return Factors(
        (1 / high if high else 0.0, 1 / at, 1 / low if low else math.inf), _row("", "", 1, took).ratio, tau
    )


def _pooled(sums: Sequence[tuple[float, float]]) -> Interval:
    """Tokens a cycle of (tokens, cycles) of each iteration: all tokens over all cycles, with the interval of a ratio of two
    sums, linearised (Cochran, Sampling Techniques, 6.4)."""
    tokens, cycles = np.asarray(sums, float).T
    value = float(tokens.sum() / cycles.sum())
    if len(tokens) < 2:
        return -math.inf, value, math.inf
    low, high = t_interval(value + (tokens - value * cycles) / cycles.mean())
    return float(low), value, float(high)


def _cycled(counts: Counts) -> bool:
    return counts.cycles > 0 and counts.committed > 0


def gain(share: float) -> float:
    """Amdahl's ceiling, share / (1 - share): what the whole gains in speed if the part takes no time at all."""
    return share / (1 - share) if share < 1 else math.inf


@dataclass(frozen=True)
class Ceiling:
    """The part's share of the baseline's time, and the `gain` that its removal would bring at most.

    calls: of a whole decode, or of a cycle where cycles are what is timed.
    """

    share: float
    gain: float
    calls: float


def part_share(record: ComparisonRecord, arm: str = "baseline") -> tuple[float, float] | None:
    """The part's share of what is timed in one arm ("baseline", "candidate"), and its calls in that; None where the part
    was not measured."""
    parts, kept, instances = part_pairs(record), counted(record), kept_instances(record)
    cycles = record.settings.pairs_of == "cycles"
    if not parts or not (instances if cycles else kept):
        return None
    which = ("baseline", "candidate").index(arm)
    call = float(np.median([pair[which] for fork in parts for pair in fork]))
    if cycles:
        whole = calm_cycle_s(instances, which)
        calls = float(np.median([len(p.calls_s) / p.cycles for p in record.parts if p.calls_s]))
    else:
        whole = float(np.median([(s.baseline_s, s.candidate_s)[which] for s in kept]))
        calls = float(np.median([s.cycles or 0 for s in kept]))
    return call * calls / whole, calls


def ceiling(record: ComparisonRecord) -> Ceiling | None:
    """The most that any change of the part can bring; None where the part was not measured."""
    found = part_share(record)
    if found is None:
        return None
    share, calls = found
    return Ceiling(share, gain(share), calls)


def consistency_of(record: ComparisonRecord) -> Consistency | None:
    """Does the part's measured change, times its calls, account for the change of what is timed? None where unmeasured."""
    parts, top = part_pairs(record), ceiling(record)
    if top is None:
        return None
    part = shift([[c - b for b, c in fork] for fork in parts])
    if record.settings.pairs_of == "decodes":
        return consistency(part, top.calls, shift([[c - b for b, c in fork] for fork in fork_pairs(record)]))
    verdict, cycle_s = verdict_of(record), calm_cycle_s(kept_instances(record))
    low, at, high = (cycle_s * (x - 1) for x in verdict.interval)
    return consistency(part, top.calls, (low if verdict.known else -math.inf, at, high))


@dataclass(frozen=True)
class Alone:
    """What whole decodes say of the cycles after the first, candidate over baseline: low, estimate, high; and from how
    many pairs. agrees: whether that interval meets the one of cycles in turn, None where either has no ends, as from fewer
    than `ENOUGH_WHOLES`."""

    ratio: Interval
    pairs: int
    agrees: bool | None


def alone(record: ComparisonRecord) -> Alone | None:
    """Whole decodes held against cycles in turn; None where either was not taken."""
    forks = _of_samples(counted(record), _after_first)
    if not forks or not kept_instances(record):
        return None
    logs = [[math.log(candidate / baseline) for baseline, candidate in fork] for fork in forks]
    low, at, high = ratios_of(over_instances(logs))
    if len(forks if len(forks) > 1 else logs[0]) < ENOUGH_WHOLES:
        low, high = 0.0, math.inf
    verdict = verdict_of(record)
    known = verdict.known and math.isfinite(high)
    meets = low <= verdict.high and high >= verdict.low
    return Alone((low, at, high), sum(map(len, forks)), meets if known else None)


def sums(record: ComparisonRecord) -> Interval | None:
    """Candidate over baseline by all of their time in turn, where the verdict weighs it: low, estimate, high."""
    kept = kept_instances(record)
    if not kept or not all(map(_by_cycles, kept)):
        return None
    return ratios_of(over_instances(by_fork(kept, estimates_by_sums(kept)), verdict_of(record).alpha))


def _after_first(sample: Sample) -> tuple[float, float] | None:
    """Seconds after the first cycle, by arm; None where they weren't told apart or nothing came after it."""
    if sample.first_s is None:
        return None
    rest = sample.baseline_s - sample.first_s[0], sample.candidate_s - sample.first_s[1]
    return rest if min(rest) > 0 else None


@dataclass(frozen=True)
class Outlook:
    """What a finished run told, and what more would cost: half_width of its interval, the half-width `wanted` next, and
    about how many seconds more that would take."""

    half_width: float
    wanted: float
    more_s: float


def outlook(record: ComparisonRecord) -> Outlook | None:
    """For half of delta where the interval is wider, else for half of what it is; None for a run that goes on, or without
    an interval."""
    verdict = verdict_of(record)
    if record.finished is None or not verdict.known:
        return None
    half = math.log(verdict.high / verdict.low) / 2
    aim = record.settings.delta / 2
    wanted = aim if half > aim else half / 2
    spent = (record.finished - record.created).total_seconds()
    return Outlook(half, wanted, spent * ((half / wanted) ** 2 - 1) if wanted else 0.0)


@dataclass(frozen=True)
class Agreement:
    """Whether the arms gave the same text: in how many iterations, and on how many prompts in all their iterations.

    parted: where the others part, in the order taken.
    """

    iterations: int
    same: int
    prompts: int
    prompts_same: int
    parted: list[Difference]


@dataclass(frozen=True)
class Summary:
    """What one record says, computed once; None for what it has not measured.

    control: the A/A control, judged alike; alone: whole decodes beside cycles in turn; sums: candidate over baseline by all
    time in turn, nothing weighed; foreign_load: share of the cores that other programs took, the median over the iterations;
    factors: where the arms need unlike numbers of cycles; machines: of a cluster; agreement: of the arms' texts.
    """

    verdict: Verdict
    rows: list[Row]
    control: Verdict | None
    ceiling: Ceiling | None
    consistency: Consistency | None
    alone: Alone | None
    sums: Interval | None
    acceptance_length: float | None
    foreign_load: float | None
    factors: Factors | None
    outlook: Outlook | None
    machines: list[OnMachine]
    agreement: Agreement


def control_verdict(record: ComparisonRecord) -> Verdict | None:
    """The baseline against itself, judged as the comparison is; None where there is no control."""
    settings, kept, control = record.settings, kept_instances(record), judged_pairs(record, control=True)
    if settings.pairs_of == "decodes":
        return judge(control, settings.delta, settings.alpha) if control else None
    if not kept:
        return None
    pairs = sum(len(i.seconds) for i in kept)
    logs = by_fork(kept, instance_estimates(kept, CONTROL))
    return judge_instances(logs, pairs=pairs, delta=settings.delta, alpha=settings.alpha)


def summarise(record: ComparisonRecord) -> Summary:
    """Everything that is derived from a record's samples."""
    loads = [s.foreign_load for s in record.iterations]
    beside = alone(record) if record.settings.pairs_of == "cycles" else None
    return Summary(
        verdict_of(record), table(record), control_verdict(record), ceiling(record), consistency_of(record), beside,
        sums(record), acceptance_length(record), float(np.median(loads)) if loads else None, factors(record),
        outlook(record), by_machine(record), agreement(record),
    )  # fmt: skip


def agreement(record: ComparisonRecord) -> Agreement:
    """How far the arms' texts agree. What was dropped counts too: what disturbs a time changes no text."""
    taken = record.iterations
    unlike = {sample.prompt for sample in taken if sample.difference}
    parted = [sample.difference for sample in taken if sample.difference]
    prompts = len({sample.prompt for sample in taken})
    return Agreement(len(taken), len(taken) - len(parted), prompts, prompts - len(unlike), parted)


def acceptance_length(record: ComparisonRecord) -> float | None:
    """τ of the baseline: tokens a cycle over all stretches, or new tokens a cycle over all pairs; None where there is none."""
    if record.settings.pairs_of == "cycles":
        tokens = sum(sum(i.tokens) for i in record.instances)
        cycles = sum(i.cycles(0) for i in record.instances)
    else:
        taken = [s for s in record.samples if not s.control]
        tokens, cycles = sum(s.new_tokens for s in taken), sum(s.cycles or 0 for s in taken)
    return tokens / cycles if cycles else None
