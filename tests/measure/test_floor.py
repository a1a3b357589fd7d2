"""The floor's bytes and operations against a count by hand for the tiny pair, and the two rates of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from make import GOLDEN

from eagle_lab import load
from eagle_lab.decode.forward import asked
from eagle_lab.decode.strategy import parse
from eagle_lab.measure.floor import (
    Experts,
    Work,
    arithmetic_rate,
    copy_bandwidth,
    cost_of,
    cycle_work,
    experts,
    floor,
    floors,
    target_work,
)
from eagle_lab.models.pair import shape_pair


@pytest.fixture(scope="module")
def pair():
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu")


# by hand, from tests/golden/*/config.json: hidden 64, intermediate 160, 4 heads and 2 key/value heads of 16, 8 layers,
# vocabulary 512 untied; the head one layer of the same sizes on 2 x 64 inputs, draft vocabulary 256; float32
FLOAT = 4
LAYER = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 160  # q, k, v, o, and the three of the MLP
LAYER_NORMS = 2 * 64
OUT = 512 * 64
HEAD_LAYER = 128 * 64 + 128 * 32 + 128 * 32 + 64 * 64 + 3 * 64 * 160  # q, k, v read twice the hidden size
HEAD_NORMS = 3 * 64
HEAD_OUT = 256 * 64
SLOT = 2 * 2 * 16  # a key and a value of two heads of 16


def test_the_targets_forward_against_a_count_by_hand(pair):
    rows, prefix = 8, 40
    weights = 8 * (LAYER + LAYER_NORMS) + 64 + OUT  # the last norm; of the embeddings only the tokens' rows
    cache = 8 * SLOT * (prefix + rows + rows)  # all are read, the new ones written before
    found = target_work(pair, rows, prefix)
    assert found.bytes == FLOAT * (weights + cache + rows * 64)
    assert found.flops == 2 * rows * (8 * LAYER + OUT) + 8 * 4 * rows * (prefix + rows) * 4 * 16


def test_a_quantized_target_is_read_in_its_bytes():
    cpu = torch.device("cpu")
    whole, pair = (shape_pair("tiny", cpu, torch.float32, quantization=name) for name in ("", "fp8"))
    one, other = target_work(whole, 8, 40), target_work(pair, 8, 40)
    scales = 8 * (64 + 32 + 32 + 64 + 160 + 160 + 64 + 7)  # and a one of each projection
    assert one.bytes - other.bytes == (FLOAT - 1) * 8 * LAYER - FLOAT * scales
    assert one.flops == other.flops
    assert cycle_work(whole, 4, 3, 7, 40)["draft"] == cycle_work(pair, 4, 3, 7, 40)["draft"]
    found = floor(pair, 4, 3, 7, 40)
    assert found.target_rate > 0 and floor(whole, 4, 3, 7, 40).target_rate is None
    target = found.parts["target"]
    assert target.arithmetic_s == pytest.approx(other.flops / found.target_rate, rel=0.2)


def test_a_head_in_8_bits_is_read_in_its_bytes(pair):
    whole = cycle_work(pair, 4, 3, 7, 40)
    with asked(pair, parse("head=fp8")):
        half = cycle_work(pair, 4, 3, 7, 40)
    assert cycle_work(pair, 4, 3, 7, 40) == whole and half["target"] == whole["target"]
    # a scale of each output instead, and a one of the projection
    assert whole["select"].bytes - half["select"].bytes == (FLOAT - 1) * HEAD_OUT - FLOAT * 257
    scales = 64 + 32 + 32 + 64 + 160 + 160 + 64 + 7
    fed = (FLOAT - 1) * (HEAD_LAYER + 3 * 64 * 64) - FLOAT * (scales + 65)
    assert whole["commit"].bytes - half["commit"].bytes == fed
    assert [work.flops for work in half.values()] == [work.flops for work in whole.values()]


def test_a_cycle_against_a_count_by_hand(pair):
    top_k, depth, nodes, prefix = 4, 3, 8, 40
    found = cycle_work(pair, top_k, depth, nodes - 1, prefix)
    logits = HEAD_OUT + 64
    assert found["select"].bytes == FLOAT * logits
    draft = sum(
        HEAD_LAYER + HEAD_NORMS + SLOT * (prefix + step * top_k + top_k) + top_k * 64 + logits
        for step in (1, 2, 3)  # step s sees the prefix and s levels, and writes one
    )
    assert found["draft"].bytes == FLOAT * draft
    path = depth + 2
    moved = 8 * SLOT * path * 2  # read and written
    fed = 3 * 64 * 64 + HEAD_LAYER + HEAD_NORMS + SLOT * (prefix + path + path) + path * 64
    assert found["commit"].bytes == FLOAT * (moved + fed)
    assert found["target"] == target_work(pair, nodes, prefix)
    # the head's layer and output matrix are read depth + 1 times in a cycle, the target once
    once = cycle_work(pair, top_k, depth - 1, nodes - 1, prefix)
    more = sum(w.bytes for w in found.values()) - sum(w.bytes for w in once.values())
    assert more > FLOAT * (HEAD_LAYER + HEAD_OUT)


def test_counts_grow_with_the_prefix_by_its_keys_and_values_only(pair):
    near, far = (target_work(pair, 8, prefix) for prefix in (40, 140))
    assert far.bytes - near.bytes == FLOAT * 8 * SLOT * 100


def test_a_cycle_grows_with_the_prefix_by_the_keys_and_values_of_target_and_head(pair):
    """The target reads its eight layers' once, the head its one at each drafting step and once as it is fed."""
    near, far = (cycle_work(pair, 4, 3, 7, prefix) for prefix in (1024, 32768))
    more = {stage: (far[stage].bytes - near[stage].bytes) / (FLOAT * SLOT * (32768 - 1024)) for stage in near}
    assert more == {"select": 0, "draft": 3, "target": 8, "commit": 1}
    flops = {stage: (far[stage].flops - near[stage].flops) / (4 * 4 * 16 * (32768 - 1024)) for stage in near}
    assert flops == {"select": 0, "draft": 3 * 4, "target": 8 * 8, "commit": 5}  # by rows


def test_floors_of_several_prefixes_have_the_same_rates(pair, monkeypatch):
    monkeypatch.setattr("eagle_lab.measure.floor.copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("eagle_lab.measure.floor.arithmetic_rate", lambda device, dtype: 1e15)
    near, far = floors(pair, 4, 3, 7, [40, 140])
    assert (near.prefix, far.prefix, near.bandwidth, far.rate) == (40, 140, 1e9, 1e15)
    assert far.cycle - near.cycle == pytest.approx(FLOAT * SLOT * (8 + 3 + 1) * 100 / 1e9)
    assert floor(pair, 4, 3, 7, 140) == far


def test_tied_embeddings_are_read_once_as_the_output_matrix(pair):
    table = pair.target.get_input_embeddings()
    out, kept = pair.target.get_output_embeddings(), pair.target.get_output_embeddings().weight
    untied = target_work(pair, 8, 40)
    try:
        out.weight = table.weight
        assert target_work(pair, 8, 40) == untied
    finally:
        out.weight = kept


def test_the_floor_is_the_longer_of_memory_and_arithmetic():
    assert cost_of(Work(1000, 10), 100, 10).seconds == 10
    assert cost_of(Work(100, 1000), 100, 10).seconds == 100
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_a_mixture_of_experts_has_no_floor():
    sparse = SimpleNamespace(config=SimpleNamespace(num_local_experts=4))
    assert experts(sparse) == floor(sparse, 4, 3, 7, 40) == Experts(setting="num_local_experts", experts=4)
    with pytest.raises(ValueError, match="num_local_experts=4"):
        target_work(sparse, 8, 40)


def test_rates_are_plausible_and_repeat():
    rates = [copy_bandwidth("cpu", megabytes=16, repeats=4) for _ in range(2)]
    assert all(1e8 < rate < 1e13 for rate in rates)
    assert max(rates) / min(rates) < 10
    assert 1e7 < arithmetic_rate("cpu", torch.float32, size=128, repeats=4) < 1e14


def test_the_floor_of_this_machine_adds_up(pair):
    found = floor(pair, 4, 3, 7, 40)
    stages = [part for name, part in found.parts.items() if name not in ("cycle", "plain token")]
    assert found.cycle == pytest.approx(sum(part.seconds for part in stages))
    assert found.parts["cycle"].bytes == sum(part.bytes for part in stages)
    assert all(part.seconds == max(part.memory_s, part.arithmetic_s) for part in stages)
