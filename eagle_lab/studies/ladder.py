"""The ladder of optimizations: one change at a time, each judged in pairs against the rung below it.

It starts from the official implementation's own ways (a mask built on the host, the head's cache grown by
concatenation, attention as separate operations) and changes one axis a rung; one that makes decoding slower stays, as
it may be what the next one needs. Rungs that cannot run on a device are listed with the reason. A cycle's time is the
host's, from one small copy to the next, so nothing is timed inside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from eagle_lab.decode.generate import Cycle, generate, generate_plain, stream, to_warm_up
from eagle_lab.decode.session import no_early
from eagle_lab.decode.strategy import Decoding, axes, check, parse, unavailable
from eagle_lab.measure.floor import floor
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import now
from eagle_lab.studies.launching import eager_forwards
from eagle_lab.verdict.agreement import ArmsDisagree, agree, settle
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.old_form import words
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import judge

# what changed, and the strategy that it leads to; each differs from the one before it on one axis, COMPILED too
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
)
COMPILED = (
    "the cycle compiled",
    "doubling,attention=tree,runtime=compile",
)  # takes minutes to prepare on a CPU

ENOUGH = 6  # cycles in turn below which there is no interval at 95%

# trees from small to large: top_k, depth, total_tokens
TREES = {3: (2, 2, 3), 7: (3, 3, 7), 15: (4, 4, 15), 31: (6, 5, 31), 63: (10, 7, 63)}


def available(
    pair: Pair, compiled: bool = False, total_tokens: int = 63
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The rungs that this pair's device can run with such trees, in order, and the reason for each that it can't."""
    rungs = [*RUNGS[:5], COMPILED, *RUNGS[5:]]
    can, cannot = [], {}
    for change, strategy in rungs:
        plan = parse(strategy)
        reasons = [
            unavailable(axis, getattr(plan, axis), pair.device)
            for axis in ("mask", "runtime", "attention", "product")
        ]
        reason = next(filter(None, reasons), None)
        reason = reason or no_early(pair, plan, total_tokens + 1)
        if not reason and strategy == COMPILED[1] and not compiled:
            reason = "compiling the whole cycle takes minutes, so it has to be asked for (compiled)"
        if reason:
            cannot[strategy] = reason
        else:
            can.append((change, strategy))
    return can, cannot


def climb(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    max_new_tokens: int = 48,
    iterations: int = 20,
    forks: int | None = 1,
    compiled: bool = False,
    seed: int = 0,
    stated: float | None = None,
    keep: Callable[[dict[str, Any]], object] | None = None,
    results_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Compare each rung with the last one below it that could be judged, and the fastest with the first; → JSON values.

    In the end cycles of all rungs are timed in turn, if the answers are long enough ("in_turn"), and are their cycles_s;
    "acceptance_length" is the tokens a cycle of all of these, as rungs whose near ties parted would differ for nothing.
    "rungs": change, strategy, against, verdict, cycle_s, prepared; "unavailable": strategy → reason;
    "disagreed": strategy → what `compare` refused; "failed": strategy → the error that ended it; "best", the rung with
    the least time by the product of the ratios up to it, its "verdict" against the first, and "floor".
    `stated`: tokens a cycle to reckon with where weights are random; `keep`: given all of this after each rung.
    """
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    can, cannot = available(pair, compiled, total_tokens)
    options: dict[str, Any] = {
        **sizes, "max_new_tokens": max_new_tokens, "iterations": iterations, "forks": forks, "seed": seed,
        "prompts": prompts, "results_dir": results_dir, "progress": False,
    }  # fmt: skip
    least = floor(pair, top_k, depth, total_tokens, len(prompts[0].ids) + max_new_tokens // 2).model_dump()
    first = below = can[0][1]
    found: dict[str, Any] = {
        "rungs": [], "unavailable": cannot, "disagreed": {}, "failed": {}, "best": first, "verdict": None,
        "floor": least, "stated_acceptance": stated, "total_tokens": total_tokens, "in_turn": False,
        "acceptance_length": stated,
    }  # fmt: skip
    for change, strategy in can:
        rung: dict[str, Any] = {"change": change, "strategy": strategy, "against": None, "verdict": None}
        try:
            if strategy != first:
                done = compare(pair, baseline=below, candidate=strategy, **options)
                rung |= {"against": below, "verdict": done.verdict.model_dump(mode="json")} | tokens_of(
                    done.record
                )
                found["rungs"][0].setdefault("against_plain", words(done.record.correctness.baseline))
            rung |= cycle_time(pair, prompts[0], strategy, max_new_tokens, sizes)
        except ArmsDisagree as error:
            found["disagreed"][strategy] = str(error)
            continue
        except (
            Exception
        ) as error:  # out of memory, a step that can't be compiled or captured: named, and the ladder goes on
            if strategy == first:
                raise
            found["failed"][strategy] = _line(error)
            continue
        if strategy != first and math.isfinite(done.verdict.estimate):  # NaN: every pair was dropped
            below = strategy
        found["rungs"].append(rung)
        found["best"] = fastest(found["rungs"])
        if keep is not None:
            keep(found)
    if found["best"] != first:
        found["verdict"] = compare(
            pair, baseline=first, candidate=found["best"], **options
        ).verdict.model_dump(mode="json")
    if keep is not None:
        keep(found)
    strategies = [rung["strategy"] for rung in found["rungs"]]
    try:
        times = in_turn(pair, prompts, strategies, max_new_tokens=max_new_tokens, seed=seed, **sizes)
    except Exception as error:  # all rungs' machines at once may be too many; what was judged stands
        found["failed"]["cycles in turn"] = _line(error)
        return found
    found["in_turn"] = all(len(each) >= ENOUGH for each in times.values())
    if found["in_turn"]:
        for rung, each in zip(found["rungs"], times.values(), strict=True):
            seconds = [took for took, _ in each]
            rung |= {"cycles_s": [round(t, 7) for t in seconds], "cycle_s": median(seconds)}
        tokens = [count for each in times.values() for _, count in each]
        found["acceptance_length"] = stated or sum(tokens) / len(tokens)
    return found


def _line(error: Exception) -> str:
    """An error in one line; a refusal of this package's own is a sentence already."""
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, ValueError) and line:
        return line.removesuffix(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def against_plain(
    pair: Pair, prompt: Prompt, strategies: Sequence[str], max_new_tokens: int, sizes: dict[str, int]
) -> dict[str, str]:
    """What each strategy's greedy tokens are against the target's alone: "identical", where a near tie of logits parts
    them, or the error that ended it, in words. Raises ArmsDisagree where anything else parts them."""
    plain = generate_plain(pair, prompt.ids, max_new_tokens).tokens
    told = {}
    for strategy in strategies:
        try:
            done = generate(pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, **sizes)
        except Exception as error:  # it can't be compiled or captured: `climb` names it again and goes on
            told[strategy] = _line(error)
            continue
        where = agree(pair, prompt.ids, done.tokens, plain, Decoding.of(max_new_tokens, strategy, **sizes))
        told[strategy] = words(settle(where, f"{strategy!r} and plain decoding differ on prompt {prompt.id}"))
    return told


def tokens_of(record: ComparisonRecord) -> dict[str, Any]:
    """What a comparison's record says of the candidate's tokens: against plain decoding, and pairs that parted at a tie,
    each way of parting once."""
    parted = [words(sample.difference) for sample in record.samples if sample.difference]
    return {
        "against_plain": words(record.correctness.candidate),
        "parted": sorted(set(parted)),
        "pairs_parted": len(parted),
        "pairs": len(record.samples),
    }


def timed_cycles(
    pair: Pair, prompt: Prompt, strategy: str, max_new_tokens: int, sizes: dict[str, int]
) -> Iterator[tuple[float, Cycle]]:
    """A decode's cycles, each with its seconds; the first one's hold the prefill. What is done between two isn't timed."""
    options: dict[str, Any] = {"strategy": strategy, "record": False, **sizes}
    cycles = stream(pair, prompt.ids, max_new_tokens, **options)
    start = now(pair.device)
    for found in cycles:
        yield (now(pair.device) - start) / 1e9, found
        start = now(pair.device)


def cycle_time(
    pair: Pair,
    prompt: Prompt,
    strategy: str,
    max_new_tokens: int,
    sizes: dict[str, int],
) -> dict[str, Any]:
    """Seconds of each cycle of one decode and their median, and what preparing the step took."""
    timed = list(timed_cycles(pair, prompt, strategy, max_new_tokens, sizes))
    times = [took for took, _ in timed[1:]]  # the prefill is in the first
    kept = [
        m.report()
        for (plan, *_), idle in pair.sessions.items()
        if str(plan) == str(parse(strategy))
        for m in idle
    ]
    return {
        "cycle_s": median(times) if times else None,
        "cycles_s": [round(t, 7) for t in times],
        "prepared": kept,
    }


def beside_forwards(
    pair: Pair,
    prompts: Sequence[Prompt],
    count: int = 24,
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
) -> dict[str, list[float]]:
    """The first rung's cycles, each followed by an eager forward of the target: "cycle_s" and "forward_s", in seconds.

    In turn, as a host's rate of launching moves by a third within seconds. Fewer than `count` where the answers to all
    prompts end before.
    """
    forwards = eager_forwards(pair)
    found: dict[str, list[float]] = {"cycle_s": [], "forward_s": []}
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    for prompt in prompts:
        cycles = timed_cycles(pair, prompt, RUNGS[0][1], (count + 1) * (depth + 2), sizes)
        next(cycles)  # the prefill is in this one
        for took, _ in cycles:
            found["cycle_s"].append(took)
            found["forward_s"].append(next(forwards))
            if len(found["cycle_s"]) == count:
                return found
    return found


def in_turn(
    pair: Pair,
    prompts: Sequence[Prompt],
    strategies: Sequence[str],
    count: int = 24,
    max_new_tokens: int = 64,
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    seed: int = 0,
) -> dict[str, list[tuple[float, int]]]:
    """Seconds and tokens of so many cycles of each strategy, in rounds of one of each in random order, in decodes of at
    most `max_new_tokens`; a decode's first cycle is left out. Fewer than `count` where the answers end before.
    """
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    found: dict[str, list[tuple[float, int]]] = {strategy: [] for strategy in strategies}
    coin = random.Random(seed)
    for prompt in prompts:
        decodes = {s: timed_cycles(pair, prompt, s, max_new_tokens, sizes) for s in strategies}
        first = True
        while len(cycles := _round(decodes, coin)) == len(decodes):
            for strategy, (took, cycle) in cycles.items():
                if not first:  # the prefill is in the first
                    found[strategy].append((took, len(cycle.committed)))
            first = False
            if len(found[strategies[0]]) == count:
                return found
    return found


def _round(
    decodes: dict[str, Iterator[tuple[float, Cycle]]], coin: random.Random
) -> dict[str, tuple[float, Cycle]]:
    """The next cycle of each decode, in random order; fewer where one has ended."""
    found = {}
    for strategy in coin.sample(list(decodes), len(decodes)):
        cycle = next(decodes[strategy], None)
        if cycle is None:
            break
        found[strategy] = cycle
    return found


def uncompiled(strategy: str) -> str:
    """The strategy without its compiler and what only goes with it: a step for each size of tree or batch would be
    compiled for minutes."""
    parts = [part for part in strategy.split(",") if part.rpartition("=")[2].strip() != "early"]
    return (
        ",".join(parts)
        .replace("compile+cuda_graph", "cuda_graph")
        .replace("runtime=compile", "runtime=eager")
    )


def fastest(rungs: Sequence[dict[str, Any]]) -> str:
    """The strategy with the least time: by the product of the ratios from the first rung up to it."""
    times: dict[str, float] = {rungs[0]["strategy"]: 1.0}
    for rung in rungs[1:]:
        ratio = rung["verdict"]["estimate"]
        if ratio:  # None where every pair was dropped
            times[rung["strategy"]] = times[rung["against"]] * ratio
    return min(times, key=lambda strategy: times[strategy])


def changed(rung: dict[str, Any]) -> list[str]:
    """The axes on which a rung differs from the one that it was compared with."""
    if not rung.get("against"):
        return []
    one, other = parse(rung["against"]), parse(rung["strategy"])
    return [axis for axis in axes() if getattr(one, axis) != getattr(other, axis)]


def chain(found: dict[str, Any]) -> dict[str, float]:
    """The rungs from the best down to the second, each compared with the one before: strategy → ratio of its times."""
    rungs = {rung.get("strategy"): rung for rung in found["rungs"]}
    ratios: dict[str, float] = {}
    at = rungs.get(found.get("best"))
    while at is not None and at.get("against"):
        ratios[at["strategy"]] = at["verdict"]["estimate"]
        at = rungs.get(at["against"])
    return ratios


def shares(found: dict[str, Any]) -> list[float | None]:
    """Each rung's share of the best one's whole gain, in log time; below 0 where it cost time. They add up to 1 over the
    rungs from the first to the best, each compared with the one before; None for the others, and where nothing was gained.
    """
    logs = {strategy: math.log(ratio) for strategy, ratio in chain(found).items()}
    whole = sum(logs.values())
    return [
        logs[r["strategy"]] / whole if r.get("strategy") in logs and whole < 0 else None
        for r in found["rungs"]
    ]


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
) -> list[dict[str, Any]]:
    """EAGLE-3 with trees of these sizes against plain decoding on the same runtime and attention, in pairs; → JSON values.

    Ratios are time / plain's: below 1 the tree pays. With `stated` tokens a cycle (random weights accept next to
    nothing) EAGLE-3 makes as many cycles as that many tokens then take. Raises ValueError for a size that has no shape
    in `TREES`.
    """
    wrong = [size for size in sizes if size not in TREES]
    if wrong:
        raise ValueError(f"tree size {wrong[0]} has no shape; known: {', '.join(map(str, TREES))}.")
    check(strategy, pair.device)
    found = []
    for size in sizes:
        top_k, depth, total = TREES[size]
        shape: dict[str, Any] = {"top_k": top_k, "depth": depth, "total_tokens": total}
        lengths: list[float] = []

        def plain(prompt: Prompt) -> None:
            generate_plain(pair, prompt.ids, max_new_tokens, strategy=strategy)

        def tree(prompt: Prompt, shape: dict[str, Any] = shape, lengths: list[float] = lengths) -> None:
            if stated is None:
                done = generate(pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, **shape)
                lengths.append(done.acceptance_length)
                return
            cycles = stream(pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, **shape)
            for _ in islice(cycles, math.ceil(max_new_tokens / stated)):
                pass
            lengths.append(stated)

        used = [len(prompt.ids) for prompt in prompts[:iterations]]
        first = to_warm_up(used, [Decoding.of(max_new_tokens, strategy, **shape)])
        seconds = time_in_pairs(plain, tree, prompts, iterations, seed, pair.device, warmup=first)
        verdict = judge([seconds])
        found.append({
            "total_tokens": total, "top_k": top_k, "depth": depth, "seconds": seconds, "verdict": verdict.model_dump(mode="json"),
            "acceptance_length": sum(lengths) / len(lengths), "stated": stated is not None, "strategy": strategy,
        })  # fmt: skip
    return found
