"""How often each way to compare two programs errs, under noise like that of real machines.

Known effects are put into simulated timings, so coverage, false verdicts and power can be counted. The draws
are vectorised over repetitions and judged by the functions behind `stats.judge` (a test holds the two equal).
The noise is an assumption, and `Noise` says what its parts are; the real thing is an A/A run on your machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.signal import lfilter

from eagle_lab.verdict.stats import Decision, decide, hodges_lehmann, signed_rank_interval, t_interval
from eagle_lab.verdict.summary import CANDIDATE, CONTROL, against_baseline, between_steps

PAIRS, STRETCHES = 20, 14
EFFECTS = (0.01, 0.02, 0.05)
CYCLE_BIAS = 0.002  # of a process, beside what its sessions have of their own


@dataclass(frozen=True)
class Noise:
    """Noise on log time, 0.01 for 1%; "sd" is a standard deviation, and time is counted in decodes.

    "Chosen" marks the values that are a guess. Of these the mean spike moves the rows of paired t, and the
    others hardly any but those of the block designs. The verdict's rows rest most on `white`: were 0.5% its t
    scale and not its sd (thus 0.87%), 5 forks of 4 pairs would err in 1.1% of A/A runs and find a true 2% in
    89%, not in 94%.
    """

    white: float = 0.005  # sd of white noise, Student's t with 3 degrees of freedom
    ar: float = 0.01  # sd of the AR(1) process
    ar_memory: float = 0.9  # its correlation from one decode to the next
    second_slot: float = 0.004  # penalty of a pair's second decode
    launch: float = 0.015  # sd of a launch's offset; cancels within a process
    process_bias: float = 0.0  # sd, over processes, of one arm's advantage that lasts as long as its process
    instance: float = 0.005  # sd of a session's bias for its life in lock-step: two differ by 0.7%
    # sd of white noise of a cycle, in place of a decode's; two of them differ by 2% with the rest
    cycle: float = 0.013
    spike_rate: float = 0.03  # share of decodes with a spike
    spike: float = 0.06  # chosen: exponential, this mean
    drift: float = 0.015  # amplitude of a sine; each launch meets it at a random phase
    drift_period: float = 200.0  # chosen
    clock_state: float = 0.01  # chosen: the slow one of two states takes this much longer
    clock_change: float = 0.02  # chosen: chance per decode to change state


# Cycles in slices, a little above what two quiet shared cores gave with 63 nodes, as a small tree's slices scatter more; and
# how many times less a whole cycle's noise counts there (4.1% became 0.8%). What lasts longer than a slice meets all sessions
# alike.
SLICED = Noise(cycle=0.01, instance=0.002, ar=0.0, spike_rate=0.0, drift=0.0, clock_state=0.0)
CALMER = 5.0


@dataclass(frozen=True)
class Design:
    """How decodes are ordered ("random", "fixed", "blocks", "launches") and which analysis reads them.

    "cycles" are in lock-step: `pairs` instances in each fork, of so many stretches; time is then counted in cycles. So are
    "slices", whose sessions take turns inside a cycle.
    """

    name: str
    order: str
    analysis: str
    forks: int = 1
    pairs: int = PAIRS
    process_bias: float = 0.0
    stretches: int = STRETCHES


DESIGNS = (
    Design("two blocks, minutes apart, difference of means", "launches", "difference"),
    Design("two blocks, minutes apart, Welch", "launches", "welch"),
    Design("one process, A...A then B...B, Welch", "blocks", "welch"),
    Design("fixed A-then-B pairs, paired t", "fixed", "paired t"),
    Design("random order in each pair, paired t", "random", "paired t"),
    Design("random order in each pair, signed-rank", "random", "signed-rank"),
    Design("one process of 20 pairs, process bias 0.7%", "random", "signed-rank", process_bias=0.007),
    Design("5 processes of 4 pairs, process bias 0.7%", "random", "forks t", 5, 4, 0.007),
    Design("cycles in turn, one process of 20 instances", "cycles", "instances t", 1, 20),
    Design(
        "cycles in turn, 7 processes of 3 instances, process bias 0.2%",
        "cycles",
        "instances t",
        7,
        3,
        CYCLE_BIAS,
    ),
)


def draw(
    order: str, forks: int, pairs: int, repetitions: int, rng: np.random.Generator, noise: Noise
) -> tuple[NDArray, NDArray]:
    """Log times of both arms with no effect between them: baseline, candidate, float64 [R, forks, pairs]."""
    shape = (repetitions, forks)
    if order == "launches":
        offsets = rng.normal(0, noise.launch, (2, *shape, 1))
        first, second = (_machine((*shape, pairs), rng, noise) for _ in range(2))
        return first + offsets[0], second + offsets[1]
    times = _machine((*shape, 2 * pairs), rng, noise)
    if order == "blocks":
        base, candidate = times[..., :pairs], times[..., pairs:]
    else:
        first, second = times[..., ::2], times[..., 1::2] + noise.second_slot
        swap = rng.random(first.shape) < (0.5 if order == "random" else 0.0)
        base, candidate = np.where(swap, second, first), np.where(swap, first, second)
    return base, candidate + rng.normal(0, noise.process_bias, (*shape, 1))


def draw_cycles(
    design: Design, repetitions: int, rng: np.random.Generator, noise: Noise
) -> tuple[NDArray, NDArray]:
    """Instances' estimates with no effect between the arms: of the candidate, of the control, float64 [R, forks, instances].

    Three sessions step in random order in each stretch, over one machine whose noise lasts from cycle to cycle. In slices
    they meet it together, and what is left of it is each one's own.
    """
    shape = (repetitions, design.forks, design.pairs)
    bias = rng.normal(0, noise.process_bias, (repetitions, design.forks, 1))
    if design.order == "slices":
        rounds = _machine((*shape, 3, design.stretches), rng, replace(noise, white=noise.cycle))
        each = rounds.mean(-1) + rng.normal(0, noise.instance, (*shape, 3))
        return against_baseline(each, CANDIDATE) + bias, against_baseline(each, CONTROL)
    steps = _machine((*shape, 3 * design.stretches), rng, replace(noise, white=noise.cycle))
    order = rng.random((*shape, design.stretches, 3)).argsort(-1).reshape(steps.shape)
    steps += np.take_along_axis(rng.normal(0, noise.instance, (*shape, 3)), order, -1)
    return between_steps(steps, order, CANDIDATE) + bias, between_steps(steps, order, CONTROL)


def _machine(shape: tuple[int, ...], rng: np.random.Generator, noise: Noise) -> NDArray:
    """Log times [..., n] of n decodes in a row of one program, in one launch."""
    white = noise.white / math.sqrt(3) * rng.standard_t(3, shape)  # t3 has variance 3
    shocks = rng.normal(0, noise.ar * math.sqrt(1 - noise.ar_memory**2), shape)
    shocks[..., 0] = rng.normal(0, noise.ar, shape[:-1])  # so that it starts in its stationary state
    ar = lfilter([1.0], [1.0, -noise.ar_memory], shocks, axis=-1)
    phase = rng.random((*shape[:-1], 1)) + np.arange(shape[-1]) / noise.drift_period
    spikes = rng.exponential(noise.spike, shape) * (rng.random(shape) < noise.spike_rate)
    changes = rng.random(shape) < noise.clock_change
    changes[..., 0] = rng.random(shape[:-1]) < 0.5
    slow = changes.cumsum(axis=-1) % 2
    return white + ar + noise.drift * np.sin(2 * np.pi * phase) + spikes + noise.clock_state * slow


Reading = tuple[NDArray, tuple, tuple]  # estimate [R]; low, high at 1 - alpha; low, high at 1 - 2 alpha


def _difference(base: NDArray, candidate: NDArray, alpha: float) -> Reading:
    """The ratio of mean times and no interval at all: "significant" whenever it is beyond delta."""
    at = np.log(np.exp(candidate[:, 0]).mean(-1) / np.exp(base[:, 0]).mean(-1))
    return at, (at, at), (at, at)


def _welch(base: NDArray, candidate: NDArray, alpha: float) -> Reading:
    base, candidate = base[:, 0], candidate[:, 0]
    test = scipy_stats.ttest_ind(candidate, base, axis=-1, equal_var=False)
    ends = [test.confidence_interval(1 - a) for a in (alpha, 2 * alpha)]
    return candidate.mean(-1) - base.mean(-1), tuple(ends[0]), tuple(ends[1])


def _signed_rank(base: NDArray, candidate: NDArray, alpha: float) -> Reading:
    d = (candidate - base)[:, 0]
    return hodges_lehmann(d), signed_rank_interval(d, alpha), signed_rank_interval(d, 2 * alpha)


def _t(d: NDArray, alpha: float) -> Reading:
    return d.mean(-1), t_interval(d, alpha), t_interval(d, 2 * alpha)


def _instances_t(estimates: NDArray, alpha: float) -> Reading:
    return _t(estimates.mean(-1) if estimates.shape[1] > 1 else estimates[:, 0], alpha)


ANALYSES: dict[str, Callable[[NDArray, NDArray, float], Reading]] = {
    "difference": _difference,
    "welch": _welch,
    "paired t": lambda base, candidate, alpha: _t((candidate - base)[:, 0], alpha),
    "signed-rank": _signed_rank,
    "forks t": lambda base, candidate, alpha: _t(hodges_lehmann(candidate - base), alpha),
}


def simulate(
    design: Design,
    effects: tuple[float, ...] = EFFECTS,
    repetitions: int = 4000,
    seed: int = 0,
    noise: Noise = Noise(),
    delta: float = 0.01,
    alpha: float = 0.05,
) -> dict:
    """One row of the table: how often the design covers the truth, errs when A = B, and finds each effect.

    effects: the candidate takes 1 / (1 + effect) of the baseline's time; power is the share of ADOPT, thus
    about a half at an effect of delta whatever the design. Returns shares (0 to 1): coverage (None without an
    interval), false_verdicts (ADOPT or REVERT when A = B), no_difference (when A = B), power_1 and told_1 and so on (by
    percent): told is the share whose interval excludes 1 on the effect's side. The effects share one draw of noise: every
    analysis here shifts with the effect. Cycles bring their control, which may forbid a verdict.
    """
    rng = np.random.default_rng(seed)
    here, doubted = replace(noise, process_bias=design.process_bias), np.zeros(repetitions, bool)
    if design.order in ("cycles", "slices"):
        found, control = draw_cycles(design, repetitions, rng, here)
        at, (low, high), (near_low, near_high) = _instances_t(found, alpha)
        moved, ends, _ = _instances_t(control, alpha / 10)
        doubted = (ends[0] > 0) | (ends[1] < 0) | (abs(moved) > math.log1p(delta))
    else:
        base, candidate = draw(design.order, design.forks, design.pairs, repetitions, rng, here)
        at, (low, high), (near_low, near_high) = ANALYSES[design.analysis](base, candidate, alpha)

    def share(effect: float, *wanted: Decision) -> float:
        shift = -math.log1p(effect)
        near = (near_low + shift, near_high + shift)
        found = decide(at + shift, (low + shift, high + shift), near, delta)
        return float((np.isin(found, [x.value for x in wanted]) & ~doubted).mean())

    covers = None if design.analysis == "difference" else float(((low <= 0) & (high >= 0)).mean())
    powers = {f"power_{effect * 100:g}": share(effect, Decision.ADOPT) for effect in effects}
    told = {
        f"told_{e * 100:g}": float((high - math.log1p(e) < 0).mean()) for e in effects if covers is not None
    }
    return {
        "design": design.name,
        "coverage": covers,
        "false_verdicts": share(0.0, Decision.ADOPT, Decision.REVERT),
        "no_difference": share(0.0, Decision.NO_DIFFERENCE),
        **powers,
        **told,
        "repetitions": repetitions,
    }


def expected_half_width(
    forks: int, instances: float, stretches: int, alpha: float = 0.05, noise: Noise = Noise()
) -> float:
    """Half of the interval, on the log scale, that cycles in turn should give under the assumed noise.

    Args: instances, stretches: of each fork, of each instance. Infinite where one fork has a single instance.
    """
    # one candidate against two baselines
    session = 1.5 * (noise.instance**2 + noise.cycle**2 / max(1, stretches))
    count, variance = (forks, CYCLE_BIAS**2 + session / instances) if forks > 1 else (int(instances), session)
    if count < 2:
        return math.inf
    return float(scipy_stats.t.ppf(1 - alpha / 2, count - 1)) * math.sqrt(variance / count)


def tabulate(repetitions: int = 4000, seed: int = 0) -> list[dict]:
    """The row of every design; some seconds on one core at the default repetitions."""
    return [simulate(design, EFFECTS, repetitions, seed) for design in DESIGNS]
