"""What if a stage took longer? A known delay in one stage, and the slope of the whole against it.

A share says what a stage takes; the slope says how much of it the whole waits for. Where the stage is on the critical
path, a delay of 1 ms makes the whole 1 ms longer (slope 1); where other work covers it, less. So slope × stage time is
an upper bound of what removing the stage could bring, measured, and true also where host and device overlap.
Delays on the host spin, because a sleep overshoots; delays on the device are a kernel in the stage's stream.
The idea is that of causal profiling (Curtsinger and Berger, Coz, SOSP 2015), run backwards: it slows, not speeds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from eagle_lab.decode.generate import generate, to_warm_up
from eagle_lab.decode.strategy import Decoding, Strategy, parse
from eagle_lab.measure.old_records import Record
from eagle_lab.measure.pairs import pairs
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import Delayed, device_spin, no_span, spin
from eagle_lab.runtime.prepare import fixed
from eagle_lab.studies.breakdown import gain, lane, stages, whole_seconds
from eagle_lab.studies.profile import profile_prompts
from eagle_lab.verdict.stats import hodges_lehmann, signed_rank_interval

ENOUGH = 6  # pairs below which there is no interval at 95%
PARTS = ("select", "draft", "tree_mask", "target", "accept", "commit", "to_host")  # of a cycle, as it runs
REPLAYED = ("replay", "to_host")  # the same where it is one graph, or compiled whole


def stages_of(strategy: str | Strategy) -> tuple[str, ...]:
    """The stages that a cycle of a strategy has."""
    return REPLAYED if fixed(parse(strategy).runtime) else PARTS


def waiting(where: str, device: torch.device) -> Callable[[int], None]:
    """What waits there for so many nanoseconds; ValueError for a place that there isn't."""
    if where not in ("host", "device"):
        raise ValueError(f"where is {where!r}; use 'host' or 'device'.")
    return spin if where == "host" else device_spin(device)


def check_whatif(
    pair: Pair, strategy: str, stage: str | None, where: str, iterations: int = ENOUGH, delay_ms: float = 0.0
) -> str:
    """The stage that is made longer; where it is None, "draft", or "replay" where a cycle's parts can't be told apart.

    ValueError for anything that `whatif` can't do, so that it can be said before a profile is measured.
    """
    waiting(where, pair.device)
    if iterations < ENOUGH:
        raise ValueError(f"iterations is {iterations}; an interval needs at least {ENOUGH} pairs.")
    if not 0 <= delay_ms < math.inf:
        raise ValueError(f"delay_ms is {delay_ms}; it must be 0 or more.")
    known = stages_of(strategy)
    if stage is None:
        stage = "draft" if "draft" in known else "replay"
    if stage not in known:
        raise ValueError(
            f"stage {stage!r} is not in a cycle of {strategy}; its stages are {', '.join(known)}."
        )
    return stage


def calls_of(record: Record, stage: str) -> float:
    """Calls of a stage in a cycle, by a profile; ValueError that lists the stages where there is none of that name."""
    known = {s.name: s.calls for s in stages(record) if s.name not in ("rest", "prefill", "set-up")}
    if stage not in known:
        raise ValueError(f"stage {stage!r} is not in this decode; its stages are {', '.join(known)}.")
    return known[stage]


def natural_delay(record: Record, stage: str, part: float = 0.15) -> float:
    """Seconds a call that make a cycle `part` longer, were all of it on the critical path: well above the noise."""
    whole, cycles = whole_seconds(record)
    return part * whole / cycles / calls_of(record, stage)


def whatif(
    pair: Pair,
    prompts: Sequence[Prompt],
    record: Record,
    *,
    stage: str | None = None,
    where: str = "host",
    delay_ms: float = 0.0,
    iterations: int = 8,
    max_new_tokens: int = 12,
    seed: int = 0,
) -> dict[str, Any]:
    """Pairs of decodes with and without the delay, half of them with twice the delay; → plain JSON values.

    Args: record: a profile of this pair, which gives the decode's settings; stage: where to wait, None as in
    `check_whatif`; where: "host" or "device"; delay_ms: of each call, 0 = chosen so that a cycle should grow by 15%.
    Raises ValueError for an unknown stage, for where="device" without one, and for fewer than six pairs.
    """
    stage = check_whatif(pair, record["settings"]["strategy"], stage, where, iterations, delay_ms)
    calls_of(record, stage)
    wait = waiting(where, pair.device)
    delay = delay_ms / 1e3 or natural_delay(record, stage)
    s = record["settings"]
    options: dict[str, Any] = {k: s[k] for k in ("strategy", "top_k", "depth", "total_tokens")}
    prompts = profile_prompts(pair, prompts, seed=s["seed"])
    items = [
        (p, delay * (1 + n % 2)) for n, p in enumerate(prompts[k % len(prompts)] for k in range(iterations))
    ]
    waits: list[tuple[int, float]] = []

    def run(item: tuple[Prompt, float], slow: bool) -> None:
        span = Delayed(no_span, stage, round(item[1] * 1e9) if slow else 0, wait)
        generate(pair, item[0].ids, max_new_tokens, record=False, span=span, **options)
        if slow:
            # a spin on a busy machine may overshoot, and counts as what it was; the device's wait is out of sight
            waits.append((span.calls, span.waited / 1e9 if where == "host" else item[1] * span.calls))

    sizes = {k: options[k] for k in ("top_k", "depth", "total_tokens")}
    first = to_warm_up(
        [len(p.ids) for p, _ in items], [Decoding.of(max_new_tokens, options["strategy"], **sizes)]
    )
    took = pairs(
        lambda i: run(i, False), lambda i: run(i, True), items, iterations, seed, pair.device, warmup=first
    )
    return {
        "stage": stage,
        "where": where,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        # the warm-up pair runs too, and comes first
        "samples": [
            {
                "prompt": item[0].id, "delay_s": item[1], "calls": calls, "waited_s": waited,
                "baseline_s": base, "delayed_s": slow,
            }
            for item, (calls, waited), (base, slow) in zip(items, waits[-iterations:], took, strict=True)
        ],
    }  # fmt: skip


def slope(found: dict[str, Any], alpha: float = 0.05) -> tuple[float, float, float]:
    """Low, estimate and high of the seconds that the whole grows by for each second of delay."""
    each = np.array([(s["delayed_s"] - s["baseline_s"]) / s["waited_s"] for s in found["samples"]])
    low, high = signed_rank_interval(each, alpha)
    return float(low), float(hodges_lehmann(each)), float(high)


def measured_bound(record: Record, found: dict[str, Any]) -> tuple[float, float, float]:
    """What removing the stage can bring at most, low, estimate and high: the ceiling of slope × the stage's share."""
    part = next(s for s in stages(record) if s.name == found["stage"]).whole
    low, at, high = (gain(max(0.0, k) * part) for k in slope(found))
    return low, at, high


def _percent(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else "no limit"  # a slope above 1 / the share


def sentence(record: Record, found: dict[str, Any]) -> str:
    """The slope beside the share, and which of the two to believe."""
    row = next(s for s in stages(record) if s.name == found["stage"])
    low, at, high = slope(found)
    least, most, top = measured_bound(record, found)
    stated = record["settings"].get("stated_acceptance")
    at_tau = f" at a stated acceptance length of {stated:g}" if stated else ""
    words = (
        f"Each second of delay in {found['stage']} (on the {found['where']}) makes the decode {at:.2f} s "
        f"[{low:.2f}, {high:.2f}] longer. By its share ({row.whole:.1%} of the decode{at_tau}) the stage can bring at most "
        f"{row.ceiling:+.1%}; by the slope, {_percent(most)} [{_percent(least)}, {_percent(top)}]. "
    )
    if low <= 0 and high >= 1:
        return (
            words
            + "The interval holds both 0 and 1, so this tells nothing: take more pairs, or a longer delay."
        )
    replayed = row.name == "replay"
    if replayed and high < 1 and found["where"] == "host" and lane(record) == "device":
        return words + (
            "The device does its cycle meanwhile, so this tells only how long the host has nothing to do: believe the share, "
            "or delay the device."
        )
    if high < 1 <= 1.1 * at:
        return (
            words
            + "Next to nothing else covers the stage: the two nearly agree, and the slope is the safer one."
        )
    if high < 1 and found["where"] == "device" and not replayed:
        return words + (
            "The device waits for the host's launches anyway and does part of the delay meanwhile, so believe the slope: "
            "faster kernels bring no more, fewer launches might."
        )
    if high < 1:
        return (
            words + "Other work covers part of the stage, so believe the slope: the share promises too much."
        )
    if low > 1:
        return words + (
            "A delay costs more than its own length, so it also disturbs what follows (clocks, caches): "
            "believe the share, and take the slope as an upper bound."
        )
    wide = " It is wide, though: more pairs would tell better." if high - low > 1 else ""
    if found["where"] == "device":
        # it stands at the end of the stage, where the host may be about to wait for the device anyway
        return (
            f"{words}The interval includes 1: the device had nothing else to do meanwhile. Faster kernels bring no more than "
            f"the device's busy share; fewer {'kernels' if replayed else 'launches'} might.{wide}"
        )
    return (
        f"{words}The interval includes 1, so this agrees with the share: the stage is on the critical path, and nothing was "
        f"seen to cover it.{wide}"
    )
