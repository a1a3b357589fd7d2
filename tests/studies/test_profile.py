"""A profile adds up, finds a planted delay in the right stage at the right size, and says what its figures rest on."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eagle_lab import load
from eagle_lab.measure.old_records import read, write
from eagle_lab.models.prompts import Prompt
from eagle_lab.report import profile as profile_report
from eagle_lab.report.charts import profile as charts_profile
from eagle_lab.report.profile import beside_table, check_strategies
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime.clock import Delayed, SpanRecord
from eagle_lab.studies import machine_records as machines
from eagle_lab.studies.breakdown import (
    acceptance,
    bound,
    closes,
    disagreement,
    gain,
    over_floor,
    stages,
    title,
    whole_seconds,
)
from eagle_lab.studies.operators import operators, own_times
from eagle_lab.studies.profile import check_acceptance, cut, parse_acceptance, profile, profile_prompts
from eagle_lab.studies.whatif import (
    PARTS,
    REPLAYED,
    check_whatif,
    measured_bound,
    sentence,
    slope,
    stages_of,
    whatif,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = [Prompt("a", "test", "", tuple(range(5, 25)))]
SMALL = {"top_k": 4, "depth": 3, "total_tokens": 7, "max_new_tokens": 12}
ONCE = ("prefill", "set-up")  # of a decode, not of a cycle
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(scope="module")
def pair():
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu")


@pytest.fixture(scope="module")
def record(pair):
    return profile(pair, PROMPTS, repeats=2, **SMALL)


def by_name(record):
    return {s.name: s for s in stages(record)}


def test_two_profiles_stand_side_by_side(pair, record):
    """Stage by stage; what only one of them has is empty in the other's columns."""
    other = profile(pair, PROMPTS, floors=False, strategy="doubling", **SMALL)
    for decode in other["decodes"]:
        for cycle in decode.get("cycles", []):
            for kind in ("calls", "host"):
                cycle[kind]["replay"] = cycle[kind].pop("commit")
    table = beside_table(record, other)
    assert list(table.columns) == ["rebuild, ms", "rebuild, share", "doubling, ms", "doubling, share"]
    drafts = by_name(record)["draft"], by_name(other)["draft"]
    assert [float(table.loc["draft", f"{s}, ms"]) for s in ("rebuild", "doubling")] == pytest.approx(
        [s.host_s * 1e3 for s in drafts], abs=1e-3
    )
    assert table.loc["replay", "rebuild, ms"] == "" and table.loc["commit", "doubling, share"] == ""
    with pytest.raises(ValueError, match="both profiles are of rebuild"):
        beside_table(record, record)


def test_a_strategy_is_not_put_beside_itself():
    check_strategies("rebuild", None, "cpu")
    check_strategies("doubling", "doubling,attention=tree", "cpu")
    for same in ("doubling", "mask=doubling", "doubling,runtime=eager"):
        with pytest.raises(ValueError, match=f"beside is '{same}', which is the strategy 'doubling' itself"):
            check_strategies("doubling", same, "cpu")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        check_strategies("doubling", "doubling,attention=tree_fused", "cpu")


def test_a_cycle_that_is_one_piece_is_profiled_and_told_as_any_other(tiny_pair, prepared, record, tmp_path):
    """As profile.ipynb does it with its own defaults: every text, table and chart of it can be made from the file."""
    made = machines.full_profile(
        tiny_pair, PROMPTS, strategy="doubling,runtime=compile", whatifs=[(None, "host")], iterations=6, delay_ms=2,
        whatif_tokens=4, **SMALL,
    )  # fmt: skip
    write(made, tmp_path / "profile-cpu-x.json")
    one = read(tmp_path / "profile-cpu-x.json")
    assert [found["stage"] for found in one["whatif"]] == ["replay"]
    rows = by_name(one)
    assert {*rows} - {"rest", *ONCE} == {*REPLAYED} and rows["replay"].calls == 1 and rows["replay"].hot
    words = sentence(one, one["whatif"][0])
    assert "delay in replay" in words and "inf%" not in words
    assert "**replay**" in profile_report.answer(one) and "tree mask" not in profile_report.answer(one)
    assert "floor" in profile_report.over(one) and "**" in profile_report.clocks(one)
    assert list(profile_report.stage_table(one).index)[:3] == ["replay", "to_host", "rest"]
    assert list(profile_report.clock_table(one).index) == ["replay", "to_host", "rest", "cycle"]
    assert list(profile_report.floor_table(one).index) == ["cycle"]
    assert len(profile_report.operator_table(one)) and len(profile_report.overview({"x": one})) == 1
    for draw in ("shares", "timeline", "two_clocks", "delays", "floor"):
        figure = getattr(charts_profile, draw)(one)
        assert "runtime=compile" in figure.layout.title.text and len(figure.data)
    for pair_of_records in ((record, one), (one, record)):
        table = beside_table(*pair_of_records)
        assert {*PARTS, *REPLAYED, "rest"} == {*table.index}
        assert table.loc["draft", "doubling,runtime=compile, ms"] == ""
        assert table.loc["replay", "rebuild, share"] == "" and all(table.loc["to_host"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"strategy": "doubling,runtime=compile", "whatifs": [("draft", "host")]}, "its stages are replay, to_host"),
        ({"whatifs": [("replay", "host")]}, "'replay' is not in a cycle of rebuild; its stages are select, draft,"),
        ({"whatifs": [("draft", "device")]}, "needs a CUDA GPU"),
        ({"whatifs": [(None, "host"), ("draft", "cloud")]}, "'host' or 'device'"),
        ({"whatifs": [(None, "host")], "iterations": 5}, "at least 6"),
        ({"whatifs": [(None, "host")], "delay_ms": -1.0}, "0 or more"),
        ({"strategy": "doublin", "whatifs": [(None, "host")]}, "did you mean 'doubling'"),
    ],
)  # fmt: skip
def test_a_what_if_that_cannot_be_is_refused_before_anything_is_measured(pair, monkeypatch, wrong, words):
    monkeypatch.setattr(machines, "profile", lambda *args, **settings: pytest.fail("measured"))
    with pytest.raises(ValueError, match=words):
        machines.full_profile(pair, PROMPTS, **wrong, **SMALL)


def test_the_stages_that_a_strategy_has(pair, record):
    assert tuple(name for name in by_name(record) if name not in ("rest", *ONCE)) == PARTS
    for name in runtime.RUNTIMES:
        assert stages_of(f"doubling,runtime={name}") == (PARTS if name == "eager" else REPLAYED)
    assert check_whatif(pair, "rebuild", None, "host") == "draft"
    assert check_whatif(pair, "doubling,runtime=cuda_graph", None, "host") == "replay"
    assert check_whatif(pair, "rebuild", "commit", "host") == "commit"


def test_stages_and_rest_make_the_cycle_and_the_cycles_the_decode(pair):
    # the published tree: around a smaller one, the tiny pair's cycle is too short to hide the bookkeeping in 3%
    record = profile(pair, PROMPTS, modes=("spans",), floors=False, max_new_tokens=16)
    rows = by_name(record)
    assert set(rows) >= {
        "select",
        "draft",
        "tree_mask",
        "target",
        "accept",
        "commit",
        "to_host",
        "rest",
        "prefill",
    }
    assert sum(s.share for s in rows.values() if s.name not in ONCE) == pytest.approx(1)
    assert sum(s.whole for s in rows.values()) == pytest.approx(1)
    good, rest, beyond, words = closes(record)
    assert good, words
    assert 0 <= rest < 0.03 and 0 <= beyond < 0.03
    assert rows["draft"].calls == 7
    assert all(s.device_s is None for s in rows.values())


def test_a_hole_between_the_stages_is_told(record):
    holed = copy.deepcopy(record)
    for decode in holed["decodes"]:
        for cycle in decode.get("cycles", []):
            cycle["host"]["target"] *= 0.5
    good, rest, _, words = closes(holed)
    assert not good and rest > 0.03 and "NOT" in words


def test_a_planted_delay_is_found_in_its_stage_at_its_size(pair, record):
    planted = []

    def plant(span):
        planted.append(Delayed(span, "accept", 20_000_000))
        return planted[-1]

    slow = profile(pair, PROMPTS, repeats=2, modes=("spans",), floors=False, wrap=plant, **SMALL)
    before, after = by_name(record), by_name(slow)
    grew = {name: after[name].host_s - before[name].host_s for name in before if name not in ONCE}
    assert max(grew, key=grew.get) == "accept"
    # a spin on a busy machine overshoots; what it really was is what must be found
    real = sum(p.waited for p in planted) / sum(p.calls for p in planted) / 1e9
    assert real >= 0.020
    assert grew["accept"] == pytest.approx(real, abs=0.003)
    assert after["accept"].hot and not before["accept"].hot


def test_a_delay_of_a_host_without_a_device_has_slope_one(pair, record):
    found = whatif(pair, PROMPTS, record, stage="accept", delay_ms=40, iterations=6, max_new_tokens=6)
    assert [round(s["delay_s"], 4) for s in found["samples"]] == [0.04, 0.08] * 3
    assert all(s["waited_s"] >= s["delay_s"] * s["calls"] for s in found["samples"])
    low, at, high = slope(found)
    assert low <= at <= high
    assert at == pytest.approx(1, abs=0.25)
    words = sentence(record, found)
    assert "accept" in words and f"{by_name(record)['accept'].whole:.1%}" in words


def fake(record, each):
    samples = [{"baseline_s": 1.0, "delayed_s": 1.0 + 0.1 * k, "waited_s": 0.1} for k in each]
    return {"stage": "target", "where": "host", "samples": samples}


def test_which_of_share_and_slope_to_believe(record):
    hidden = fake(record, [0.30, 0.31, 0.29, 0.30, 0.32, 0.28, 0.30])
    assert "believe the slope" in sentence(record, hidden)
    part = by_name(record)["target"].whole
    assert measured_bound(record, hidden)[1] == pytest.approx(gain(0.3 * part))
    assert measured_bound(record, hidden)[1] < by_name(record)["target"].ceiling
    agreeing = sentence(record, fake(record, [0.9, 1.0, 1.1, 1.0, 0.95, 1.05, 1.0]))
    assert "agrees with the share" in agreeing and "wide" not in agreeing
    wide = fake(record, [0.1, 1.0, 2.4, 1.0, 0.2, 2.2, 1.0, 0.9])
    assert "It is wide" in sentence(record, wide)
    assert "busy share" in sentence(record, {**wide, "where": "device"})
    assert "believe the share" in sentence(record, fake(record, [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0]))
    assert "tells nothing" in sentence(record, fake(record, [-3, 3, 0.5, 4, -2, 1, 0]))


def test_what_a_delay_says_of_a_cycle_that_is_one_piece():
    """On a GPU the device does its cycle while the host waits, which says nothing of the cycle's own length."""
    spans = device_spans()
    made = on_a_device([replace(s, name="replay") if s.name == "draft" else s for s in spans])

    def told(each, **changes):
        return sentence(made, {**fake(made, each), "stage": "replay", **changes})

    hidden = told([0.30, 0.31, 0.29, 0.30, 0.32, 0.28, 0.30])
    assert "believe the share" in hidden and "believe the slope" not in hidden
    assert "fewer kernels might" in told([0.9, 1.0, 1.1, 1.0, 0.95, 1.05, 1.0], where="device")
    # it grows by more than its delay and is most of the decode, so the slope sets no limit: said in words
    assert "by the slope, no limit [no limit, no limit]" in told([2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0])


def test_whatif_refuses_what_it_cannot_do(pair, record):
    with pytest.raises(ValueError, match="its stages are select, draft, tree_mask"):
        whatif(pair, PROMPTS, record, stage="draught")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        whatif(pair, PROMPTS, record, stage="draft", where="device")
    with pytest.raises(ValueError, match="'host' or 'device'"):
        whatif(pair, PROMPTS, record, stage="draft", where="cloud")
    with pytest.raises(ValueError, match="at least 6"):
        whatif(pair, PROMPTS, record, stage="draft", iterations=2)


def test_amdahl():
    assert gain(0.5) == 1
    assert gain(0) == 0
    assert gain(1) == math.inf


def test_both_clocks_name_the_same_stages_and_every_mode_was_taken(record):
    names = [name for name, _, _ in disagreement(record)]
    assert names[-1] == "cycle" and "target" in names
    assert {d["mode"] for d in record["decodes"]} == {"off", "spans", "synchronised"}


def device_spans():
    """A decode of two cycles on a device that runs 1 ms behind: a prefill, then draft and to_host twice."""
    at = [
        ("prefill", 0, 2, 1, 3),
        ("draft", 2, 1, 4, 6),
        ("to_host", 3, 8, 10, 1),
        ("draft", 11, 1, 11, 6),
        ("to_host", 12, 7, 17, 2),
    ]
    return [SpanRecord(n, s * 10**6, h * 10**6, ds * 10**6, d * 10**6) for n, s, h, ds, d in at]


def on_a_device(spans):
    """A profile of one decode with a stated acceptance, from its spans."""
    from eagle_lab.studies.profile import _cycle

    first, cycles = cut(spans)
    found = [_cycle(c, before) for c, before in zip(cycles, [first, cycles[0][-1]], strict=True)]
    return {
        "settings": {
            "stated_acceptance": 3.0,
            "max_new_tokens": 6,
            "target": "shape:x",
            "dtype": "bfloat16",
            "strategy": "rebuild",
        },
        "environment": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}},
        "decodes": [
            {
                "mode": "spans",
                "prompt": "a",
                "seconds": 0.02,
                "setup_s": 0.0,
                "prefill": {"host": 0.002, "device": 0.003},
                "cycles": found,
            }
        ],
    }


def test_on_a_device_its_own_clock_counts():
    made = on_a_device(device_spans())
    found = made["decodes"][0]["cycles"]
    assert [c["host_s"] for c in found] == pytest.approx([0.009, 0.008])
    assert [c["device_s"] for c in found] == pytest.approx([0.007, 0.008])
    rows = by_name(made)
    # the host waits in to_host for the draft; the device's clock says that the draft is what takes the time
    assert rows["draft"].share == pytest.approx(12 / 15) and rows["to_host"].share == pytest.approx(3 / 15)
    assert whole_seconds(made) == pytest.approx((0.003 + 2 * 0.0075, 2))  # six tokens at three a cycle
    assert "stated" in title(made)
    busy = {"cycles": 2, "busy_s": 0.003, "kernels": 10, "seconds": 1, "operators_s": 0.5}
    assert re.search("host-bound.* for the host's next launch", bound({**made, "operators": busy}))
    one = on_a_device([replace(s, name="replay") if s.name == "draft" else s for s in device_spans()])
    assert "it waits between kernels" in bound({**one, "operators": busy})
    assert "device-bound" in bound({**made, "operators": {**busy, "busy_s": 0.0145}})
    assert machines.machine_slug(made["environment"]) == "h100"
    assert machines.place("profile", made).name == "profile-h100-x.json"


def test_spans_that_are_no_decode_are_refused():
    with pytest.raises(ValueError, match="'prefill' first"):
        cut(device_spans()[1:])
    with pytest.raises(ValueError, match="'to_host'"):
        cut(device_spans()[:2])


def test_acceptance_is_measured_or_stated_and_said(pair, record):
    assert parse_acceptance("measured") is None and parse_acceptance("stated 3.5") == 3.5
    for wrong in ("stated", "stated 0.5", "stated x", "guessed 3", "measured 3", "stated nan"):
        with pytest.raises(ValueError, match="use 'measured', or 'stated 3.0'"):
            parse_acceptance(wrong)
    assert "measured in these decodes" in acceptance(record)[1]
    with pytest.raises(ValueError, match="random weights"):
        check_acceptance(replace(pair, target_name="shape:llama-3.1-8b"), "measured")
    told = profile(pair, PROMPTS, acceptance="stated 2.5", modes=("spans",), floors=False, **SMALL)
    assert acceptance(told) == (
        2.5,
        "acceptance length 2.5 is stated, not measured",
    )
    assert "stated, not measured" in title(told)
    assert whole_seconds(told)[1] == pytest.approx(12 / 2.5)


def test_prompts_without_a_tokenizer_are_random_ids_and_named_so(pair):
    drawn = profile_prompts(pair, [Prompt("a", "c", "words"), Prompt("b", "c", "more")], length=9)
    assert [p.id for p in drawn] == ["random-0", "random-1"]
    assert all(len(p.ids) == 9 and max(p.ids) < 512 for p in drawn)
    assert drawn == profile_prompts(pair, [Prompt("a", "c", "words"), Prompt("b", "c", "more")], length=9)
    with pytest.raises(ValueError, match="at least one prompt"):
        profile(pair, [], **SMALL)


def test_operators_and_a_trace_that_can_be_opened(pair, record, tmp_path):
    found = operators(
        pair,
        PROMPTS[0],
        {k: SMALL[k] for k in ("top_k", "depth", "total_tokens")},
        cycles=2,
        trace=tmp_path / "t.json",
    )
    assert any("mm" in row["name"] for row in found["top"])
    assert 0 < found["operators_s"] <= found["seconds"]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "inside torch's operators" in bound({**record, "operators": found})
    assert "wasn't measured" in bound(record)


def test_a_kernel_s_own_time_is_what_it_adds():
    assert own_times([(5, 15), (0, 10), (20, 30), (21, 22), (30, 31)]) == [5, 10, 10, 0, 1]
    assert own_times([]) == []


def test_the_record_alone_is_enough(record, tmp_path):
    write(record, tmp_path / "profile-cpu-x.json")
    again = read(tmp_path / "profile-cpu-x.json")
    assert stages(again)[:-2] == stages(record)[:-2]
    assert over_floor(again) == over_floor(record)
    found, missing = machines.committed("profile", tmp_path)
    assert list(found) == ["cpu-x"] and len(missing) == 3
    assert "on a GPU" in missing[1]
    text = (tmp_path / "profile-cpu-x.json").read_text()
    assert str(GOLDEN.parent) not in text  # a record doesn't tell where on a disk it was made


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_machine_slugs(name, slug):
    assert machines.machine_slug({"gpu": {"name": name}}) == slug


@GPU
def test_on_a_gpu_stages_add_up_and_a_device_delay_is_found():
    # in a tiny target the recording itself takes more than the 3% that may be left over
    gpu = load("shape:smollm2-135m", device="cuda")
    plain = profile(gpu, PROMPTS, repeats=2, acceptance="stated 3.0", **SMALL)
    assert closes(plain)[0]
    from eagle_lab.runtime.clock import device_spin

    wait = device_spin("cuda")
    slow = profile(
        gpu,
        PROMPTS,
        repeats=2,
        modes=("spans",),
        acceptance="stated 3.0",
        floors=False,
        wrap=lambda s: Delayed(s, "accept", 20_000_000, wait),
        **SMALL,
    )
    grew = {n: by_name(slow)[n].device_s - s.device_s for n, s in by_name(plain).items() if n not in ONCE}
    assert max(grew, key=grew.get) == "accept" and grew["accept"] == pytest.approx(0.020, rel=0.15)
