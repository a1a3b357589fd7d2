"""Equal arms and planted delays in lock-step: what was planted is found, and intervals are over instances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.records import InstanceSample, made, read, record_path, write
from eagle_lab.models.prompts import Prompt
from eagle_lab.report.instances import instances_table
from eagle_lab.verdict.instances import InstancesRecord, InstancesSettings, estimates, take_instances

SETTINGS = InstancesSettings(
    target="tiny", draft="head", dtype="float32", strategy="rebuild", top_k=2, depth=2, total_tokens=4,
    max_new_tokens=8, minutes=0.1, seed=0, planted=[0.05], where="host", cycle_s=0.01,
)  # fmt: skip


def invented(instances: int, stretches: int, between: float, spread: float) -> InstancesRecord:
    """A record whose arms have a bias of their own in each instance; arm 2 takes 5% longer."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(instances):
        bias = rng.normal(0, between / math.sqrt(2), 3) + (0.0, 0.0, math.log(1.05))
        times = 0.01 * np.exp(bias + rng.normal(0, spread / math.sqrt(2), (stretches, 3)))
        rows.append(
            InstanceSample(
                prompt=f"p{number}", made=[0, 1, 2], first_s=[0.1] * 3, seconds=times.tolist(),
                tokens=[1] * stretches, foreign_load=0.0,
            )  # fmt: skip
        )  # fmt: skip
    return InstancesRecord(**made(), settings=SETTINGS, instances=rows)


def test_an_instance_s_bias_widens_the_interval_over_instances_alone():
    equal, planted = estimates(invented(40, 100, between=0.005, spread=0.01))
    width = [math.log(high / low) for low, high in (equal.over_instances, equal.over_stretches)]
    assert width[0] > 3 * width[1]
    assert equal.spread == pytest.approx(0.01, rel=0.1) and equal.between == pytest.approx(0.005, rel=0.3)
    assert planted.over_instances[0] < 1.05 < planted.over_instances[1]
    assert (equal.instances, equal.stretches) == (40, 4000)


def test_without_a_bias_both_intervals_are_about_as_wide():
    equal, _ = estimates(invented(40, 100, between=0.0, spread=0.01))
    widths = [math.log(high / low) for low, high in (equal.over_instances, equal.over_stretches)]
    assert widths[0] == pytest.approx(widths[1], rel=0.35)


def test_one_instance_has_no_interval():
    with pytest.raises(ValueError, match="two instances"):
        estimates(invented(1, 10, 0.0, 0.01))


def test_a_large_planted_delay_is_found(tiny_pair, tmp_path):
    prompts = [Prompt("a", "own", "", tuple(range(5, 25))), Prompt("b", "own", "", tuple(range(40, 60)))]
    kept = []
    found = take_instances(
        tiny_pair, prompts, Decoding.of(16, top_k=2, depth=2, total_tokens=4), minutes=0.05, planted=(1.0,),
        on_instance=lambda record: kept.append(len(record.instances)),
    )  # fmt: skip
    assert kept == list(range(1, len(found.instances) + 1)) and len(kept) >= 2
    assert all(len(times) == 3 for row in found.instances for times in row.seconds)
    equal, planted = estimates(found)
    assert planted.ratio > 1.4 and planted.ratio > 1.3 * equal.ratio
    path = record_path(found, tmp_path)
    write(found, path)
    assert read(path, InstancesRecord) == found
    assert instances_table(found).count("\n|") == 4
