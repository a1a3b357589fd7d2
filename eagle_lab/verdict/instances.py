"""How small a difference can be told on this machine? Equal arms and arms with planted delays, in lock-step.

Sessions 0 and 1 are the baseline; each further one is the baseline with a known share of a cycle's time added to every
cycle. All decode the same prompts in lock-step (`measure.lockstep`), instance after instance. What each session should be
found to take is known, so estimates, intervals and the bias of an instance can be read off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eagle_lab.decode.strategy import Decoding
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import base_arm
from eagle_lab.measure.pairs import Fork, Plan, take_instance
from eagle_lab.measure.records import Decoded, InstanceSample, Record, made
from eagle_lab.measure.spans import Where, waiting
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.stats import t_interval
from eagle_lab.verdict.summary import calm_cycle_s, stretch_logs

PLANTED = (0.002, 0.01, 0.02, 0.05)


class PlantedSettings(Decoded):
    """What was decoded. planted: shares of `cycle_s`, the baseline's median cycle before anything was measured, that
    sessions 2, 3, … take longer; where: the delay is on the "host" or the "device"."""

    max_new_tokens: int
    planted: list[float]
    where: Where
    cycle_s: float


class InstancesSettings(PlantedSettings):
    """minutes: after them no other instance was begun."""

    minutes: float


class InstancesRecord(Record):
    """Instances of equal arms and of arms with planted delays, in one process."""

    schema_name: Literal["eagle_lab.instances.v1"] = Field("eagle_lab.instances.v1", alias="schema")
    settings: InstancesSettings
    instances: list[InstanceSample] = []


@dataclass(frozen=True)
class PlantedFound:
    """What was found of one arm against the baseline, as ratios of time.

    truth: what the planted seconds are of the cycles as they were found; planted: of those before anything was measured.
    over_instances: interval by Student's t over the instances' means, the honest one; over_stretches: the one that takes
    stretches as independent, for contrast; spread: standard deviation of one stretch's log ratio inside an instance;
    between: that of the instances' true ratios (0 where stretches explain all).
    """

    planted: float
    truth: float
    ratio: float
    over_instances: tuple[float, float]
    over_stretches: tuple[float, float]
    spread: float
    between: float
    instances: int
    stretches: int


def decoded(pair: Pair, decoding: Decoding) -> dict[str, Any]:
    """What is decoded, as fields of a record's settings."""
    shape, limit = asdict(decoding.shape), decoding.max_new_tokens
    return {**pair.names, "strategy": str(decoding.strategy), **shape, "max_new_tokens": limit}


def planted_plan(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    count: int = 1,
    where: Where | None = None,
    seed: int = 0,
) -> tuple[Plan, float]:
    """A plan of equal arms, the baseline twice and so many more, and the baseline's median cycle in seconds, by one
    instance without delays; where None: on the device if there is one.

    Raises ValueError where a delay on the device is asked for without one.
    """
    place = where or ("device" if pair.device.type == "cuda" else "host")
    waiting(place, pair.device)
    sessions = (0,) * (2 + count)
    arm = base_arm(pair, Arm(decoding.strategy, shape=decoding.shape, sampling=decoding.sampling))
    plan = Plan(
        (arm, arm), tuple(prompts), decoding.max_new_tokens, seed, pairs_of="cycles", sessions=sessions, where=place
    )  # fmt: skip
    # a delay of nothing: a device waits for `LEAST_NS` in each cycle that is measured
    warm = take_instance(pair, plan, Fork(-1, (), delays_s=(0.0,) * len(sessions)), 0)["instance"]
    if not warm.seconds:
        raise ValueError(
            "a prompt's answer ends with its first cycle, so nothing can be timed; take more new tokens."
        )
    return plan, float(np.median(warm.seconds))


def take_instances(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    minutes: float,
    planted: Sequence[float] = PLANTED,
    where: Where | None = None,
    seed: int = 0,
    on_instance: Callable[[InstancesRecord], None] | None = None,
) -> InstancesRecord:
    """Instances for so many minutes after one that warms up; `where` as in `planted_plan`.

    on_instance: told of the record after each instance. Raises ValueError as `planted_plan` does.
    """
    plan, cycle_s = planted_plan(pair, prompts, decoding, len(planted), where, seed)
    fork = Fork(0, (), delays_s=(0.0, 0.0, *(share * cycle_s for share in planted)))
    settings = InstancesSettings(
        **decoded(pair, decoding), minutes=minutes, seed=seed, planted=list(planted), where=plan.where, cycle_s=cycle_s
    )  # fmt: skip
    record = InstancesRecord(**made(pair.device.type), settings=settings)
    end, number = perf_counter() + 60 * minutes, 0
    while perf_counter() < end or number < 2:
        record.instances.append(take_instance(pair, plan, fork, number)["instance"])
        number += 1
        if on_instance:
            on_instance(record)
    pair.sessions.clear()
    return record


def estimates(record: InstancesRecord) -> list[PlantedFound]:
    """Each arm against the baseline: the baseline again first, then the planted delays.

    Raises ValueError for a record of fewer than two instances with stretches.
    """
    found = []
    for arm, planted in enumerate((0.0, *record.settings.planted), 1):
        kept = [i for i in record.instances if i.seconds]
        if len(kept) < 2:
            raise ValueError("two instances at least are needed; take more minutes or more new tokens.")
        logs = stretch_logs(kept, arm)
        means, flat = np.array([x.mean() for x in logs]), np.concatenate(logs)
        inside_s2 = float(np.mean([x.var(ddof=1) for x in logs if len(x) > 1]))
        noise = inside_s2 * float(np.mean([1 / len(x) for x in logs]))
        found.append(
            PlantedFound(
                planted=planted,
                truth=1 + planted * record.settings.cycle_s / calm_cycle_s(kept),
                ratio=math.exp(means.mean()),
                over_instances=_ratios(t_interval(means)),
                over_stretches=_ratios(t_interval(flat)),
                spread=math.sqrt(inside_s2),
                between=math.sqrt(max(0.0, float(means.var(ddof=1)) - noise)),
                instances=len(logs),
                stretches=len(flat),
            )
        )
    return found


def _ratios(ends: tuple[NDArray, NDArray]) -> tuple[float, float]:
    return math.exp(float(ends[0])), math.exp(float(ends[1]))
