"""The sweep survives what fails in it, goes on where it stopped, and reports what the samples say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.measure.old_records import read
from eagle_lab.studies import recorded_trees as trees
from eagle_lab.studies import sweep as module
from eagle_lab.studies import sweep_bars
from eagle_lab.studies import sweep_summary as sweep_report
from eagle_lab.studies.sweep import sweep


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
    assert module.chosen("walk, doubling") == ["walk", "doubling"] and module.chosen(None) == [*MASK_BUILDERS]
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
    from eagle_lab.report.charts import sweep as charts_sweep

    record = made(LAWS, holes=["flat/127/1"])
    figure = charts_sweep.times(record)
    flat = next(trace for trace in figure.data if trace.name == "flat")
    assert list(flat.x) == [s for s in SIZES if s != 127] and figure.data[-1].name == "floor"
    drawn = charts_sweep.gains(record | decoded("always")).data[0]
    assert list(drawn.y) == ["whole decode", "mask alone"] and drawn.x[1] == pytest.approx(1 / 3, rel=0.03)
    assert list(charts_sweep.gains(record | decoded("always", pairs=0)).data[0].y) == ["mask alone"]


def decoded(candidate, baseline="rebuild", pairs=8):
    """What a record has of whole decodes, of so many pairs, on parts that take 1% of a decode."""
    from eagle_lab.studies.mask_decodes import alone

    builder = candidate if candidate in LAWS else alone(baseline, candidate)
    samples = [
        {"fork": 0, "control": False, "dropped": None, "cycles": 10, "baseline_s": 1.0, "candidate_s": 0.99 + 0.001 * i}
        for i in range(pairs)
    ]  # fmt: skip
    parts = [{"fork": 0, "arm": arm, "calls_s": [1e-3] * 10} for arm in ("baseline", "candidate")]
    settings = {
        "baseline": baseline, "candidate": candidate, "iterations": 8, "delta": 0.01, "alpha": 0.05, "target": "hub/T",
        "dtype": "float32",
    }  # fmt: skip
    compared = {"settings": settings, "samples": samples, "parts": parts}
    return {"end_to_end": {"builder": builder, "nodes": 63, "comparison": compared}}


def test_words_of_whole_decodes_hold_the_gain_alone_only_where_the_mask_alone_differs():
    from eagle_lab.studies import mask_decodes

    record = made(LAWS)
    own = mask_decodes.whole_words(record | decoded("always"))
    assert own.startswith("Alone, `always` builds a mask of 63 nodes 3.0×")
    assert "as fast as `rebuild`. In whole decodes: " in own and "The mask takes 1.00% of a decode" in own
    gone = mask_decodes.whole_words(record | decoded("always", pairs=0))
    assert "In whole decodes: INCONCLUSIVE, as no pair was left." in gone
    mask = mask_decodes.whole_words(record | decoded("walk,attention=tree", "attention=tree"))
    assert mask.startswith(
        "`walk` has no isolated time at 63 nodes. In whole decodes, `walk,attention=tree` against"
    )
    assert "no builder could bring more" in mask
    other = mask_decodes.whole_words(record | decoded("walk,attention=tree"))
    assert other.startswith("In whole decodes, `walk,attention=tree` against `rebuild`: ")
    assert other.endswith("8 pairs in 1 fork, provisional. (T, float32)") and "alone" not in other.lower()


def test_the_chart_of_gains_has_no_bar_for_a_mask_where_more_differs():
    from eagle_lab.report.charts import sweep as charts_sweep

    record = made(LAWS)
    figure = charts_sweep.gains(record | decoded("walk,attention=tree", "cache=concat"))
    assert list(figure.data[0].y) == ["whole decode"] and figure.data[0].name == "walk,attention=tree"
    assert figure.layout.yaxis.categoryarray == ("whole decode",) and 0.95 in figure.layout.xaxis.tickvals
    assert figure.layout.xaxis.title.text == "time over cache=concat's, 63 nodes (below 1 is faster)"
    empty = charts_sweep.gains(record | decoded("walk,attention=tree", pairs=0))
    assert not empty.data and "too few pairs" in empty.layout.annotations[0].text


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
    from eagle_lab.studies import mask_decodes

    assert mask_decodes.alone(baseline, candidate) == builder


def test_the_best_candidate_keeps_the_baselines_other_choices_and_goes_with_them():
    from eagle_lab.studies import mask_decodes

    laws = {"rebuild": LAWS["rebuild"], "walk": LAWS["flat"], "bitpacked": LAWS["always"]}
    record = made(laws)
    assert mask_decodes.best_candidate(record, "rebuild", 60, "cpu") == "bitpacked"
    assert mask_decodes.best_candidate(record, "walk,attention=tree", 63, "cpu") == "bitpacked,attention=tree"
    # the fastest one reads values on the host, which a runtime with fixed shapes does not let it do
    assert mask_decodes.able("walk,runtime=compile", [*laws], "cpu") == ["walk"]
    assert mask_decodes.best_candidate(record, "walk,runtime=compile", 63, "cpu") == "walk,runtime=compile"


def test_strategies_of_whole_decodes_are_refused_before_the_sweep(monkeypatch):
    from eagle_lab.studies import mask_decodes

    mask_decodes.check_arms(None, None, ["walk"], "cpu")
    mask_decodes.check_arms("attention=tree", "walk,attention=tree", ["cuda"], "cpu")
    with pytest.raises(ValueError, match="'wallk' is unknown"):
        mask_decodes.check_arms("wallk", None, ["walk"], "cpu")
    with pytest.raises(ValueError, match="mask=cuda needs a CUDA device"):
        mask_decodes.check_arms(None, "cuda", ["walk"], "cpu")
    with pytest.raises(
        ValueError, match="none of cuda can build the mask of rebuild on cpu; name a candidate"
    ):
        mask_decodes.check_arms(None, None, ["cuda"], "cpu")
    monkeypatch.setattr(module, "sweep", lambda *args, **options: pytest.fail("the sweep began"))
    with pytest.raises(ValueError, match="'wallk' is unknown"):
        module.main(candidate="wallk")


def test_the_command_hands_its_strategies_to_the_whole_decodes(monkeypatch, tmp_path, capsys):
    asked = {}

    def in_decodes(record, pair, **options):
        asked.update(options)
        return decoded("walk,attention=tree", "attention=tree")["end_to_end"]

    monkeypatch.setattr(module, "sweep", lambda *args, **options: made(LAWS))
    monkeypatch.setattr(module, "load", lambda **options: None)
    monkeypatch.setattr(module, "in_decodes", in_decodes)
    module.main(baseline="attention=tree", folder=str(tmp_path))
    assert asked["baseline"] == "attention=tree" and asked["candidate"] is None
    assert "`walk,attention=tree` against `attention=tree`" in capsys.readouterr().out
    assert "end_to_end" in (tmp_path / "sweep-cpu.json").read_text()


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
    from eagle_lab.report.charts import sweep as charts_sweep

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
    from eagle_lab.report.charts import sweep as charts_sweep
    from eagle_lab.studies import mask_decodes

    record = made({"rebuild": LAWS["rebuild"], "walk": LAWS["always"]})
    assert "not measured yet" in mask_decodes.whole_words(record)
    assert not charts_sweep.gains(record).data
    record["end_to_end"] = mask_decodes.in_decodes(
        record, tiny_pair, iterations=2, max_new_tokens=4, results_dir=tmp_path, prompts=[[1, 124, 306, 281]]
    )
    assert record["end_to_end"]["builder"] == "walk"
    words = mask_decodes.whole_words(record)
    assert "Alone, `walk` builds a mask of 63 nodes 3.0×" in words and "In whole decodes:" in words
    for name in ("rebuild", "walk"):
        record["cells"][f"{name}/63/1"] = {"hole": "boom"}
    with pytest.raises(ValueError, match="no builder with a time at 63 nodes that goes with rebuild on cpu"):
        mask_decodes.in_decodes(record, tiny_pair, nodes=64)


def test_whole_decodes_take_any_two_strategies(tiny_pair, tmp_path):
    from eagle_lab.studies import mask_decodes

    record = made({"rebuild": LAWS["rebuild"], "walk": LAWS["always"]})
    plan = {"nodes": 16, "iterations": 2, "max_new_tokens": 4, "prompts": [[1, 124, 306, 281]], "seed": 3}
    record["end_to_end"] = found = mask_decodes.in_decodes(
        record,
        tiny_pair,
        baseline="cache=concat",
        candidate="walk,attention=tree",
        results_dir=tmp_path,
        **plan,
    )
    settings = found["comparison"]["settings"]
    assert (settings["baseline"], settings["candidate"]) == ("cache=concat", "walk,attention=tree")
    assert settings["seed"] == 3 and found["builder"] is None
    told = mask_decodes.whole_words(record)
    assert told.startswith("In whole decodes, `walk,attention=tree` against `cache=concat`: INCONCLUSIVE")
