"""What if a stage took longer? A known delay in one stage, and the slope of the whole against it.

A share says what a stage takes; the slope says how much of it the whole waits for. Where the stage is on the critical
path, a delay of 1 ms makes the whole 1 ms longer (slope 1); where other work covers it, less. So slope × stage time is
an upper bound of what removing the stage could bring, measured, and true also where host and device overlap.
Delays on the host spin, because a sleep overshoots; delays on the device are a kernel in the stage's stream.
The idea is that of causal profiling (Curtsinger and Berger, Coz, SOSP 2015), run backwards: it slows, not speeds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from eagle_lab.decode.generate import decode, to_warm_up
from eagle_lab.decode.strategy import Strategy, parse
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.measure.spans import Delayed, Where, waiting
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import no_span
from eagle_lab.runtime.prepare import fixed
from eagle_lab.studies.breakdown import Stage, lane, stages, whole_seconds
from eagle_lab.studies.profile import DelayedPair, ProfileRecord, WhatIf
from eagle_lab.verdict.stats import ENOUGH, Interval, shift
from eagle_lab.verdict.summary import gain

WIDE = 0.3  # a slope that isn't known to within this much on either side tells nothing
PARTS = ("select", "draft", "tree_mask", "target", "accept", "commit", "to_host")  # of a cycle, as it runs
REPLAYED = ("replay", "to_host")  # the same where it is one graph, or compiled whole


def stages_of(strategy: str | Strategy) -> tuple[str, ...]:
    """The stages that a cycle of a strategy has."""
    return REPLAYED if fixed(parse(strategy).runtime) else PARTS


def check_whatif(
    pair: Pair,
    strategy: str | Strategy,
    stage: str | None,
    where: str,
    iterations: int = ENOUGH,
    delay_ms: float = 0.0,
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


def natural_delay(record: ProfileRecord, stage: str) -> float:
    """Seconds a call that make a cycle half longer, were all of it on the critical path: well above the noise.

    Raises ValueError that lists the stages where there is none of that name.
    """
    known = {s.name: s.calls for s in stages(record) if s.in_cycle and s.name != "rest"}
    if stage not in known:
        raise ValueError(f"stage {stage!r} is not in this decode; its stages are {', '.join(known)}.")
    whole, cycles = whole_seconds(record)
    return 0.5 * whole / cycles / known[stage]


def whatif(
    pair: Pair,
    prompts: Sequence[Prompt],
    record: ProfileRecord,
    *,
    stage: str,
    where: Where = "host",
    delay_ms: float = 0.0,
    iterations: int = 8,
    max_new_tokens: int = 12,
    seed: int = 0,
) -> WhatIf:
    """Pairs of decodes with and without the delay, half of them with twice the delay.

    Args: record: a profile of this pair, which gives the decode's settings; stage, where: as `check_whatif` allows;
    delay_ms: of each call, 0 = chosen so that a cycle should grow by half. Raises ValueError for a stage that the profile
    hasn't, and for where="device" without one.
    """
    wait, natural = waiting(where, pair.device), natural_delay(record, stage)
    delay = delay_ms / 1e3 or natural
    decoding = replace(record.settings.decoding, max_new_tokens=max_new_tokens)
    items = [
        (p, delay * (1 + n % 2)) for n, p in enumerate(prompts[k % len(prompts)] for k in range(iterations))
    ]
    waits: list[tuple[int, float]] = []

    def run(item: tuple[Prompt, float], slow: bool) -> None:
        span = Delayed(no_span, stage, round(item[1] * 1e9) if slow else 0, wait)
        decode(pair, item[0].ids, decoding, record=False, span=span)
        if slow:
            # a spin on a busy machine may overshoot, and counts as what it was; the device's wait is out of sight
            waits.append((span.calls, span.waited / 1e9 if where == "host" else item[1] * span.calls))

    first = to_warm_up([len(p.ids) for p, _ in items], [decoding])
    took = time_in_pairs(
        lambda i: run(i, False), lambda i: run(i, True), items, iterations, seed, pair.device, warmup=first
    )
    samples = [
        DelayedPair(
            prompt=item[0].id, delay_s=item[1], calls=calls, waited_s=waited, baseline_s=base, delayed_s=slow
        )
        # the warm-up pair runs too, and comes first
        for item, (calls, waited), (base, slow) in zip(items, waits[-iterations:], took, strict=True)
    ]
    return WhatIf(stage=stage, where=where, max_new_tokens=max_new_tokens, seed=seed, samples=samples)


def slope(found: WhatIf) -> Interval:
    """Seconds that the whole grows by for each second of delay: low, estimate, high, at 95%."""
    return shift([[(s.delayed_s - s.baseline_s) / s.waited_s for s in found.samples]])


class Meaning(StrEnum):
    """What a slope beside a share tells."""

    UNCLEAR = "unclear"  # the interval is wider than ±WIDE
    # a replayed cycle: the device does it meanwhile, so the delay fits in the host's pause
    HOST_IDLE = "host idle"
    # below 1, and the estimate within a tenth of it: next to nothing covers the stage
    NEARLY_ALL = "nearly all"
    DEVICE_WAITS = "device waits"  # the device waits for the host's launches anyway
    COVERED = "covered"  # other work covers a part of the stage
    DISTURBS = "disturbs"  # a delay costs more than its length
    DEVICE_CRITICAL = "device critical"  # the device had nothing else to do
    CRITICAL = "critical"  # the stage is on the critical path


@dataclass(frozen=True)
class Effect:
    """What a delay in a stage did. bound: what removing the stage can bring at most, by the slope; infinite where the
    slope sets no limit; replayed: whether the cycle is one graph or compiled whole."""

    stage: Stage
    where: Where
    slope: Interval
    bound: Interval
    meaning: Meaning
    replayed: bool


def effect(record: ProfileRecord, found: WhatIf) -> Effect:
    """The slope of a what-if beside the stage's share, and what the two mean together."""
    row = next(s for s in stages(record) if s.name == found.stage)
    at = slope(found)
    low, middle, high = (gain(max(0.0, k) * row.whole) for k in at)
    replayed = row.name == "replay"
    meaning = _meaning(at, found.where, replayed, lane(record) == "device")
    return Effect(row, found.where, at, (low, middle, high), meaning, replayed)


def _meaning(found: Interval, where: str, replayed: bool, on_device: bool) -> Meaning:
    low, at, high = found
    if not high - low <= 2 * WIDE:
        return Meaning.UNCLEAR
    if low > 1:
        return Meaning.DISTURBS
    if high >= 1:
        return Meaning.DEVICE_CRITICAL if where == "device" else Meaning.CRITICAL
    if replayed and where == "host" and on_device:
        return Meaning.HOST_IDLE
    if 1.1 * at >= 1:
        return Meaning.NEARLY_ALL
    return Meaning.DEVICE_WAITS if where == "device" and not replayed else Meaning.COVERED
