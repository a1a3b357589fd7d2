"""The sweep survives what fails in it, goes on where it stopped, and reports what the samples say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eagle_lab import sweep as module
from eagle_lab import sweep_bars, sweep_report, trees
from eagle_lab.masks import MASK_BUILDERS, rebuild
from eagle_lab.records import read
from eagle_lab.sweep import sweep


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
def builders():
    """Builders that fail, each in its own way; taken out again."""

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
    MASK_BUILDERS.update(own)
    yield ["rebuild", "bitpacked", *own]
    for name in own:
        del MASK_BUILDERS[name]


def test_a_failing_cell_is_a_hole_and_the_rest_is_measured(options, builders):
    record = sweep("cpu", builders=[*builders, "cuda"], **options)
    cells = record["cells"]
    assert len(cells) == 18 and record["finished"]
    assert cells["broken/7/1"] == {"hole": "RuntimeError: boom"}
    assert "seconds" in cells["greedy/7/1"]
    assert cells["greedy/15/1"]["hole"] == "OutOfMemoryError: CUDA out of memory"
    assert cells["wrong/7/1"]["hole"] == "ValueError: wrong differs from rebuild, so it is not timed"
    assert cells["cuda/7/1"]["hole"] == "mask=cuda needs a CUDA device, not cpu"
    for size in (7, 15, 31):
        one = cells[f"bitpacked/{size}/1"]
        assert len(one["seconds"]) == len(one["baseline_s"]) == 6 and min(one["seconds"]) > 0
        assert one["peak_bytes"] >= (size + 1) ** 2
    table = sweep_report.times(record)
    assert table.loc["greedy", 15] == sweep_report.HOLE and table.loc["greedy", 7] != sweep_report.HOLE
    assert "greedy at 15, 31: OutOfMemoryError: CUDA out of memory." in sweep_report.holes(record)


def test_an_interrupted_sweep_goes_on_where_it_stopped(options, builders, monkeypatch):
    real, done = module.measure_cell, []

    def stops(name, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return real(name, *rest)

    monkeypatch.setattr(module, "measure_cell", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep("cpu", builders=["rebuild", "bitpacked"], **options)
    half = read(options["path"])
    assert len(half["cells"]) == 3 and "finished" not in half
    monkeypatch.setattr(module, "measure_cell", real)
    whole = sweep("cpu", builders=["rebuild", "bitpacked"], **options)
    assert len(whole["cells"]) == 6 and whole["created"] == half["created"]
    assert {key: whole["cells"][key] for key in half["cells"]} == half["cells"]


def test_other_settings_or_a_finished_record_start_anew(options):
    first = sweep("cpu", builders=["rebuild"], **options)
    again = sweep("cpu", builders=["rebuild"], **options)
    assert again["cells"]["rebuild/7/1"]["seconds"] != first["cells"]["rebuild/7/1"]["seconds"]
    other = sweep("cpu", builders=["rebuild"], **{**options, "seed": 1})
    assert other["settings"]["seed"] == 1


def test_batches_are_measured_at_their_one_size(options):
    record = sweep("cpu", builders=["walk"], **{**options, "batches": (1, 3)})
    assert set(record["cells"]) == {"walk/7/1", "walk/15/1", "walk/31/1", "walk/7/3"}


def test_bad_settings_are_refused_before_any_work(options):
    with pytest.raises(ValueError, match="mask builder 'walkk' is unknown"):
        sweep("cpu", builders=["walkk"], **options)
    with pytest.raises(ValueError, match="needs at least 6"):
        sweep("cpu", **{**options, "iterations": 3})
    with pytest.raises(ValueError, match="no recorded trees of 8 tokens"):
        sweep("cpu", **{**options, "sizes": (8,)})
    assert not options["path"].exists()


# --- the analysis, on samples whose truth is known ---------------------------------------------

SIZES = [15, 31, 63, 127, 255, 511, 1023]


def made(laws, noise=0.02, device="cpu", holes=(), seed=0):
    """A record whose builders follow `laws`, seconds by size, with log-normal noise."""
    rng = np.random.default_rng(seed)

    def draw(law, size):
        return (law(size) * np.exp(rng.normal(0, noise, 40))).tolist()

    cells = {
        f"{name}/{size}/1": {
            "baseline_s": draw(laws["rebuild"], size),
            "seconds": draw(law, size),
            "peak_bytes": 1,
        }
        for name, law in laws.items()
        for size in SIZES
    }
    cells |= dict.fromkeys(holes, {"hole": "boom"})
    settings = {"builders": list(laws), "sizes": SIZES, "device": device}
    floor = {"call_s": 1e-6, "bytes_per_s": 1e10}
    environment = {
        "gpu": {"name": "A GPU"} if device == "cuda" else None,
        "cpu": {"name": "A CPU", "cores": 2, "torch_threads": 1},
    }
    return {"cells": cells, "settings": settings, "floor": floor, "environment": environment}


LAWS = {
    "rebuild": lambda n: 3e-6 * n,
    "square": lambda n: 3e-6 * n * (n / 200),  # slower from 200 on
    "flat": lambda n: 3e-4,  # faster from 100 on
    "always": lambda n: 1e-6 * n,
    "never": lambda n: 4e-6 * n,
    "same": lambda n: 3e-6 * n,
}


def test_growth_orders_are_recovered_and_their_intervals_cover():
    covered = 0
    for seed in range(40):
        record = made({name: LAWS[name] for name in ("rebuild", "square", "flat")}, seed=seed)
        for name, order in (("rebuild", 1), ("square", 2), ("flat", 0)):
            low, at, high = sweep_report.growth(record, name)
            assert abs(at - order) < 0.02
            covered += low <= order <= high
    assert 105 <= covered <= 119  # of 120 at 95%: 114, give or take
    assert sweep_report.growth(made(LAWS, holes=[f"flat/{s}/1" for s in SIZES[3:]]), "flat") is None


def test_crossovers_are_recovered_with_their_intervals():
    record = made(LAWS)
    flat = sweep_report.crossover(record, "flat")
    assert flat.low < 100 < flat.high and flat.high - flat.low < 10
    assert sweep_report.crossover(record, "always").says == "faster at every size from 15 to 1023"
    assert sweep_report.crossover(record, "never").says == "faster at no size up to 1023"
    assert sweep_report.crossover(record, "square").says == "faster at no size up to 1023"
    # no difference anywhere: the interval has to say that nothing is known
    same = sweep_report.crossover(record, "same")
    assert same.size is not None and same.high == float("inf")


def test_holes_do_not_stop_the_analysis():
    record = made(LAWS, holes=["flat/127/1"])
    assert 80 < sweep_report.crossover(record, "flat").size < 120
    assert sweep_report.speedups(record).loc["flat", 127] == sweep_report.HOLE


def test_the_bars_hold_or_not():
    table = sweep_bars.bars(made(LAWS | {"fast": lambda n: 3e-6 * n / 10}))
    assert table["holds"].tolist() == ["yes", "no"]
    assert float(table["measured"][0].removeprefix("fast: ").split("×")[0]) == pytest.approx(10, rel=0.03)


def test_the_floor_is_a_call_and_the_bytes():
    assert sweep_report.floor_s(made(LAWS), 63) == pytest.approx(1e-6 + (64 * 64 + 8 * 63) / 1e10)


def test_the_guesses_name_what_is_missing():
    text = sweep_bars.guesses(made({"rebuild": LAWS["rebuild"], "incremental": LAWS["never"]}), "this CPU")
    assert "incremental is 1.3" in text and "slower at 511" in text
    assert "cuda has no number at 63 (not measured yet)" in text


def test_the_charts_leave_out_what_is_not_there():
    from eagle_lab import charts_sweep
    from eagle_lab.stats import judge

    record = made(LAWS, holes=["flat/127/1"])
    figure = charts_sweep.times(record)
    flat = next(trace for trace in figure.data if trace.name == "flat")
    assert list(flat.x) == [s for s in SIZES if s != 127] and figure.data[-1].name == "floor"
    good = judge([[(1.0, 0.99 + 0.001 * i) for i in range(8)]])
    drawn = charts_sweep.gains(record, 63, {"always": good}).data[0]
    assert list(drawn.y) == ["whole decode", "mask alone"] and drawn.x[1] == pytest.approx(1 / 3, rel=0.03)
    assert "as no pair was left" in sweep_report.beside(record, "always", 63, nothing())
    assert list(charts_sweep.gains(record, 63, {"always": nothing()}).data[0].y) == ["mask alone"]


def nothing():
    """The verdict of a run whose pairs were all dropped."""
    from eagle_lab.stats import Decision, Verdict

    nan, inf = float("nan"), float("inf")
    return Verdict(
        Decision.INCONCLUSIVE, nan, 0.0, inf, (0.0, inf), "-", 0, 0, 0.01, 0.05, True, ("No pair.",)
    )


def on_a_gpu(graph_us, **laws):
    """A record of a GPU; graph_us: microseconds inside a graph by (builder, size, batch)."""
    record = made(LAWS | laws, device="cuda")
    for (name, size, batch), took in graph_us.items():
        record["cells"].setdefault(f"{name}/{size}/{batch}", {})["graph_s"] = [took * 1e-6] * 12
    return record


def test_the_bars_of_a_gpu_and_what_was_not_measured():
    record = on_a_gpu({("flat", 63, 1): 5, ("flat", 63, 32): 8, ("flat", 511, 1): 11, ("never", 63, 1): 6})
    table = sweep_bars.bars(record)
    # rebuild takes 189 µs at 63, so 5 µs are 38 times as fast
    assert table["holds"].tolist() == ["yes", "no", "yes", "no"]
    assert table["measured"][0].startswith("flat: 5.0 µs [5.0, 5.0]") and "1.60×" in table["measured"][2]
    record["cells"]["flat/63/32"] = {"hole": "boom"}
    assert sweep_bars.bars(record)["holds"].tolist() == ["yes", "no", "not measured", "no"]
    assert "boom" in sweep_bars.bars(record)["measured"][2]
    assert set(sweep_bars.bars(made(LAWS, device="cuda"))["holds"]) == {"not measured"}
    guesses = sweep_bars.guesses(on_a_gpu({("cuda", 63, 1): 5}, cuda=lambda n: 2e-5), "a GPU")
    assert "It helps alone: cuda is" in guesses and "5.0 µs inside a graph" in guesses
    assert "CPU-only" not in guesses


def test_each_time_has_its_own_floor():
    record = on_a_gpu({("flat", 63, 1): 5})
    assert (
        sweep_report.floor_s(record, 63, 1, "graph_s") is None
    )  # an older record: no line that means nothing
    assert sweep_report.times(record, "graph_s").loc["floor", 63] == sweep_report.HOLE
    record["floor"]["graph_call_s"] = 2e-6
    assert sweep_report.floor_s(record, 63, 1, "graph_s") == pytest.approx(2e-6 + (64 * 64 + 8 * 63) / 1e10)
    assert sweep_report.floor_s(record, 63, 1, "host_s") is None
    from eagle_lab import charts_sweep

    figure = charts_sweep.times(record, "graph_s")
    assert [trace.name for trace in figure.data] == [
        "flat",
        "floor",
    ] and "inside a graph" in figure.layout.title.text


def test_growth_and_crossovers_in_words():
    record = made({name: LAWS[name] for name in ("rebuild", "flat")})
    assert "- `flat`: n^0.0" in sweep_report.growth_words(record)
    assert "- `flat`: faster from" in sweep_report.crossover_words(record)
    assert sweep_report.growth_words(record, "graph_s") == "Not measured yet."


def test_whole_decodes_of_the_best_builder_stand_beside_the_gain_alone(tiny_pair, tmp_path):
    from eagle_lab import charts_sweep, mask_decodes

    record = made({"rebuild": LAWS["rebuild"], "walk": LAWS["always"]})
    assert "not measured yet" in mask_decodes.whole_words(record) and mask_decodes.verdicts(record) == {}
    assert not charts_sweep.gains(record, 63, {}).data
    record["end_to_end"] = mask_decodes.in_decodes(
        record, tiny_pair, iterations=2, max_new_tokens=4, results_dir=tmp_path, prompts=[[1, 124, 306, 281]]
    )
    assert record["end_to_end"]["builder"] == "walk" and list(mask_decodes.verdicts(record)) == ["walk"]
    words = mask_decodes.whole_words(record)
    assert "Alone, `walk` builds a mask of 63 nodes 3.0×" in words and "In whole decodes:" in words
    with pytest.raises(ValueError, match="no builder with a time at 64"):
        mask_decodes.in_decodes(record, tiny_pair, nodes=64)
