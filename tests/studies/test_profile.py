"""A profile adds up, finds a planted delay in the right stage at the right size, and keeps what its figures rest on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from make import GOLDEN, needs_gpu

from eagle_lab import load
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.measure.environment import Environment
from eagle_lab.measure.records import RESULTS, committed, made, read, record_path, write
from eagle_lab.measure.spans import Delayed, SpanRecord, device_spin
from eagle_lab.models.prompts import Prompt
from eagle_lab.report import profile as report
from eagle_lab.report.charts import profile as charts
from eagle_lab.runtime import prepare as runtime
from eagle_lab.studies import profile as profiling
from eagle_lab.studies import record as records
from eagle_lab.studies.breakdown import (
    acceptance,
    bound,
    closes,
    disagreement,
    gain,
    over_floor,
    stage,
    stages,
    whole_seconds,
)
from eagle_lab.studies.operators import Operators, operators, own_times
from eagle_lab.studies.profile import (
    Decode,
    DelayedPair,
    Prefill,
    ProfileRecord,
    ProfileSettings,
    WhatIf,
    cut,
    cycle_times,
    get_prompts,
    profile,
    profile_beside,
    stated_acceptance,
    stated_by_nodes,
)
from eagle_lab.studies.whatif import PARTS, REPLAYED, Meaning, check_whatif, effect, slope, stages_of, whatif
from eagle_lab.train.make_draft import TrainingRecord

ENVIRONMENT = Environment.model_validate({
    "platform": "Linux", "python": "3.12", "versions": {}, "commit": None, "dirty": None,
    "cpu": {"name": "x", "cores": 1, "governor": None, "load_1min": 0, "torch_threads": 1, "memory_bytes": 1},
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 1, "multiprocessors": 1, "cuda": None},
})  # fmt: skip
PROMPTS = [Prompt("a", "test", "", tuple(range(5, 25)))]
SMALL = Decoding.of(12, top_k=4, depth=3, total_tokens=7)
ONCE = ("prefill", "set-up")  # of a decode, not of a cycle


@pytest.fixture(scope="module")
def pair():
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu")


@pytest.fixture(scope="module")
def record(pair):
    return profile(pair, PROMPTS, SMALL, repeats=2)


def by_name(record):
    return {s.name: s for s in stages(record)}


def busy(**changes):
    """What torch.profiler saw of two cycles."""
    found = {"cycles": 2, "busy_s": 0.003, "kernels": 10, "seconds": 1, "operators_s": 0.5}
    return Operators(prompt="a", top=[], top_kernels=[], **found | changes)


def cells(table):
    """A Markdown table's cells, by the first of each row."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_a_cycle_that_is_one_piece_is_profiled_and_told_as_any_other(tiny_pair, prepared, record, tmp_path):
    """As profile.ipynb does it: every text, table and chart of it can be made from the file."""
    done = records.full_profile(
        tiny_pair, PROMPTS, replace(SMALL, strategy=parse("doubling,runtime=compile")), whatifs=[(None, "host")], iterations=6, delay_ms=2,
        whatif_tokens=4,
    )  # fmt: skip
    write(done, record_path(done, tmp_path))
    (one,) = committed(ProfileRecord, tmp_path).values()
    assert [found.stage for found in one.whatif] == ["replay"]
    rows = by_name(one)
    assert {*rows} - {"rest", *ONCE} == {*REPLAYED} and rows["replay"].calls == 1 and rows["replay"].hot
    assert effect(one, one.whatif[0]).replayed
    for write_out in (
        "answer",
        "clocks",
        "floor",
        "stage_table",
        "clock_table",
        "floor_table",
        "operator_table",
    ):
        assert getattr(report, write_out)(one)
    assert report.delays(one, one.whatif) and report.overview({"x": one})
    for draw in ("shares", "timeline", "two_clocks", "delays", "floor"):
        figure = getattr(charts, draw)(one)
        assert "runtime=compile" in figure.layout.title.text and len(figure.data)
    table = cells(report.beside_table(record, one, ("rebuild", "mask=doubling,runtime=compile")))
    assert table["stage"] == [
        f"{name}, {what}" for name in ("rebuild", "mask=doubling,runtime=compile") for what in ("ms", "share")
    ]
    assert {*table} - {"stage", ":--"} == {*PARTS, *REPLAYED, "rest"} and all(table["to_host"])
    assert table["replay"][:2] == ["", ""] and table["draft"][2:] == ["", ""], "only one of them has it"


def test_another_arm_beside_a_profile(pair, record):
    second = profile_beside(pair, record, "walk,total_tokens=7,depth=3", PROMPTS, modes=("spans",))
    first, other = record.settings, second.settings
    assert (other.strategy, other.total_tokens, other.depth) == ("mask=walk", 7, 3)
    assert (other.top_k, other.max_new_tokens, other.prompts) == (
        first.top_k,
        first.max_new_tokens,
        first.prompts,
    )
    table = cells(report.beside_table(record, second, ("rebuild", "walk,total_tokens=7")))
    assert table["stage"][2] == "walk,total_tokens=7, ms" and all(table["draft"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain", "'plain' can't be profiled"),
        ("code=main", "only greedy cycles of this kit's decoder"),
        ("temperature=1", "can't be profiled"),
        ("rebuild", "the same as the first arm"),
        ("top_k=2000", "vocabulary"),
    ],
)  # fmt: skip
def test_an_arm_without_stages_is_refused(pair, record, text, words):
    with pytest.raises(ValueError, match=words):
        profile_beside(pair, record, text, PROMPTS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"strategy": "doubling,runtime=compile", "whatifs": [("draft", "host")]}, "its stages are replay, to_host"),
        ({"whatifs": [("replay", "host")]}, "'replay' is not in a cycle of rebuild; its stages are select, draft,"),
        ({"whatifs": [("draft", "device")]}, "needs a CUDA GPU"),
        ({"whatifs": [(None, "host"), ("draft", "cloud")]}, "'host' or 'device'"),
        ({"whatifs": [(None, "host")], "iterations": 5}, "at least 6"),
        ({"whatifs": [(None, "host")], "delay_ms": -1.0}, "0 or more"),
    ],
)  # fmt: skip
def test_a_what_if_that_cannot_be_is_refused_before_anything_is_measured(pair, monkeypatch, wrong, words):
    monkeypatch.setattr(records, "profile", lambda *args, **settings: pytest.fail("measured"))
    with pytest.raises(ValueError, match=words):
        decoding = replace(SMALL, strategy=parse(wrong.pop("strategy", "rebuild")))
        records.full_profile(pair, PROMPTS, decoding, **wrong)


def test_the_stages_that_a_strategy_has(pair, record):
    assert tuple(name for name in by_name(record) if name not in ("rest", *ONCE)) == PARTS
    for name in runtime.RUNTIMES:
        assert stages_of(f"doubling,runtime={name}") == (PARTS if name == "eager" else REPLAYED)
    assert check_whatif(pair, "rebuild", None, "host") == "draft"
    assert check_whatif(pair, "doubling,runtime=cuda_graph", None, "host") == "replay"
    assert check_whatif(pair, "rebuild", "commit", "host") == "commit"


def test_stages_and_rest_make_the_cycle_and_the_cycles_the_decode(pair):
    # the published tree: around a smaller one, the tiny pair's cycle is too short to hide the bookkeeping in 3%
    record = profile(pair, PROMPTS, Decoding.of(16), modes=("spans",), floors=False)
    rows = by_name(record)
    assert set(rows) == {*PARTS, "rest", *ONCE}
    assert sum(s.share for s in rows.values() if s.name not in ONCE) == pytest.approx(1)
    assert sum(s.whole for s in rows.values()) == pytest.approx(1)
    found = closes(record)
    assert found.good and 0 <= found.rest < 0.03 and 0 <= found.beyond < 0.03
    assert rows["draft"].calls == 7
    assert all(s.device_s is None for s in rows.values())


def test_what_no_stage_covers_is_seen(record):
    def halved(cycle):
        return cycle.model_copy(update={"host": cycle.host | {"target": cycle.host["target"] / 2}})

    decodes = [d.model_copy(update={"cycles": [halved(c) for c in d.cycles]}) for d in record.decodes]
    found = closes(record.model_copy(update={"decodes": decodes}))
    assert not found.good and found.rest > 0.03


@pytest.fixture
def planted(monkeypatch):
    """`plant()` makes the stage "accept" of each decode that follows 20 ms longer a call; → those delays."""
    real, made = profiling.decode, []

    def plant(*wait):
        def slow(*args, span, **options):
            made.append(Delayed(span, "accept", 20_000_000, *wait))
            return real(*args, span=made[-1], **options)

        monkeypatch.setattr(profiling, "decode", slow)
        return made

    return plant


def test_a_planted_delay_is_found_in_its_stage_at_its_size(pair, record, planted):
    delays = planted()
    slow = profile(pair, PROMPTS, SMALL, repeats=2, modes=("spans",), floors=False)
    before, after = by_name(record), by_name(slow)
    grew = {name: after[name].host_s - before[name].host_s for name in before if name not in ONCE}
    assert max(grew, key=grew.get) == "accept"
    # a spin on a busy machine overshoots; what it really was is what must be found
    real = sum(d.waited for d in delays) / sum(d.calls for d in delays) / 1e9
    assert real >= 0.020
    assert grew["accept"] == pytest.approx(real, rel=0.25)
    assert after["accept"].hot and not before["accept"].hot


def test_a_delay_of_a_host_without_a_device_has_slope_one(pair, record):
    found = whatif(pair, PROMPTS, record, stage="accept", delay_ms=40, iterations=6, max_new_tokens=6)
    assert [round(s.delay_s, 4) for s in found.samples] == [0.04, 0.08] * 3
    assert all(s.waited_s >= s.delay_s * s.calls for s in found.samples)
    low, at, high = slope(found)
    assert low <= at <= high
    assert at == pytest.approx(1, abs=0.25)


def fake(slopes, stage="target", where="host"):
    samples = [
        DelayedPair(prompt="a", delay_s=0.1, calls=1, waited_s=0.1, baseline_s=1.0, delayed_s=1.0 + 0.1 * k)
        for k in slopes
    ]
    return WhatIf(stage=stage, where=where, max_new_tokens=1, seed=0, samples=samples)


NEAR = (0.9, 1.0, 1.1, 1.0, 0.95, 1.05, 1.0)
HALF = (0.30, 0.31, 0.29, 0.30, 0.32, 0.28, 0.30)
TWICE = (2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0)
WIDE = (0.1, 1.0, 2.4, 1.0, 0.2, 2.2, 1.0, 0.9)


@pytest.mark.parametrize(
    ("slopes", "where", "meaning"),
    [
        (HALF, "host", Meaning.COVERED),
        (NEAR, "host", Meaning.CRITICAL),
        (TWICE, "host", Meaning.DISTURBS),
        ((0.93, 0.95, 0.94, 0.92, 0.96, 0.95, 0.94), "host", Meaning.NEARLY_ALL),
        (WIDE, "host", Meaning.UNCLEAR),
        (NEAR[:5], "host", Meaning.UNCLEAR),  # too few for an interval
        (WIDE, "device", Meaning.UNCLEAR),
        (HALF, "device", Meaning.DEVICE_WAITS),
        (NEAR, "device", Meaning.DEVICE_CRITICAL),
    ],
)
def test_which_of_share_and_slope_to_believe(record, slopes, where, meaning):
    found = effect(record, fake(slopes, where=where))
    assert found.meaning == meaning
    assert found.bound[1] == pytest.approx(gain(max(0.0, found.slope[1]) * found.stage.whole))


def test_what_a_delay_means_in_a_cycle_that_is_one_piece(snapshot):
    """On a GPU the device does its cycle while the host waits, which says nothing of the cycle's own length."""
    made = on_a_device([replace(s, name="replay") if s.name == "draft" else s for s in device_spans()])
    assert effect(made, fake(HALF, "replay")).meaning == Meaning.HOST_IDLE
    assert effect(made, fake(HALF, "replay", "device")).meaning == Meaning.COVERED
    unbounded = effect(made, fake(TWICE, "replay"))
    assert unbounded.bound[0] == math.inf, "it grows by more than its delay and is most of the decode"
    told = [
        fake(slopes, "replay", where)
        for slopes in (HALF, NEAR, TWICE, WIDE, (0.93, 0.95, 0.94, 0.92, 0.96, 0.95, 0.94))
        for where in ("host", "device")
    ]
    text = report.delays(made, told)
    snapshot(text, "whatif.md")
    assert text.count("a delay costs more than its own length") == 1  # of both delays one after the other


def test_amdahl():
    assert gain(0.5) == 1
    assert gain(0) == 0
    assert gain(1) == math.inf


def test_both_clocks_name_the_same_stages_and_every_mode_was_taken(record):
    names = [name for name, _, _ in disagreement(record)]
    assert names[-1] == "cycle" and "target" in names
    assert {d.mode for d in record.decodes} == {"off", "spans", "synchronised"}


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
    first, cycles = cut(spans)
    times = [cycle_times(c, before) for c, before in zip(cycles, [first, cycles[0][-1]], strict=True)]
    settings = ProfileSettings(
        target="shape:x", draft="shape:x", device="cuda", dtype="bfloat16", strategy="rebuild", top_k=10, depth=7,
        total_tokens=63, prompts=["a"], max_new_tokens=6, repeats=1, seed=0, stated_acceptance=3.0,
    )  # fmt: skip
    common = {"prompt": "a", "seconds": 0.02, "tokens": 6, "prefixes": [1, 4], "committed": [3, 3]}
    timed = {"setup_s": 0.0, "prefill": Prefill(host=0.002, device=0.003), "cycles": times}
    decodes = [Decode(mode=mode, **common, **timed) for mode in ("spans", "synchronised")]
    return ProfileRecord(
        **made() | {"environment": ENVIRONMENT}, settings=settings, timeline=[],
        decodes=[*decodes, Decode(mode="off", **common)],
    )  # fmt: skip


def test_on_a_device_its_own_clock_counts(snapshot):
    made = on_a_device(device_spans())
    found = made.decodes[0].cycles
    assert [c.host_s for c in found] == pytest.approx([0.009, 0.008])
    assert [c.device_s for c in found] == pytest.approx([0.007, 0.008])
    rows = by_name(made)
    # the host waits in to_host for the draft; the device's clock says that the draft is what takes the time
    assert rows["draft"].share == pytest.approx(12 / 15) and rows["to_host"].share == pytest.approx(3 / 15)
    assert whole_seconds(made) == pytest.approx((0.003 + 2 * 0.0075, 2))  # six tokens at three a cycle
    made.operators = busy()
    assert (bound(made).by, bound(made).busy, bound(made).kernels) == ("host", pytest.approx(0.2), 5)
    told = [
        report.title(made), report.answer(made), report.clocks(made), report.floor(made),
        report.stage_table(made),
    ]  # fmt: skip
    snapshot("\n\n".join(told), "profile.md")
    made.operators = busy(busy_s=0.0145)
    assert bound(made).by == "device"
    assert record_path(made).name == "profile-h100-x.json"


def test_spans_that_are_no_decode_are_refused():
    with pytest.raises(ValueError, match="'prefill' first"):
        cut(device_spans()[1:])
    with pytest.raises(ValueError, match="'to_host'"):
        cut(device_spans()[:2])


def test_smaller_trees_are_stated_in_the_proportion_of_the_shipped_head_s_drafts():
    measured = read(RESULTS / "train-h100.json", TrainingRecord).acceptance
    sizes, how = measured.by_tree_size, measured.settings
    assert TreeShape(how.top_k, how.depth, how.total_tokens) == TREES[63]
    found = stated_by_nodes(3.0)
    assert found[63] == 3 and set(found) == set(sizes)
    for nodes, tau in sizes.items():
        assert (found[nodes] - 1) / 2 == pytest.approx((tau - 1) / (sizes[63] - 1), abs=0.005)


def test_acceptance_is_measured_or_stated_and_said(pair, record):
    assert stated_acceptance(pair) is stated_acceptance(pair, "measured") is None
    assert stated_acceptance(pair, "stated 3.5") == 3.5
    for wrong in (
        "stated",
        "stated 0.5",
        "stated x",
        "guessed 3",
        "measured 3",
        "stated nan",
        "stated 1.2.3",
    ):
        with pytest.raises(ValueError, match="use 'measured', or 'stated 3.0'"):
            stated_acceptance(pair, wrong)
    counts = [n for d in record.decodes if d.mode == "spans" for n in d.committed]
    assert acceptance(record) == pytest.approx(sum(counts) / len(counts))
    shape = replace(pair, target_name="shape:llama-3.1-8b")
    assert stated_acceptance(shape) == 3.0
    with pytest.raises(ValueError, match="random weights"):
        stated_acceptance(shape, "measured")
    told = profile(pair, PROMPTS, SMALL, acceptance="stated 2.5", modes=("spans",), floors=False)
    assert acceptance(told) == 2.5
    assert whole_seconds(told)[1] == pytest.approx(12 / 2.5)


def test_prompts_without_a_tokenizer_are_random_ids_and_named_so(pair):
    drawn = get_prompts(pair, 2)
    assert [p.id for p in drawn] == ["random-0", "random-1"] and drawn == get_prompts(pair, 2)
    assert all(len(p.ids) == 64 and 10 <= min(p.ids) <= max(p.ids) < 512 for p in drawn)
    with pytest.raises(ValueError, match="at least one prompt"):
        profile(pair, [], SMALL)
    with pytest.raises(ValueError, match="no token ids"):
        profile(pair, [Prompt("a", "c", "words")], SMALL)


def test_operators_and_a_trace_that_can_be_opened(pair, record, tmp_path):
    found = operators(pair, PROMPTS[0], SMALL, cycles=2, trace=tmp_path / "t.json")
    assert any("mm" in row.name for row in found.top)
    assert 0 < found.operators_s <= found.seconds
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    profiled = record.model_copy(update={"operators": found})
    assert bound(profiled).by == "cpu" and bound(profiled).busy == found.operators_s / found.seconds
    assert bound(record) is None


def test_a_kernel_s_own_time_is_what_it_adds():
    assert own_times([(5, 15), (0, 10), (20, 30), (21, 22), (30, 31)]) == [5, 10, 10, 0, 1]
    assert own_times([]) == []


def test_the_record_alone_is_enough(record, tmp_path):
    write(record, tmp_path / "profile-cpu-x.json")
    again = read(tmp_path / "profile-cpu-x.json", ProfileRecord)
    assert again == record and stages(again)[:-2] == stages(record)[:-2]
    assert over_floor(again) == over_floor(record)
    text = (tmp_path / "profile-cpu-x.json").read_text()
    assert str(GOLDEN.parent) not in text  # a record doesn't tell where on a disk it was made


def test_the_committed_profiles_can_be_told():
    for record in committed(ProfileRecord).values():
        assert closes(record).good and report.section(record)
        assert stage(record, "tree_mask").share < 0.02


@needs_gpu
def test_on_a_gpu_stages_add_up_and_a_device_delay_is_found(planted):
    # in a tiny target the recording itself takes more than the 3% that may be left over
    gpu = load("shape:smollm2-135m", device="cuda")
    plain = profile(gpu, PROMPTS, SMALL, repeats=2)
    assert closes(plain).good
    planted(device_spin("cuda"))
    slow = profile(gpu, PROMPTS, SMALL, repeats=2, modes=("spans",), floors=False)
    grew = {n: by_name(slow)[n].device_s - s.device_s for n, s in by_name(plain).items() if n not in ONCE}
    assert max(grew, key=grew.get) == "accept" and grew["accept"] == pytest.approx(0.020, rel=0.15)
