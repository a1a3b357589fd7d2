"""From pairs of timings to a verdict: estimate, interval, threshold, and the reasons in words.

A pair is one prompt decoded by both arms, one directly after the other, in an order drawn by a coin, or a stretch of
text that both decode in lock-step; an instance is one prompt in lock-step; a fork is a fresh process. All work is on
d = log(candidate / baseline), and the thresholds are as symmetric: faster
by delta means a ratio of at most 1 / (1 + delta), slower by delta at least 1 + delta. So swapping the arms
inverts every ratio and turns ADOPT into REVERT. How often each rule errs: `eagle_lab.verdict.simulate`.
Sources: Hollander and Wolfe, Nonparametric Statistical Methods, 3.2 and 3.3 (Hodges-Lehmann, its interval);
Schuirmann 1987 (two one-sided tests); Georges et al., OOPSLA 2007 (fresh processes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field, PlainSerializer
from scipy import stats

from eagle_lab.measure.environment import Cause
from eagle_lab.measure.records import Part

Interval = tuple[float, float, float]  # low, estimate, high
Forks = Sequence[Sequence[tuple[float, float]]]
ENOUGH = 6  # pairs below which there is no interval at 95%
ENOUGH_FORKS = 5


class Decision(StrEnum):
    """What a comparison can end with; each is its own name as text."""

    ADOPT = "ADOPT"
    REVERT = "REVERT"
    NO_DIFFERENCE = "NO_DIFFERENCE"
    INCONCLUSIVE = "INCONCLUSIVE"


class Why(StrEnum):
    """What a verdict rests on, or what keeps it from being one."""

    CLEAR = "clear"  # the interval excludes 1, and the estimate is at least delta away from it
    # it excludes 1, but the estimate is within delta and the equivalence interval reaches beyond
    SMALL = "small"
    HOLDS_ONE = "holds one"  # it holds 1, and the equivalence interval reaches beyond delta
    WITHIN_DELTA = "within delta"  # the equivalence interval lies within delta of 1
    NO_INTERVAL = "no interval"  # one fork with so few pairs has none
    NO_PAIRS = "no pairs"
    FEW_PAIRS = "few pairs"  # count of at least `of`
    PAIRS_LOST = "pairs lost"  # less than half of the planned pairs are left: count of `of`
    CONTROL_DIFFERS = "control differs"  # the A/A control's interval
    NO_CONTROL = "no control"  # it was declared, and no pair of it is left
    PROVISIONAL = "provisional"  # count of at least `of` forks
    # count of `of` pairs, of the control where `control`, by the declared rule for `causes`
    DROPPED = "dropped"
    # all of the arms' time, nothing weighed, is off by `interval`, and would end otherwise
    SUMS_DIFFER = "sums differ"
    # the effect is so many `times` the `most` that the changed part could bring
    BEYOND_CEILING = "beyond ceiling"
    NOT_TAKEN = "not taken"  # count of `of` planned pairs were taken
    OVER_MACHINES = "over machines"  # the forks ran on `count` hosts


# JSON has neither infinity nor NaN: both are null there
_ANY = Field(allow_inf_nan=True)
_NULL = PlainSerializer(lambda x: x if math.isfinite(x) else None, when_used="json")
End = Annotated[float, _ANY, BeforeValidator(lambda x: math.inf if x is None else x), _NULL]
Estimate = Annotated[float, _ANY, BeforeValidator(lambda x: math.nan if x is None else x), _NULL]
Method = Literal["signed rank", "t over forks", "t over instances", "none"]


class Reason(Part):
    """One reason with the numbers it speaks of; those of the verdict itself aren't said twice."""

    why: Why
    count: int | None = None
    of: int | None = None
    control: bool = False
    causes: tuple[Cause, ...] = ()
    interval: tuple[float, float, End] | None = None  # low, estimate, high
    times: float | None = None
    most: float | None = None  # a share of the time, 0.01 for 1%


class Verdict(Part):
    """A decision and what it rests on. Ratios are candidate time / baseline time: below 1 is faster.

    low, high: the interval at 1 - alpha, 0 to inf where the pairs are too few for one; estimate: NaN where no pair is
    left; equivalence: the interval at 1 - 2 alpha. pairs: of whole decodes, or of stretches in so many instances.
    provisional: fewer than five forks, so that a process's own bias may be all there is.
    """

    decision: Decision
    estimate: Estimate
    low: float
    high: End
    equivalence: tuple[float, End]
    method: Method
    pairs: int
    instances: int = 0
    forks: int
    delta: float
    alpha: float
    provisional: bool
    reasons: tuple[Reason, ...]

    @property
    def interval(self) -> Interval:
        """Low, estimate, high."""
        return self.low, self.estimate, self.high

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.high)

    def __str__(self) -> str:
        """The bare numbers: "INCONCLUSIVE 1.007 [0.966, 1.050], 20 pairs in 5 processes"."""
        digits = 4 if self.instances else 3
        ratio = f" {self.estimate:.{digits}f}" if self.pairs else ""
        ends = f" [{self.low:.{digits}f}, {self.high:.{digits}f}]" if self.known else ""
        inside = f" of cycles, {_many(self.instances, 'instance')}" if self.instances else ""
        counts = f"{_many(self.pairs, 'pair')}{inside} in {_many(self.forks, 'process', 'es')}"
        return f"{self.decision}{ratio}{ends}, {counts}{', provisional' * self.provisional}"


def _many(count: int, what: str, more: str = "s") -> str:
    return f"{count} {what}{more * (count != 1)}"


def hodges_lehmann(d: ArrayLike) -> NDArray:
    """Median of the Walsh averages (d_i + d_j) / 2, i <= j, of float [..., n]; returns [...]."""
    return np.median(_walsh(d), axis=-1)


# passes after which weights and the sessions' distances agree; a sum's least term, 0.1% of a time: below it all weigh alike;
# the least weight of a slice whose largest is 1
PASSES, LEAST, FAINT = 5, 1e-6, 1e-9


def calm_weights(logs: NDArray) -> NDArray:
    """How much each session's round of each slice counts, [rounds, sessions, slices]: little where it was disturbed.

    Args: logs: log seconds of the sessions' slices, taken round by round [rounds, sessions, slices].
    Late is what lies above what the fastest session of the calm rounds takes; twice the usual lateness counts four times
    less than it: so equal arms differed least, on quiet cores and beside bursts of 50 ms. What the sessions differ by anyway
    is taken out before, in a few passes. All sessions are treated alike, so the weights favour none of equal noise, and a
    session that is slower in every round keeps its weights. One whose times scatter more is put nearer to its fast rounds.
    What a session does only in some rounds weighs like a disturbance; rounds that grow with the text count the less the later
    they are.
    """
    apart = np.median(logs, axis=0)
    for _ in range(PASSES):
        level = logs - (apart - apart.mean(0))
        late = np.maximum(0, level - np.quantile(level.min(1), 0.1, axis=0))
        weights = (np.median(late) ** 2 + late**2 + LEAST) ** -1.5
        weights = np.maximum(weights / weights.max((0, 1)), FAINT)
        apart = _apart(logs, weights).sum(0)
    return weights


def _apart(logs: NDArray, weights: NDArray) -> NDArray:
    """What each round adds to the sessions' distances from their mean [rounds, sessions, slices].

    Their sum is the weighted least squares fit of a session and a round to each slice's log seconds: what slows a round
    for all sessions moves nothing, and what is late counts little.
    """
    total = weights.sum(1, keepdims=True)
    pull = weights * (logs - (weights * logs).sum(1, keepdims=True) / total)
    inner = -np.einsum("rak,rbk->kab", weights, weights / total)
    n = np.arange(logs.shape[1])
    inner[:, n, n] += weights.sum(0).T
    inner += np.trace(inner, axis1=1, axis2=2)[:, None, None]  # else singular: only distances are fitted
    return np.einsum("kab,rbk->rak", np.linalg.inv(inner), pull)


class Calm(NamedTuple):
    """A cycle without what was late. ratio: log(session / mean of bases); rounds [rounds]: what each says of it, to first
    order, whose mean it is; base_s: the bases' cycle."""

    ratio: float
    rounds: NDArray
    base_s: float


def calm_rounds(logs: NDArray, session: int, bases: Sequence[int]) -> Calm:
    """A whole cycle of a session against the mean of some others.

    Args: logs: as in `calm_weights` [rounds, sessions, slices]. Each slice has a ratio of its own; the slices are weighted by
    their times.
    """
    weights = calm_weights(logs)
    apart = _apart(logs, weights).sum(0)
    rest = len(logs) * _apart(logs - apart, weights)  # of each round, beside what is true of all
    ratios, each = (x[..., session, :] - x[..., list(bases), :].mean(-2) for x in (apart, rest))
    base = np.exp(((weights * logs).sum(0) / weights.sum(0))[list(bases)].mean(0))
    mine = base * np.exp(ratios)
    ratio = float(np.log(mine.sum() / base.sum()))
    return Calm(ratio, ratio + each @ (mine / mine.sum()), float(base.sum()))


def signed_rank_interval(d: ArrayLike, alpha: float = 0.05) -> tuple[NDArray, NDArray]:
    """The shifts of d that the exact two-sided Wilcoxon signed-rank test doesn't reject at alpha.

    Args: d float [..., n]. Returns low, high [...]; -inf, inf where n is too small (below 6 at 95%). The ends
    are Walsh averages and belong to it: its confidence is at least 1 - alpha (95.2% at n = 20), and ties can
    only raise that.
    """
    walsh = _walsh(d)
    k = _signed_rank_depth(np.shape(d)[-1], alpha)
    if k == 0:
        return np.full(walsh.shape[:-1], -np.inf), np.full(walsh.shape[:-1], np.inf)
    ends = (k - 1, walsh.shape[-1] - k)
    ranked = np.partition(walsh, ends, axis=-1)
    return ranked[..., ends[0]], ranked[..., ends[1]]


def t_interval(estimates: ArrayLike, alpha: float = 0.05) -> tuple[NDArray, NDArray]:
    """Student's interval for the mean of float [..., k], an estimate a fork, k >= 2: low, high [...]."""
    x = np.asarray(estimates, float)
    half = stats.t.ppf(1 - alpha / 2, x.shape[-1] - 1) * x.std(axis=-1, ddof=1) / math.sqrt(x.shape[-1])
    return x.mean(axis=-1) - half, x.mean(axis=-1) + half


def shift(forks: Sequence[ArrayLike], alpha: float = 0.05) -> Interval:
    """Low, estimate and high of paired differences: signed rank in one fork, t over the forks' estimates in more."""
    estimates = np.array([hodges_lehmann(d) for d in forks])
    low, high = signed_rank_interval(forks[0], alpha) if len(forks) == 1 else t_interval(estimates, alpha)
    return float(low), float(estimates.mean()), float(high)


def ratios_of(logs: Interval) -> Interval:
    """An interval on the log scale as one of ratios."""
    low, estimate, high = map(math.exp, logs)
    return low, estimate, high


def decide(estimate: ArrayLike, interval: tuple, near: tuple, delta: float = 0.01) -> NDArray:
    """The rule, elementwise on the log scale. Returns the decisions' names, str [...].

    Args: estimate [...]; interval: low, high at 1 - alpha, each [...]; near: the same at 1 - 2 alpha.
    """
    limit = math.log1p(delta)
    (low, high), at = map(np.asarray, interval), np.asarray(estimate)
    rules = {
        Decision.INCONCLUSIVE: ~np.isfinite(low),
        Decision.ADOPT: (high < 0) & (at <= -limit),
        Decision.REVERT: (low > 0) & (at >= limit),
        Decision.NO_DIFFERENCE: (np.asarray(near[0]) > -limit) & (np.asarray(near[1]) < limit),
    }
    return np.select(list(rules.values()), [x.value for x in rules], Decision.INCONCLUSIVE.value)


def judge(
    forks: Forks, delta: float = 0.01, alpha: float = 0.05, control: Forks | None = None, min_pairs: int = 6
) -> Verdict:
    """Is the candidate faster by delta, slower by delta, neither, or can it not be told?

    Args: forks: for each fork its (baseline, candidate) times, above 0, in any one unit; delta: declared
    before the run, 0.01 for 1%; control: forks of the baseline against itself, in the same form; min_pairs:
    fewer pairs in all are INCONCLUSIVE. Raises ValueError, in one sentence, for anything else.
    One fork: Hodges-Lehmann with the exact signed-rank interval. More: Student's t on the forks'
    Hodges-Lehmann estimates, each fork counting once. Below five forks the decision stands, but provisional.
    A control whose interval excludes 1, or whose estimate is beyond delta, makes it INCONCLUSIVE. On a sound machine
    too that costs verdicts: at least alpha of them.
    """
    _check_levels(delta, alpha)
    logs = _log_ratios(forks, "forks")
    pairs = sum(map(len, logs))
    doubts = []
    if control is not None:
        doubts += _control_doubts(shift(_log_ratios(control, "control forks"), alpha), delta)
    if pairs < min_pairs:
        doubts.append(Reason(why=Why.FEW_PAIRS, count=pairs, of=min_pairs))
    ends = [shift(logs, level) for level in (alpha, 2 * alpha)]
    method: Method = "signed rank" if len(logs) == 1 else "t over forks"
    return _judged(ends[0], ends[1], doubts, delta, alpha, method=method, pairs=pairs, forks=len(logs))


def judge_instances(
    forks: Sequence[ArrayLike],
    *,
    pairs: int,
    delta: float = 0.01,
    alpha: float = 0.05,
    control: Sequence[ArrayLike] | None = None,
    sums: Sequence[ArrayLike] | None = None,
    control_of: Literal["both", "baseline", "neither"] = "both",
) -> Verdict:
    """`judge` for arms in lock-step.

    Args: forks: for each fork its instances' estimates of log(candidate / baseline); pairs: how many stretches are
    behind them; control: the same instances' estimates of the baseline against itself; sums: theirs by all of the arms'
    time, in which what an arm does only in some cycles counts in full.
    More than one fork: Student's t on the means of the forks. One: on its instances, provisional. A control whose
    interval at alpha / 10 excludes 1, or whose estimate is beyond delta, makes it INCONCLUSIVE: on a sound machine that
    costs a tenth of alpha. control_of: whose times the control has. Of the baseline, where the candidate's scatter less,
    its estimate speaks only if the decision would be another by so much; of another arm, its interval alone speaks. Sums
    that differ from the estimates, by an interval at alpha, so far that the decision would be another make it INCONCLUSIVE too.
    """
    _check_levels(delta, alpha)
    logs = [np.asarray(fork, float) for fork in forks]
    doubts = []
    ends = [over_instances(logs, level) for level in (alpha, 2 * alpha)]

    def moves(by: float) -> bool:
        """Whether there is a decision, and it would be another if all were off by so much."""
        (low, at, high), near = ends
        here, there = (
            str(decide(at + x, (low + x, high + x), (near[0] + x, near[2] + x), delta)) for x in (0.0, by)
        )
        return here not in (there, Decision.INCONCLUSIVE)

    if control is not None:
        found = over_instances(control, alpha / 10)
        speaks = control_of == "both" or control_of == "baseline" and any(map(moves, (found[1], -found[1])))
        doubts += _control_doubts(found, delta if speaks else math.inf)
    if sums is not None:
        off = over_instances([np.asarray(s) - x for s, x in zip(sums, logs, strict=True)], alpha)
        if (off[0] > 0 or off[2] < 0) and moves(off[1]):
            doubts.append(Reason(why=Why.SUMS_DIFFER, interval=ratios_of(off)))
    method: Method = "t over instances" if len(logs) == 1 else "t over forks"
    return _judged(
        ends[0], ends[1], doubts, delta, alpha, method=method, pairs=pairs, forks=len(logs), instances=sum(map(len, logs))
    )  # fmt: skip


def over_instances(forks: Sequence[ArrayLike], alpha: float = 0.05) -> Interval:
    """Low, estimate and high of instances' estimates by fork: Student's t over the forks' means, or over the instances of
    the only fork; infinite ends for a single instance."""
    logs = [np.asarray(fork, float) for fork in forks]
    means = np.array([x.mean() for x in logs]) if len(logs) > 1 else logs[0]
    low, high = t_interval(means, alpha) if len(means) > 1 else (-math.inf, math.inf)
    return float(low), float(means.mean()), float(high)


def _check_levels(delta: float, alpha: float) -> None:
    if not all(isinstance(x, int | float) for x in (delta, alpha)) or not (0 < delta < 1 and 0 < alpha < 0.5):
        raise ValueError(f"delta is {delta!r} and alpha {alpha!r}; they must lie in 0 to 1 and 0 to 0.5.")


def _judged(
    found: Interval,
    near: Interval,
    doubts: list[Reason],
    delta: float,
    alpha: float,
    *,
    forks: int,
    **counts: Any,
) -> Verdict:
    decision = Decision(str(decide(found[1], found[::2], near[::2], delta)))
    reasons = [*doubts, Reason(why=_why(decision, found))]
    provisional = forks < ENOUGH_FORKS
    if provisional:
        # a bias that lasts as long as its process looks like an effect from inside
        reasons.append(Reason(why=Why.PROVISIONAL, count=forks, of=ENOUGH_FORKS))
    low, estimate, high = ratios_of(found)
    return Verdict(
        decision=Decision.INCONCLUSIVE if doubts else decision, estimate=estimate, low=low, high=high,
        equivalence=(math.exp(near[0]), math.exp(near[2])), forks=forks, delta=delta, alpha=alpha,
        provisional=provisional, reasons=tuple(reasons), **counts,
    )  # fmt: skip


def look_alpha(alpha: float, looks: Sequence[int]) -> float:
    """`judge`'s alpha at each look of a run that may stop at any of `looks` (pairs so far, declared before).

    Bonferroni: the chance that any look errs stays below alpha; the full alpha at every look doesn't do that.
    Raises ValueError unless the looks are rising numbers of pairs.
    """
    if not looks or looks[0] < 1 or any(b <= a for a, b in zip(looks, looks[1:], strict=False)):
        raise ValueError(f"looks is {tuple(looks)}; it must be rising numbers of pairs, such as 10, 15, 20.")
    return alpha / len(looks)


def paired_interval(base: ArrayLike, candidate: ArrayLike, alpha: float = 0.05) -> Interval:
    """Ratio candidate / base of any positive metric, both [n], of one process: low, estimate, high.

    Raises ValueError for any other shapes, and for what is not positive.
    """
    base, candidate = np.asarray(base), np.asarray(candidate)
    if base.ndim != 1 or base.shape != candidate.shape:
        raise ValueError(f"Paired metrics have shapes {base.shape} and {candidate.shape}; both must be [n].")
    return ratios_of(shift(_log_ratios([list(zip(base, candidate, strict=True))], "metrics"), alpha))


def median_interval(x: ArrayLike, alpha: float = 0.05) -> Interval:
    """Low, median and high of one sample [n] of any distribution (binomial); infinite below n = 6 at 95%.

    Raises ValueError for an empty sample, NaN, or another shape.
    """
    values = np.asarray(x, float)
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise ValueError("A median needs a flat list of at least one number and no NaN.")
    ends = stats.quantile_test(values, p=0.5).confidence_interval(1 - alpha)
    low, high = (
        end if math.isfinite(end) else limit for end, limit in zip(ends, (-math.inf, math.inf), strict=True)
    )
    return float(low), float(np.median(values)), float(high)


def _walsh(d: ArrayLike) -> NDArray:
    x = np.asarray(d, float)
    i, j = np.triu_indices(x.shape[-1])
    return (x[..., i] + x[..., j]) / 2


@lru_cache(maxsize=64)
def _signed_rank_depth(n: int, alpha: float) -> int:
    """The largest k with P(T < k) <= alpha / 2: the k-th Walsh averages from the ends bound the interval."""
    chance = np.zeros(n * (n + 1) // 2 + 1)
    chance[0] = 1.0
    for rank in range(1, n + 1):  # under the null each rank has either sign with equal chance
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    return int(np.searchsorted(chance.cumsum(), alpha / 2, side="right"))


def _log_ratios(forks: Forks, name: str) -> list[NDArray]:
    """log(candidate / baseline) of each fork, float64 [pairs]; ValueError for what isn't pairs of times."""
    if not hasattr(forks, "__len__"):
        raise ValueError(f"The {name} are {forks!r}; they must be a list with a list of pairs for each fork.")
    if not len(forks):
        raise ValueError(f"The {name} hold no pairs at all.")
    found = []
    for number, fork in enumerate(forks, 1):
        which = f"Number {number} of the {name}"
        try:
            pairs = np.array(fork, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{which} isn't a list of (baseline, candidate) pairs of numbers.") from None
        if not pairs.size:
            raise ValueError(f"{which} holds no pairs; leave it out if its process died.")
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(
                f"{which} has shape {pairs.shape}; it must be a list of (baseline, candidate) pairs."
            )
        if not (np.isfinite(pairs) & (pairs > 0)).all():
            raise ValueError(f"{which} holds a time that isn't a positive finite number.")
        found.append(np.log(pairs[:, 1]) - np.log(pairs[:, 0]))
    return found


def _control_doubts(found: Interval, delta: float) -> list[Reason]:
    low, estimate, high = found
    if not (low > 0 or high < 0 or abs(estimate) > math.log1p(delta)):
        return []
    return [Reason(why=Why.CONTROL_DIFFERS, interval=ratios_of(found))]


def _why(decision: Decision, found: Interval) -> Why:
    low, _, high = found
    if math.isinf(high):
        return Why.NO_INTERVAL
    if decision is Decision.NO_DIFFERENCE:
        return Why.WITHIN_DELTA
    if low <= 0 <= high:
        return Why.HOLDS_ONE
    return Why.SMALL if decision is Decision.INCONCLUSIVE else Why.CLEAR
