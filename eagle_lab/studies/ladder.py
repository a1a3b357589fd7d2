"""The ladder of optimizations: one change at a time, each judged in timed pairs against the rung below it.

It starts from the official implementation's own ways (a mask built on the host, the head's cache grown by
concatenation, attention as separate operations) and changes one axis a rung. A change that makes decoding slower
stays, as the next one may need it. Rungs that a device can't run are listed with the reason. A cycle's time is the
host's, from one small copy to the next, so nothing is timed inside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from eagle_lab.decode.generate import decode, decode_plain, decode_stream, to_warm_up
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import no_early
from eagle_lab.decode.strategy import AXES, Decoding, check, parse, unavailable
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import whole
from eagle_lab.measure.floor import Experts, Floor, floor
from eagle_lab.measure.lockstep import Stretch, lock_step, slicing
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.measure.records import Difference, Part
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.checks import one_line
from eagle_lab.verdict.agreement import ArmsDisagree
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import ENOUGH, Verdict, judge

# what changed, and the strategy that it leads to; each differs on one axis from the last before it that its device can
# run, COMPILED too
ON_CPU = ("the weight before the rows, on a CPU", "mask=doubling,attention=tree,product=transposed")
RUNGS = (
    ("the official implementation's ways", "cache=concat,attention=eager"),
    ("the head's cache in place", "attention=eager"),
    ("fused attention under one mask", "rebuild"),
    ("tree mask built on the device", "doubling"),
    ("prefix read without a mask", "doubling,attention=tree"),
    ("one graph for the cycle", "doubling,attention=tree,runtime=cuda_graph"),
    ("tree attention in one kernel", "doubling,attention=tree_fused,runtime=cuda_graph"),
    (
        "its repeated parts compiled, then one graph",
        "doubling,attention=tree_fused,runtime=compile+cuda_graph",
    ),
    ("the tree mask in one kernel too", "cuda,attention=tree_fused,runtime=compile+cuda_graph"),
    (
        "small products that load their weights early",
        "cuda,attention=tree_fused,product=early,runtime=compile+cuda_graph",
    ),
    ON_CPU,
)
# takes minutes to prepare on a CPU
COMPILED = ("the cycle compiled", "doubling,attention=tree,runtime=compile")


class Prepared(Part):
    """What compiling or capturing one session took: seconds, and bytes of device memory for graphs and for caches.

    readings: seconds and bytes of each captured prefill, which sessions share.
    """

    windows: list[int]
    seconds: float
    bytes: int
    cache_bytes: int
    merged_projections: int
    early_products: int
    early_launches: bool
    readings: list[tuple[float, int]]


class Rung(Part):
    """One change, and what it brought.

    against: the strategy that it was compared with, None for the first; verdict: of the comparison; cycle_s: the median
    cycle, cycles_s: each; checked: whether its greedy tokens were held against plain decoding's; plain: where they part
    at a near tie, None for the same tokens; ties: the ways in which timed pairs parted, each once.
    """

    change: str
    strategy: str
    against: str | None = None
    verdict: Verdict | None = None
    cycle_s: float | None = None
    cycles_s: list[float] = []
    prepared: list[Prepared] = []
    checked: bool = False
    plain: Difference | None = None
    ties: list[Difference] = []
    pairs_parted: int = 0
    pairs: int = 0


class Skip(StrEnum):
    """Why a rung was not measured."""

    UNAVAILABLE = "unavailable"
    NOT_ASKED = "not asked for"  # compiling the whole cycle takes minutes
    DISAGREED = "other tokens"
    FAILED = "failed"


class Skipped(Part):
    """A rung that was not measured; error: the message of what refused or ended it."""

    strategy: str
    why: Skip
    error: str = ""


class Ladder(Part):
    """The rungs that were measured, from the first to the last.

    best: the rung with the least time, by the product of the ratios up to it; verdict: its own against the first;
    in_turn: whether the cycles were timed in turn, else each rung's in a decode of its own; acceptance_length: tokens a
    cycle, one number for all rungs, as rungs whose near ties parted would differ for nothing.
    """

    rungs: list[Rung]
    skipped: list[Skipped]
    best: str
    verdict: Verdict | None = None
    floor: Floor | Experts
    total_tokens: int
    stated_acceptance: float | None = None
    acceptance_length: float | None = None
    in_turn: bool = False
    in_turn_error: str | None = None

    @property
    def floor_s(self) -> float | None:
        """Seconds of a cycle's floor; None where the target has none."""
        return self.floor.cycle if isinstance(self.floor, Floor) else None

    def rung(self, strategy: str) -> Rung | None:
        """The rung with that strategy; None where it was not measured."""
        return next((r for r in self.rungs if r.strategy == strategy), None)


class TreeSize(Part):
    """One size of tree against plain decoding; seconds: (plain, EAGLE-3) of each timed pair."""

    total_tokens: int
    top_k: int
    depth: int
    seconds: list[tuple[float, float]]
    acceptance_length: float
    stated: bool
    strategy: str

    @cached_property
    def verdict(self) -> Verdict:
        """EAGLE-3's time over plain decoding's."""
        return judge([self.seconds])


def available(
    pair: Pair, compiled: bool = False, total_tokens: int = 63
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """The rungs that this pair's device can run with such trees, in order, and those that it can't."""
    can: list[tuple[str, str]] = []
    cannot: list[Skipped] = []
    for change, strategy in [*RUNGS[:5], COMPILED, *RUNGS[5:]]:
        plan = parse(strategy)
        reasons = (unavailable(axis, getattr(plan, axis), pair.device) for axis in AXES)
        error = next(filter(None, reasons), None) or no_early(pair, plan, total_tokens + 1)
        if error:
            cannot.append(Skipped(strategy=strategy, why=Skip.UNAVAILABLE, error=error))
        elif strategy == COMPILED[1] and not compiled:
            cannot.append(Skipped(strategy=strategy, why=Skip.NOT_ASKED))
        else:
            if strategy == ON_CPU[1]:  # run as the rung below it, so that one axis changes
                strategy = str(replace(plan, runtime=parse(can[-1][1]).runtime))
            can.append((change, strategy))
    return can, cannot


def climb(
    pair: Pair,
    prompts: Sequence[Prompt],
    shape: TreeShape = TREES[63],
    *,
    max_new_tokens: int = 48,
    iterations: int = 20,
    forks: int | None = 1,
    compiled: bool = False,
    seed: int = 0,
    stated: float | None = None,
    keep: Callable[[Ladder], object] | None = None,
    results_dir: str | Path | None = None,
) -> Ladder:
    """Compare each rung with the last one below it that could be judged, and the fastest with the first.

    In the end cycles of all rungs are timed in turn, if the answers are long enough. `stated`: tokens a cycle to reckon
    with where weights are random; `keep`: given the ladder so far after each rung.
    """
    can, cannot = available(pair, compiled, shape.total_tokens)
    first = below = can[0][1]
    options: dict[str, Any] = {
        **asdict(shape), "max_new_tokens": max_new_tokens, "iterations": iterations, "forks": forks, "seed": seed,
        "prompts": prompts, "results_dir": results_dir, "progress": False,
    }  # fmt: skip
    found = Ladder(
        rungs=[], skipped=cannot, best=first, total_tokens=shape.total_tokens, stated_acceptance=stated,
        acceptance_length=stated, floor=floor(pair, **asdict(shape), prefix=len(prompts[0].ids) + max_new_tokens // 2),
    )  # fmt: skip
    for change, strategy in can:
        decoding = Decoding(parse(strategy), shape, Sampling(), max_new_tokens)
        rung: dict[str, Any] = {"change": change, "strategy": strategy}
        try:
            if strategy != first:
                done = compare(pair, baseline=below, candidate=whole(strategy, below), **options)
                rung |= {"against": below, "verdict": done.verdict} | tokens_of(done.record)
                if below == first:
                    known = {"checked": True, "plain": done.record.correctness.baseline}
                    found.rungs[0] = found.rungs[0].model_copy(update=known)
            rung |= cycle_time(pair, prompts[0], decoding)
        # out of memory, or it can't be compiled or captured: named, and the ladder goes on
        except Exception as error:
            if strategy == first:
                raise
            told = isinstance(error, ArmsDisagree)
            why, line = (Skip.DISAGREED, str(error)) if told else (Skip.FAILED, one_line(error))
            found.skipped.append(Skipped(strategy=strategy, why=why, error=line))
            continue
        if strategy != first and math.isfinite(done.verdict.estimate):  # NaN: every pair was dropped
            below = strategy
        found.rungs.append(Rung(**rung))
        found = found.model_copy(update={"best": fastest(found.rungs)})
        if keep is not None:
            keep(found)
    if found.best != first:
        done = compare(pair, baseline=first, candidate=whole(found.best, first), **options)
        found = found.model_copy(update={"verdict": done.verdict})
    if keep is not None:
        keep(found)
    decodings = [Decoding(parse(rung.strategy), shape, Sampling(), max_new_tokens) for rung in found.rungs]
    try:
        taken = in_turn(pair, prompts, decodings, seed=seed)
    except Exception as error:  # all rungs' sessions at once may be too many; what was judged stands
        return found.model_copy(update={"in_turn_error": one_line(error)})
    if len(taken) < ENOUGH:
        return found
    rungs = []
    for at, one in enumerate(found.rungs):
        seconds = [round(stretch.seconds[at] / stretch.cycles[at], 7) for stretch in taken]
        rungs.append(one.model_copy(update={"cycles_s": seconds, "cycle_s": median(seconds)}))
    cycles = sum(sum(stretch.cycles) for stretch in taken)
    tau = stated or len(rungs) * sum(stretch.tokens for stretch in taken) / cycles
    return found.model_copy(update={"rungs": rungs, "in_turn": True, "acceptance_length": tau})


def tokens_of(record: ComparisonRecord) -> dict[str, Any]:
    """What a comparison's record holds of the candidate's tokens, as fields of a `Rung`."""
    parted = [sample.difference for sample in record.iterations if sample.difference]
    return {
        "checked": True, "plain": record.correctness.candidate, "ties": list(dict.fromkeys(parted)),
        "pairs_parted": len(parted), "pairs": len(record.iterations),
    }  # fmt: skip


def cycle_time(pair: Pair, prompt: Prompt, decoding: Decoding) -> dict[str, Any]:
    """Seconds of each cycle of one decode, their median, and what preparing took, as fields of a `Rung`."""
    taken = in_turn(pair, [prompt], [decoding], decoding.max_new_tokens)
    times = [round(stretch.seconds[0], 7) for stretch in taken]
    reports = [
        session.report()
        for (strategy, *_), idle in pair.sessions.items()
        if strategy == decoding.strategy
        for session in idle
    ]
    prepared = [Prepared(**{key: r[key] for key in Prepared.model_fields}) for r in reports]
    return {"cycle_s": median(times) if times else None, "cycles_s": times, "prepared": prepared}


def in_turn(
    pair: Pair, prompts: Sequence[Prompt], decodings: Sequence[Decoding], count: int = 24, seed: int = 0
) -> list[Stretch]:
    """The first `count` stretches that all decodings go in turn, a cycle each where they accept alike.

    A decode's first cycle holds the prefill and is left out. Fewer than `count` where the answers end before.
    """
    found: list[Stretch] = []
    coin, around = random.Random(seed), slicing([(pair, decoding.strategy) for decoding in decodings])
    for prompt in prompts:
        arms = [partial(decode_stream, pair, prompt.ids, decoding, record=False) for decoding in decodings]
        if len(found) < count:
            limit = decodings[0].max_new_tokens
            found += lock_step(pair, arms, limit, coin, around=around).stretches
    return found[:count]


def uncompiled(strategy: str) -> str:
    """The strategy without its compiler and what only goes with it.

    A step for each size of tree or batch would be compiled for minutes.
    """
    plan = parse(strategy)
    runtime = {"compile+cuda_graph": "cuda_graph", "compile": "eager"}.get(plan.runtime, plan.runtime)
    return str(replace(plan, runtime=runtime, product="library" if plan.product == "early" else plan.product))


def fastest(rungs: Sequence[Rung]) -> str:
    """The strategy with the least time: by the product of the ratios from the first rung up to it."""
    times: dict[str, float] = {rungs[0].strategy: 1.0}
    for rung in rungs[1:]:
        # NaN: every pair was dropped
        if rung.against and rung.verdict and math.isfinite(rung.verdict.estimate):
            times[rung.strategy] = times[rung.against] * rung.verdict.estimate
    return min(times, key=lambda strategy: times[strategy])


def changed(rung: Rung) -> list[str]:
    """The axes on which a rung differs from the one that it was compared with."""
    if rung.against is None:
        return []
    one, other = parse(rung.against), parse(rung.strategy)
    return [axis for axis in AXES if getattr(one, axis) != getattr(other, axis)]


def ratios(found: Ladder) -> dict[str, float]:
    """The rungs from the best down to the second, each compared with the one before: strategy → ratio of its times."""
    each: dict[str, float] = {}
    at = found.rung(found.best)
    while at is not None and at.against and at.verdict:
        each[at.strategy] = at.verdict.estimate
        at = found.rung(at.against)
    return each


def gain_shares(found: Ladder) -> list[float | None]:
    """Each rung's share of the best one's whole gain, in log time; below 0 where it cost time.

    They add up to 1 over the rungs from the first to the best. None for the others, and where nothing was gained.
    """
    logs = {strategy: math.log(ratio) for strategy, ratio in ratios(found).items()}
    whole = sum(logs.values())
    return [logs[r.strategy] / whole if r.strategy in logs and whole < 0 else None for r in found.rungs]


def tree_sizes(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    sizes: Sequence[int] = tuple(TREES),
    strategy: str = "doubling",
    max_new_tokens: int = 32,
    iterations: int = 8,
    seed: int = 0,
    stated: float | None = None,
) -> list[TreeSize]:
    """EAGLE-3 with trees of these sizes against plain decoding on the same runtime and attention, in timed pairs.

    With `stated` tokens a cycle (random weights accept next to nothing) EAGLE-3 makes as many cycles as that many
    tokens then take. Raises ValueError for a size that has no shape in `TREES`.
    """
    wrong = [size for size in sizes if size not in TREES]
    if wrong:
        raise ValueError(f"tree size {wrong[0]} has no shape; known: {', '.join(map(str, TREES))}.")
    plan = check(strategy, pair.device)
    found = []
    for size in sizes:
        decoding = Decoding(plan, TREES[size], Sampling(), max_new_tokens)
        lengths: list[float] = []

        def plain(prompt: Prompt, decoding: Decoding = decoding) -> None:
            decode_plain(pair, prompt.ids, decoding)

        def tree(prompt: Prompt, decoding: Decoding = decoding, lengths: list[float] = lengths) -> None:
            if stated is None:
                lengths.append(decode(pair, prompt.ids, decoding, record=False).acceptance_length)
                return
            cycles = decode_stream(pair, prompt.ids, decoding, record=False)
            for _ in islice(cycles, math.ceil(max_new_tokens / stated)):
                pass
            lengths.append(stated)

        used = [len(prompt.ids) for prompt in prompts[:iterations]]
        first = to_warm_up(used, [decoding])
        seconds = time_in_pairs(plain, tree, prompts, iterations, seed, pair.device, warmup=first)
        found.append(
            TreeSize(
                **asdict(TREES[size]), seconds=seconds, acceptance_length=sum(lengths) / len(lengths),
                stated=stated is not None, strategy=strategy,
            )
        )  # fmt: skip
    return found


def fastest_tree(found: Sequence[TreeSize]) -> TreeSize | None:
    """The tree size with the least time against plain decoding's; None where none was measured."""
    return min(found, key=lambda row: row.verdict.estimate, default=None)
