"""The sweep survives what fails in it, goes on where it stopped, and takes any two strategies into whole decodes."""

from __future__ import annotations

import pytest
import torch
from make import LAWS, SWEPT, make_sweep

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.measure import recorded_trees as trees
from eagle_lab.measure.records import read
from eagle_lab.studies import sweep as module
from eagle_lab.studies.sweep import SweepRecord, alone, best_candidate, candidates, in_decodes, sweep


@pytest.fixture(scope="module")
def small_trees(tiny_pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("trees") / "tiny.npz"
    return trees.record(
        tiny_pair, [[1, 5, 9, 20], [7, 7, 2]], path, cycles=2, expansions={(4, 3): (7, 15, 31)}
    )


@pytest.fixture(autouse=True)
def no_bandwidth_run(monkeypatch):
    monkeypatch.setattr(module, "copy_bandwidth", lambda device, repeats: 1e10)


@pytest.fixture
def options(small_trees, tmp_path):
    return {
        "path": tmp_path / "sweep.json", "sizes": (7, 15, 31), "batches": (1,), "batch_size": 7, "iterations": 6,
        "trees": 4, "trees_path": small_trees, "progress": list,
    }  # fmt: skip


@pytest.fixture
def builders(monkeypatch):
    """Builders that fail, each in its own way."""

    def broken(parents):
        raise RuntimeError("boom\nsecond line")

    def greedy(parents):
        if parents.shape[0] > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rebuild(parents)

    def wrong(parents):
        mask = rebuild(parents)
        mask[-1, 0] = False
        return mask

    own = {"broken": broken, "greedy": greedy, "wrong": wrong}
    for name, build in own.items():
        monkeypatch.setitem(MASK_BUILDERS, name, build)
    return ["rebuild", "bitpacked", *own]


def test_a_failing_cell_says_why_and_the_rest_is_measured(options, builders):
    record = sweep("cpu", builders=[*builders, "cuda"], **options)
    assert len(record.cells) == 18 and record.finished and record == read(options["path"], SweepRecord)
    why = {c.builder: (c.missing.reason, c.missing.error) for c in record.cells if c.missing}
    assert why == {
        "broken": ("failed", "RuntimeError: boom"),
        "greedy": ("failed", "OutOfMemoryError: CUDA out of memory"),
        "wrong": ("wrong", None),
        "cuda": ("unavailable", "mask=cuda needs a CUDA GPU, but the device is cpu"),
    }
    assert record.cell("greedy", 7).seconds and not record.cell("greedy", 15).seconds
    for size in (7, 15, 31):
        one = record.cell("bitpacked", size)
        assert len(one.seconds) == len(one.baseline_s) == 6 and min(one.seconds) > 0
        assert one.peak_bytes >= (size + 1) ** 2


def test_an_interrupted_sweep_goes_on_where_it_stopped(options, monkeypatch):
    real, done = module.measure_cell, []

    def stops(name, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return real(name, *rest)

    monkeypatch.setattr(module, "measure_cell", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep("cpu", builders=["rebuild", "bitpacked"], **options)
    half = read(options["path"], SweepRecord)
    assert len(half.cells) == 3 and half.finished is None
    monkeypatch.setattr(module, "measure_cell", real)
    whole = sweep("cpu", builders=["rebuild", "bitpacked"], **options)
    assert len(whole.cells) == 6 and whole.created == half.created
    assert whole.cells[:3] == half.cells


def test_other_settings_or_a_finished_record_start_anew(options):
    first = sweep("cpu", builders=["rebuild"], **options)
    again = sweep("cpu", builders=["rebuild"], **options)
    assert again.samples("rebuild", 7) != first.samples("rebuild", 7)
    assert sweep("cpu", builders=["rebuild"], **{**options, "seed": 1}).settings.seed == 1


def test_batches_are_measured_at_their_one_size(options):
    record = sweep("cpu", builders=["walk"], **{**options, "batches": (1, 3)})
    assert [(c.size, c.batch) for c in record.cells] == [(7, 1), (15, 1), (31, 1), (7, 3)]


def test_bad_settings_are_refused_before_any_work(options):
    with pytest.raises(ValueError, match="mask builder 'walkk' is unknown"):
        sweep("cpu", builders=["walkk"], **options)
    assert module.chosen("walk, doubling") == ["walk", "doubling"] and module.chosen(None) == [*MASK_BUILDERS]
    with pytest.raises(ValueError, match="needs at least 6"):
        sweep("cpu", **{**options, "iterations": 3})
    with pytest.raises(ValueError, match="no recorded trees of 8 tokens"):
        sweep("cpu", **{**options, "sizes": (8,)})
    assert not options["path"].exists()


@pytest.mark.parametrize(
    ("baseline", "candidate", "builder"),
    [
        ("rebuild", "walk", "walk"),
        ("rebuild", "rebuild", "rebuild"),
        ("attention=tree", "mask=walk,attention=tree", "walk"),
        ("rebuild", "walk,attention=tree", None),
        ("attention=tree", "walk", None),
        ("doubling", "walk", None),  # a sweep holds builders against `rebuild` only
    ],
)
def test_which_builder_stands_alone_beside_two_strategies(baseline, candidate, builder):
    assert alone(baseline, candidate) == builder


def test_the_best_candidate_keeps_the_baselines_other_choices_and_goes_with_them():
    laws = {"rebuild": LAWS["rebuild"], "walk": LAWS["flat"], "bitpacked": LAWS["walk"]}
    record = make_sweep(laws)
    assert best_candidate(record, "rebuild", 60, "cpu") == "bitpacked"
    assert best_candidate(record, "walk,attention=tree", 63, "cpu") == "bitpacked,attention=tree"
    # the fastest one reads values on the host, which a runtime with fixed shapes does not let it do
    assert candidates("walk,runtime=compile", None, [*laws], "cpu") == ["walk,runtime=compile"]
    assert best_candidate(record, "walk,runtime=compile", 63, "cpu") == "walk,runtime=compile"
    none = make_sweep(laws, gaps=[(name, size) for name in laws for size in SWEPT])
    with pytest.raises(ValueError, match="no builder with a time at 63 nodes that goes with rebuild on cpu"):
        best_candidate(none, "rebuild", 64, "cpu")


@pytest.mark.parametrize(
    ("baseline", "candidate", "words"),
    [
        ("wallk", None, "'wallk' is unknown"),
        ("rebuild", "cuda", "mask=cuda needs a CUDA GPU"),
        ("rebuild", None, "none of cuda can build the mask of rebuild on cpu; name a candidate"),
    ],
)
def test_strategies_of_whole_decodes_are_refused_before_the_sweep(baseline, candidate, words):
    assert candidates("attention=tree", "walk,attention=tree", ["cuda"], "cpu") == ["walk,attention=tree"]
    with pytest.raises(ValueError, match=words):
        candidates(baseline, candidate, ["cuda"], "cpu")


def test_whole_decodes_take_the_best_builder_or_any_two_strategies(tiny_pair, monkeypatch):
    asked = []

    class Done:
        record = "the record"

    monkeypatch.setattr(module, "compare", lambda pair, **options: asked.append(options) or Done)
    record = make_sweep({"rebuild": LAWS["rebuild"], "walk": LAWS["walk"]})
    assert in_decodes(record, tiny_pair, iterations=8) == "the record"
    in_decodes(record, tiny_pair, baseline="cache=concat", candidate="walk,attention=tree", nodes=16)
    assert asked == [
        {"baseline": "rebuild", "candidate": "walk", "total_tokens": 63, "iterations": 8},
        {"baseline": "cache=concat", "candidate": "walk,attention=tree", "total_tokens": 16},
    ]
