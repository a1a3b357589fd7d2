"""How small a difference can be told on this machine? Equal arms and arms with planted delays, in lock-step.

Arm 0 is the baseline and arm 1 the baseline again; each further arm is the baseline with a known share of a cycle's
time added to every cycle. All decode the same prompts in lock-step (`measure.lockstep`), instance after instance. What
each arm should be found to take is known, so estimates, intervals and the bias of an instance can be read off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eagle_lab.decode.generate import Cycle, decode_stream
from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.cores import foreign_load, read_load
from eagle_lab.measure.lockstep import Instance, Open, lock_step
from eagle_lab.measure.records import Part, Record, made
from eagle_lab.measure.spans import waiting
from eagle_lab.models.pair import Pair, project_path
from eagle_lab.models.prompts import Prompt
from eagle_lab.models.weights import dtype_name
from eagle_lab.verdict.stats import t_interval

PLANTED = (0.002, 0.01, 0.02, 0.05)


class InstancesSettings(Part):
    """What was decoded. planted: shares of `cycle_s`, the baseline's median cycle before anything was measured, that
    arms 2, 3, … take longer; where: the delay is on the "host" or the "device"."""

    target: str
    draft: str
    dtype: str
    strategy: str
    top_k: int
    depth: int
    total_tokens: int
    max_new_tokens: int
    minutes: float
    seed: int
    planted: list[float]
    where: Literal["host", "device"]
    cycle_s: float


class InstanceRow(Part):
    """One instance, arms in order: `made`, the order in which their states were made; first_s, seconds of set-up,
    prefill and first cycle; seconds [stretch][arm] and tokens [stretch] of its stretches; foreign_load, a share."""

    prompt: str
    made: list[int]
    first_s: list[float]
    seconds: list[list[float]]
    tokens: list[int]
    foreign_load: float


class InstancesRecord(Record):
    """Instances of equal arms and of arms with planted delays, in one process."""

    schema_name: Literal["eagle_lab.instances.v1"] = Field("eagle_lab.instances.v1", alias="schema")
    settings: InstancesSettings
    instances: list[InstanceRow] = []


@dataclass(frozen=True)
class Estimate:
    """What was found of one arm against the baseline, as ratios of time.

    over_instances: interval by Student's t over the instances' means, the honest one; over_stretches: the one that takes
    stretches as independent, for contrast; spread: standard deviation of one stretch's log ratio inside an instance;
    between: that of the instances' true ratios (0 where stretches explain all).
    """

    planted: float
    ratio: float
    over_instances: tuple[float, float]
    over_stretches: tuple[float, float]
    spread: float
    between: float
    instances: int
    stretches: int


def delayed(arm: Open, wait: Callable[[int], None], nanoseconds: int) -> Open:
    """The same decode, each of its cycles so much longer."""

    def opened() -> Iterator[Cycle]:
        for cycle in arm():
            wait(nanoseconds)
            yield cycle

    return opened


def take_instances(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    minutes: float,
    planted: Sequence[float] = PLANTED,
    where: Literal["host", "device"] | None = None,
    seed: int = 0,
    on_instance: Callable[[InstancesRecord], None] | None = None,
) -> InstancesRecord:
    """Instances for so many minutes after one that warms up; where None: delays on the device if there is one.

    on_instance: told of the record after each instance. Raises ValueError where a delay on the device is asked for
    without one.
    """
    place = where or ("device" if pair.device.type == "cuda" else "host")
    wait = waiting(place, pair.device)
    coin = random.Random(seed)

    def instance(prompt: Prompt, delays: Sequence[int]) -> Instance:
        pair.sessions.clear()  # states, caches and graphs are made anew

        def baseline() -> Iterator[Cycle]:
            return decode_stream(pair, prompt.ids, decoding, record=False)

        arms = [baseline, baseline, *(delayed(baseline, wait, delay) for delay in delays)]
        return lock_step(pair, arms, decoding.max_new_tokens, coin)

    warm = instance(prompts[0], [0] * len(planted))
    cycle_s = float(np.median([s.seconds[arm] for s in warm.stretches for arm in (0, 1)]))
    settings = InstancesSettings(
        target=project_path(pair.target_name),
        draft=project_path(pair.draft_name),
        dtype=dtype_name(pair.dtype),
        strategy=str(decoding.strategy),
        top_k=decoding.shape.top_k,
        depth=decoding.shape.depth,
        total_tokens=decoding.shape.total_tokens,
        max_new_tokens=decoding.max_new_tokens,
        minutes=minutes,
        seed=seed,
        planted=list(planted),
        where=place,
        cycle_s=cycle_s,
    )
    record = InstancesRecord(**made(pair.device.type), settings=settings)
    delays = [round(share * cycle_s * 1e9) for share in planted]
    end, number = perf_counter() + 60 * minutes, 0
    while perf_counter() < end or number < 2:
        prompt, before = prompts[number % len(prompts)], read_load()
        found = instance(prompt, delays)
        record.instances.append(
            InstanceRow(
                prompt=prompt.id,
                made=list(found.made),
                first_s=list(found.first_s),
                seconds=[list(s.seconds) for s in found.stretches],
                tokens=[s.tokens for s in found.stretches],
                foreign_load=round(foreign_load(before, read_load()), 3),
            )
        )
        number += 1
        if on_instance:
            on_instance(record)
    pair.sessions.clear()
    return record


def log_ratios(record: InstancesRecord, arm: int) -> list[NDArray]:
    """log(arm / baseline) of each stretch, float64 [stretches], by instance; instances without a stretch are left out."""
    seconds = [np.asarray(row.seconds) for row in record.instances if row.seconds]
    return [np.log(x[:, arm]) - np.log(x[:, 0]) for x in seconds]


def estimates(record: InstancesRecord, alpha: float = 0.05) -> list[Estimate]:
    """Each arm against the baseline: the baseline again first, then the planted delays.

    Raises ValueError for a record of fewer than two instances with stretches.
    """
    found = []
    for arm, planted in enumerate((0.0, *record.settings.planted), 1):
        logs = log_ratios(record, arm)
        if len(logs) < 2:
            raise ValueError("two instances at least are needed; take more minutes or more new tokens.")
        means, flat = np.array([x.mean() for x in logs]), np.concatenate(logs)
        inside_s2 = float(np.mean([x.var(ddof=1) for x in logs if len(x) > 1]))
        noise = inside_s2 * float(np.mean([1 / len(x) for x in logs]))
        found.append(
            Estimate(
                planted=planted,
                ratio=math.exp(means.mean()),
                over_instances=_ratios(t_interval(means, alpha)),
                over_stretches=_ratios(t_interval(flat, alpha)),
                spread=math.sqrt(inside_s2),
                between=math.sqrt(max(0.0, float(means.var(ddof=1)) - noise)),
                instances=len(logs),
                stretches=len(flat),
            )
        )
    return found


def _ratios(ends: tuple[NDArray, NDArray]) -> tuple[float, float]:
    return math.exp(float(ends[0])), math.exp(float(ends[1]))
