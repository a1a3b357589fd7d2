"""The ladder of optimizations: one change at a time, each judged against the rung below it by cycles that all take in turn.

It starts from the official implementation's own ways (a mask built on the host, the head's cache grown by
concatenation, attention as separate operations) and changes one axis a rung. A change that makes decoding slower
stays, as the next one may need it. Rungs that a device can't run are listed with the reason. A cycle's time is the
host's, from one small copy to the next, so nothing is timed inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache, cached_property, partial
from itertools import islice
from statistics import fmean, median
from typing import Any

import torch

from eagle_lab.decode.generate import decode, decode_plain, decode_stream, to_warm_up
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import no_early
from eagle_lab.decode.strategy import AXES, Decoding, check, parse, unavailable
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import base_arm
from eagle_lab.measure.floor import Experts, Floor, floor
from eagle_lab.measure.pairs import Fork, Message, Plan, deals, fork_messages, renew, time_in_pairs
from eagle_lab.measure.records import Difference, InstanceSample, Part
from eagle_lab.measure.worker import WorkerDied, Workers, check_anew, in_processes
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.checks import one_line
from eagle_lab.runtime.prepare import REGIONAL
from eagle_lab.verdict.agreement import ArmsDisagree
from eagle_lab.verdict.compare import between, check_arms
from eagle_lab.verdict.stats import Decision, Reason, Verdict, Why, judge
from eagle_lab.verdict.summary import ENOUGH_PAIRS, dropped_of, judge_kept

# what changed, and the strategy that it leads to; each differs on one axis from the last before it that its device can
# run, COMPILED too: what ON_CPU changed, the rungs above it keep
ON_CPU = ("the weight before the rows, on a CPU", "doubling,product=transposed")
RUNGS = (
    ("the official implementation's ways", "cache=concat,attention=eager"),
    ("the head's cache in place", "attention=eager"),
    ("fused attention under one mask", "rebuild"),
    ("tree mask built on the device", "doubling"),
    ON_CPU,
    ("prefix read without a mask", "doubling,attention=tree"),
    ("one graph for the cycle", "doubling,attention=tree,runtime=cuda_graph"),
    ("tree attention in one kernel", "doubling,attention=tree_fused,runtime=cuda_graph"),
    (
        "its repeated parts compiled, then one graph",
        "doubling,attention=tree_fused,runtime=compile+cuda_graph",
    ),
    ("the tree mask in one kernel too", "cuda,attention=tree_fused,runtime=compile+cuda_graph"),
    (
        "products that ask for their weights early",
        "cuda,attention=tree_fused,product=early,runtime=compile+cuda_graph",
    ),
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
    at a near tie, None for the same tokens; ties: the ways in which they parted from the other's in timed decodes, each
    once; pairs, pairs_parted: all such decodes of both, and those that parted.
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
    in_turn: whether the cycles were timed in turn, else each rung's in a decode of its own; in_turn_error: what ended that
    early; acceptance_length: tokens a cycle, one number for all rungs, as rungs whose near ties parted would differ for
    nothing.
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
    """One size of tree against plain decoding.

    seconds: by process, (plain, EAGLE-3) of each timed pair; control: by process, plain decoding against itself alike, none
    where that was not measured.
    """

    total_tokens: int
    top_k: int
    depth: int
    seconds: list[list[tuple[float, float]]]
    control: list[list[tuple[float, float]]]
    acceptance_length: float
    stated: bool
    strategy: str

    @cached_property
    def verdict(self) -> Verdict:
        """EAGLE-3's time over plain decoding's. The control speaks where its interval excludes 1: of so few whole decodes its
        estimate alone is mostly more than 1% away."""
        itself = judge(self.control) if self.control else None
        differs = itself is not None and (itself.low > 1 or itself.high < 1)
        return judge(self.seconds, control=self.control if differs else None)


def available(
    pair: Pair, compiled: bool = False, total_tokens: int = 63
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """The rungs that this pair's device can run with such trees, in order, and those that it can't."""
    can: list[tuple[str, str]] = []
    cannot: list[Skipped] = []
    for change, strategy in [*RUNGS[:6], COMPILED, *RUNGS[6:]]:
        plan = parse(strategy)
        reasons = (unavailable(axis, getattr(plan, axis), pair.device) for axis in AXES)
        error = next(filter(None, reasons), None) or no_early(pair, plan, total_tokens + 1)
        if error:
            cannot.append(Skipped(strategy=strategy, why=Skip.UNAVAILABLE, error=error))
        elif strategy == COMPILED[1] and not compiled:
            cannot.append(Skipped(strategy=strategy, why=Skip.NOT_ASKED))
        elif can and parse(can[-1][1]).product == "transposed":  # kept, so that one axis changes
            can.append((change, str(replace(plan, product="transposed"))))
        else:
            can.append((change, strategy))
    return can, cannot


def climb(
    pair: Pair,
    prompts: Sequence[Prompt],
    shape: TreeShape = TREES[63],
    *,
    max_new_tokens: int = 48,
    iterations: int = 20,
    forks: int = 1,
    compiled: bool = False,
    seed: int = 0,
    stated: float | None = None,
    keep: Callable[[Ladder], object] = lambda found: None,
) -> Ladder:
    """Try each rung alone, then let all that work take turns by cycles, and judge each against the one below it.

    iterations: instances in all, spread over `forks` fresh processes, or taken in this one where forks is 1; stated:
    tokens a cycle to reckon with where weights are random; keep: given the ladder so far after each rung and each process.
    A rung that fails is named, and so is what ended a process early. Raises ValueError for a number of processes that the
    iterations or the pair can't have, before any work, and what ends the first rung.
    """
    can, cannot = available(pair, compiled, shape.total_tokens)
    arms = {s: base_arm(pair, Arm(parse(s), shape=shape)) for _, s in can}
    work = deals(iterations, forks)
    if forks > 1:
        check_anew(pair, Plan(tuple(arms.values()), tuple(prompts), max_new_tokens))
    first = can[0][1]
    found = Ladder(
        rungs=[], skipped=cannot, best=first, total_tokens=shape.total_tokens, stated_acceptance=stated,
        acceptance_length=stated, floor=floor(pair, **asdict(shape), prefix=len(prompts[0].ids) + max_new_tokens // 2),
    )  # fmt: skip
    for change, strategy in can:
        try:
            tried = alone(pair, prompts[0], arms[strategy], max_new_tokens)
        # out of memory, or it can't be compiled or captured: named, and the ladder goes on
        except Exception as error:
            if strategy == first:
                raise
            found.skipped.append(lost(strategy, error))
            continue
        found.rungs.append(Rung(change=change, strategy=strategy, **tried))
        keep(found)
    working = tuple(arms[rung.strategy] for rung in found.rungs)
    plan = Plan(
        working, tuple(prompts), max_new_tokens, seed, (False,) * len(working), "cycles", (0, *range(len(working)))
    )  # fmt: skip
    renew(pair, plan)  # so that there is room for all rungs at once
    torch.cuda.empty_cache()
    parting, one_by_one = cache(partial(_parting, pair, plan)), found
    for taken, ended in in_turn(pair, plan, work):
        found = judged(one_by_one, taken, iterations, parting, ended)
        keep(found)
    renew(pair, plan)
    return found


def lost(strategy: str, error: Exception) -> Skipped:
    """A rung that an error ended."""
    told = isinstance(error, ArmsDisagree)
    why, line = (Skip.DISAGREED, str(error)) if told else (Skip.FAILED, one_line(error))
    return Skipped(strategy=strategy, why=why, error=line)


def alone(pair: Pair, prompt: Prompt, arm: Arm, max_new_tokens: int) -> dict[str, Any]:
    """What one rung alone shows, as fields of a `Rung`: where its tokens part from plain decoding's, its cycles in its
    second decode, and what preparing took. Raises as `check_arms` does."""
    checked, whole = check_arms(pair, Plan((arm, arm), (prompt,), max_new_tokens), prompt)
    times = [round(s, 7) for s in whole[1].cycles_s]
    reports = [
        session.report()
        for (strategy, *_), idle in pair.sessions.items()
        if strategy == arm.strategy
        for session in idle
    ]
    prepared = [Prepared(**{key: r[key] for key in Prepared.model_fields}) for r in reports]
    return {
        "checked": True, "plain": checked.candidate, "prepared": prepared, "cycles_s": times,
        "cycle_s": median(times) if times else None,
    }  # fmt: skip


def in_turn(
    pair: Pair, plan: Plan, work: Sequence[tuple[int, ...]]
) -> Iterator[tuple[list[Message], str | None]]:
    """The instances of a plan, each process's share of them in one of its own, or here where it is the only one: after each
    all those so far, as `take_instance` gives them, and what ended processes early, None where nothing did."""
    taken, errors = list[Message](), list[str]()
    with Workers(pair, plan) if len(work) > 1 else nullcontext() as workers:
        for number, deal in enumerate(work):
            fork = Fork(number, deal, control=True)  # there is no part to time
            try:
                for message in workers.messages(fork) if workers else fork_messages(pair, plan, fork):
                    taken += [message] if "instance" in message else []
                again = True
            except WorkerDied as error:
                errors.append(str(error))
                again = error.begun or error.exit_code < 0  # else the next one would end so too
            except Exception as error:  # all rungs' sessions at once may be too many
                errors.append(one_line(error))
                again = bool(taken)
            yield taken, "; ".join(errors) or None
            if not again:
                return


def by_cycle(taken: InstanceSample) -> InstanceSample:
    """The instance with each session's mean cycle in the place of its time for a stretch.

    Rungs differ in cycles for a text only where near ties part them, which says nothing of a rung.
    """
    every = range(len(taken.made))
    if all(len(order) == len(every) for order in taken.order):
        return taken
    seconds = tuple(
        tuple(row[at] / order.count(at) for at in every)
        for row, order in zip(taken.seconds, taken.order, strict=True)
    )
    once = tuple(tuple(dict.fromkeys(order)) for order in taken.order)
    return taken.model_copy(update={"seconds": seconds, "order": once, "slices": ()})


def over(
    kept: Sequence[InstanceSample], taken: Sequence[InstanceSample], planned: int, session: int, base: int = 0
) -> Verdict:
    """The verdict of one session against another, with what was dropped or not taken among its reasons; none where less
    than half of what was planned is left.

    The control is of the first rung, whose launches from the host scatter more than the rungs that a graph replays.
    """
    found = judge_kept(kept, session=session, base=base, one_scatter=False)
    short = dropped_of(taken)
    if len(taken) < planned:
        short.append(Reason(why=Why.NOT_TAKEN, count=len(taken), of=planned))
    lost = len(kept) < ENOUGH_PAIRS * planned
    if lost:
        short.insert(0, Reason(why=Why.PAIRS_LOST, count=len(kept), of=planned))
    decision = Decision.INCONCLUSIVE if lost else found.decision
    return found.model_copy(update={"decision": decision, "reasons": (*found.reasons, *short)})


def judged(
    tried: Ladder,
    taken: Sequence[Message],
    planned: int,
    parting: Callable[..., Difference | None],
    error: str | None,
) -> Ladder:
    """The ladder with what the instances of its rungs' sessions say; `tried`: each rung alone; planned: instances in all.

    parting: where two rungs' tokens of an iteration part; a rung whose tokens no near tie explains is left out. error:
    what ended a process early.
    """
    # the first has two
    sessions = {rung.strategy: number + (number > 0) for number, rung in enumerate(tried.rungs)}
    found = tried.model_copy(update={"skipped": [*tried.skipped], "in_turn_error": error})
    instances = [m["instance"] for m in taken]
    whole = [i for i in instances if not i.dropped and i.seconds]
    kept = [by_cycle(i) for i in whole]
    rungs: list[Rung] = []
    for rung in tried.rungs if taken else ():
        at, more = sessions[rung.strategy], dict[str, Any]()
        if rungs:
            base = sessions[rungs[-1].strategy]
            try:
                each = [
                    parting(
                        m["instance"].iteration, base, at, tuple(m["tokens"][base]), tuple(m["tokens"][at])
                    )
                    for m in taken
                    if "tokens" in m
                ]
            except Exception as ended:  # other tokens, or no memory left to look at them
                found.skipped.append(lost(rung.strategy, ended))
                continue
            parted = [where for where in each if where]
            more = {"against": rungs[-1].strategy, "ties": list(dict.fromkeys(parted))}
            more |= {"pairs_parted": len(parted), "pairs": len(taken)}
            if kept:
                more["verdict"] = over(kept, instances, planned, at, base)
        if kept:
            times = [round(seconds[at], 7) for i in kept for seconds in i.seconds]
            more |= {"cycles_s": times, "cycle_s": median(times)}
        rungs.append(rung.model_copy(update=more))
    if not kept:
        return found.model_copy(update={"rungs": rungs or tried.rungs})
    best, first = fastest(rungs), rungs[0].strategy
    every = [0, 1, *(sessions[rung.strategy] for rung in rungs[1:])]
    tokens = len(every) * sum(sum(i.tokens) for i in whole)
    tau = tokens / sum(i.cycles(session) for i in whole for session in every)
    return found.model_copy(
        update={
            "rungs": rungs, "best": best, "in_turn": True, "acceptance_length": tried.stated_acceptance or tau,
            "verdict": over(kept, instances, planned, sessions[best]) if best != first else None,
        }
    )  # fmt: skip


def _parting(
    pair: Pair, plan: Plan, iteration: int, base: int, at: int, left: Sequence[int], right: Sequence[int]
) -> Difference | None:
    """Where the tokens of two sessions part in an iteration. Raises ArmsDisagree where no near tie explains it."""
    two = replace(plan, arms=tuple(plan.arms[plan.sessions[session]] for session in (base, at)))
    return between(pair, two, "same text", iteration, {"tokens": (left, right)})


def uncompiled(strategy: str) -> str:
    """The strategy without its compiler and what only goes with it.

    For trees of many sizes and one row, as a step would be compiled for each.
    """
    plan = parse(strategy)
    runtime = {"compile+cuda_graph": "cuda_graph", "compile": "eager"}.get(plan.runtime, plan.runtime)
    return str(replace(plan, runtime=runtime, product="library" if plan.product == "early" else plan.product))


def of_batches(strategy: str) -> str:
    """The strategy as batches take it: regions compiled once for all sizes stay, a cycle compiled whole does not.

    Products are the library's, as the early kernels take fewer rows than most batches have, and the head's cache holds all.
    """
    regional = parse(strategy).runtime == REGIONAL
    plan = replace(parse(uncompiled(strategy)), cache="static")
    return str(replace(plan, runtime=REGIONAL) if regional else plan)


def fastest(rungs: Sequence[Rung]) -> str:
    """The strategy with the least time: by the product of the ratios from the first rung up to it."""
    times: dict[str, float] = {rungs[0].strategy: 1.0}
    for rung in rungs[1:]:
        if rung.against and rung.verdict:
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
    forks: int = 1,
    seed: int = 0,
    stated: float | None = None,
) -> list[TreeSize]:
    """EAGLE-3 with trees of these sizes against plain decoding on the same runtime and attention, in timed pairs.

    iterations: pairs of each size in all, spread over `forks` fresh processes. With `stated` tokens a cycle (random weights
    accept next to nothing) EAGLE-3 makes as many cycles as that many tokens then take. Raises ValueError for a size that
    has no shape in `TREES` and for a number of processes that the iterations or the pair can't have, before any work, and
    WorkerDied where a process ends early.
    """
    wrong = [size for size in sizes if size not in TREES]
    if wrong:
        raise ValueError(f"tree size {wrong[0]} has no shape; known: {', '.join(map(str, TREES))}.")
    plan = check(strategy, pair.device)
    shares = [[prompts[n % len(prompts)] for n in deal] for deal in deals(iterations, forks)]
    decodings = [Decoding(plan, TREES[size], Sampling(), max_new_tokens) for size in sizes]
    each = in_processes(
        pair, [base_arm(pair, Arm(plan))], forks, sizes_here, shares=shares, decodings=decodings, seed=seed, stated=stated
    )  # fmt: skip
    return [
        TreeSize(
            **asdict(TREES[size]), seconds=[one.seconds for one in taken], control=[one.control for one in taken if one.control],
            acceptance_length=fmean(length for one in taken for length in one.lengths), stated=stated is not None,
            strategy=strategy,
        )
        for size, taken in zip(sizes, zip(*each, strict=True), strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class OfSize:
    """What one process found of one tree size: seconds of (plain, EAGLE-3) and of (plain, plain) in each pair, and tokens a
    cycle of each prompt."""

    seconds: list[tuple[float, float]]
    control: list[tuple[float, float]]
    lengths: list[float]


def sizes_here(
    pair: Pair,
    number: int,
    *,
    shares: Sequence[Sequence[Prompt]],
    decodings: Sequence[Decoding],
    seed: int,
    stated: float | None,
) -> list[OfSize]:
    """One process's share of the pairs of `tree_sizes`, for each size."""
    prompts, found = shares[number], []
    for decoding in decodings:
        lengths: list[float] = []

        def plain(prompt: Prompt, decoding: Decoding = decoding) -> None:
            decode_plain(pair, prompt.ids, decoding)

        def tree(prompt: Prompt, decoding: Decoding = decoding, lengths: list[float] = lengths) -> None:
            if stated is None:
                lengths.append(decode(pair, prompt.ids, decoding, record=False).acceptance_length)
                return
            cycles = decode_stream(pair, prompt.ids, decoding, record=False)
            for _ in islice(cycles, math.ceil(decoding.max_new_tokens / stated)):
                pass
            lengths.append(stated)

        count, draws = len(prompts), f"{seed}/{number}"
        first = to_warm_up([len(prompt.ids) for prompt in prompts], [decoding])
        seconds = time_in_pairs(plain, tree, prompts, count, draws, pair.device, warmup=first)
        # the few pairs of one process alone could say nothing
        again = max(2, count // 4) if len(shares) > 1 else 0
        control = time_in_pairs(plain, plain, prompts, again, draws, pair.device, warmup=())
        found.append(OfSize(seconds, control, lengths[-count:]))  # the first ones warmed up
    return found


def fastest_tree(found: Sequence[TreeSize]) -> TreeSize | None:
    """The tree size with the least time against plain decoding's; None where none was measured."""
    return min(found, key=lambda row: row.verdict.estimate, default=None)
