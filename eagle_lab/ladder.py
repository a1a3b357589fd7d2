"""The ladder of optimizations: one change at a time, each judged in pairs against the rung below it.

It starts from the official implementation's own ways (a mask built on the host, the head's cache grown by
concatenation, attention as separate operations) and changes one axis a rung. Rungs that cannot run on a device are
listed with the reason. A cycle's time is the host's, from one small copy to the next, so nothing is timed inside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from eagle_lab.clock import now
from eagle_lab.compare import ArmsDisagree, compare
from eagle_lab.decode import generate, generate_plain, stream
from eagle_lab.measure import pairs
from eagle_lab.models import Pair
from eagle_lab.physics import floor
from eagle_lab.prompts import Prompt
from eagle_lab.stats import judge
from eagle_lab.strategy import check, parse, unavailable

# what changed, and the strategy that it leads to; each differs from the one before it on one axis
RUNGS = (
    ("the official implementation's ways", "cache=concat,attention=eager"),
    ("the head's cache in place", "attention=eager"),
    ("fused attention under one mask", "rebuild"),
    ("tree mask built on the device", "doubling"),
    ("prefix read without a mask", "doubling,attention=tree"),
    ("one graph for the cycle", "doubling,attention=tree,runtime=cuda_graph"),
    ("tree attention in one kernel", "doubling,attention=tree_fused,runtime=cuda_graph"),
    ("compiled, then one graph", "doubling,attention=tree,runtime=compile+cuda_graph"),
    ("compiled around the one kernel", "doubling,attention=tree_fused,runtime=compile+cuda_graph"),
)
COMPILED = (
    "the cycle compiled",
    "doubling,attention=tree,runtime=compile",
)  # takes minutes to prepare on a CPU

# trees from small to large: top_k, depth, total_tokens
TREES = {3: (2, 2, 3), 7: (3, 3, 7), 15: (4, 4, 15), 31: (6, 5, 31), 63: (10, 7, 63)}


def available(pair: Pair, compiled: bool = False) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The rungs that this pair's device can run, in order, and the reason for each that it can't."""
    rungs = [*RUNGS[:5], COMPILED, *RUNGS[5:]]
    can, cannot = [], {}
    for change, strategy in rungs:
        plan = parse(strategy)
        reasons = [
            unavailable(axis, getattr(plan, axis), pair.device) for axis in ("mask", "runtime", "attention")
        ]
        reason = next(filter(None, reasons), None)
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
    results_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Compare each rung with the one that it stands on, and the fastest with the first; → JSON values.

    A rung stands on the fastest below it, so a change that makes decoding slower is left out of those that follow
    (the strategies say which axes are on). "rungs": change, strategy, against, verdict, cycle_s, tokens_per_s,
    prepared; "unavailable": strategy → reason; "disagreed": strategy → what `compare` refused; "best", "verdict" of
    the best against the first, and "floor".
    """
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    can, cannot = available(pair, compiled)
    options: dict[str, Any] = {
        **sizes, "max_new_tokens": max_new_tokens, "iterations": iterations, "forks": forks, "seed": seed,
        "prompts": prompts, "results_dir": results_dir, "progress": False,
    }  # fmt: skip
    rungs: list[dict[str, Any]] = []
    disagreed: dict[str, str] = {}
    best = can[0][1]
    for change, strategy in can:
        rung: dict[str, Any] = {"change": change, "strategy": strategy, "against": None, "verdict": None}
        if strategy != can[0][1]:
            try:
                done = compare(pair, baseline=best, candidate=strategy, **options)
            except ArmsDisagree as error:
                disagreed[strategy] = str(error)
                continue
            rung |= {"against": best, "verdict": done.verdict.to_dict()}
            if done.verdict.estimate < 1:  # also not where it is NaN, every pair having been dropped
                best = strategy
        rungs.append(rung | cycle_time(pair, prompts[0], strategy, max_new_tokens, sizes))
    last = compare(pair, baseline=can[0][1], candidate=best, **options).verdict if best != can[0][1] else None
    return {
        "rungs": rungs,
        "unavailable": cannot,
        "disagreed": disagreed,
        "best": best,
        "verdict": last.to_dict() if last else None,
        "floor": floor(pair, top_k, depth, total_tokens, len(prompts[0].ids) + max_new_tokens // 2),
    }


def cycle_time(
    pair: Pair, prompt: Prompt, strategy: str, max_new_tokens: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Median seconds of a cycle, tokens a second without the prefill, acceptance, and what preparing the step took."""
    times, tokens = [], []
    options: dict[str, Any] = {"strategy": strategy, "record": False, **sizes}
    cycles = stream(pair, prompt.ids, max_new_tokens, **options)
    tokens.append(len(next(cycles).committed))  # the prefill is in this one
    start = now(pair.device)
    for found in cycles:
        times.append((now(pair.device) - start) / 1e9)
        tokens.append(len(found.committed))
        start = now(pair.device)
    kept = [
        m.report()
        for (plan, *_), idle in pair.machines.items()
        if str(plan) == str(parse(strategy))
        for m in idle
    ]
    return {
        "cycle_s": median(times) if times else None,
        "tokens_per_s": sum(tokens[1:]) / sum(times) if times else None,
        "acceptance_length": sum(tokens) / len(tokens),
        "prepared": kept,
    }


def shares(rungs: Sequence[dict[str, Any]]) -> list[float | None]:
    """Each rung's share of the whole gain, in log time: those of the rungs that were kept add up to 1."""
    # no estimate: every pair was dropped, as the machine was busy with something else
    kept = [r for r in rungs if r["verdict"] and (r["verdict"]["estimate"] or 1) < 1]
    whole = sum(math.log(r["verdict"]["estimate"]) for r in kept)
    return [math.log(r["verdict"]["estimate"]) / whole if r in kept and whole else None for r in rungs]


def tree_sizes(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    sizes: Sequence[int] = tuple(TREES),
    strategy: str = "doubling",
    max_new_tokens: int = 32,
    iterations: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """EAGLE-3 with trees of these sizes against plain decoding on the same runtime and attention, in pairs; → JSON values.

    Ratios are time / plain's: below 1 the tree pays. Raises ValueError for a size that has no shape in `TREES`.
    """
    wrong = [size for size in sizes if size not in TREES]
    if wrong:
        raise ValueError(f"tree size {wrong[0]} has no shape; known: {', '.join(map(str, TREES))}.")
    check(strategy, pair.device)
    found = []
    for size in sizes:
        top_k, depth, total = TREES[size]
        shape = {"top_k": top_k, "depth": depth, "total_tokens": total}
        lengths: list[float] = []

        def plain(prompt: Prompt) -> None:
            generate_plain(pair, prompt.ids, max_new_tokens, strategy=strategy)

        def tree(prompt: Prompt, shape: dict[str, int] = shape, lengths: list[float] = lengths) -> None:
            done = generate(pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, **shape)
            lengths.append(done.acceptance_length)

        seconds = pairs(plain, tree, prompts, iterations, seed, pair.device)
        verdict = judge([seconds])
        found.append({
            "total_tokens": total, "top_k": top_k, "depth": depth, "seconds": seconds, "verdict": verdict.to_dict(),
            "acceptance_length": sum(lengths) / len(lengths),
        })  # fmt: skip
    return found
