"""What calibrate.ipynb says: bars judged honestly, costs, an A/A run's words, and the overhead of spans."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eagle_lab.measure import old_records as records
from eagle_lab.models.prompts import Prompt
from eagle_lab.notebook import parameters
from eagle_lab.report.charts import calibration as charts_calibrate
from eagle_lab.studies import overhead
from eagle_lab.verdict import aa, calibration, history
from eagle_lab.verdict.calibration import BIASED, FIVE_FORKS, ONE_FORK, ORIGINAL, Bar
from eagle_lab.verdict.simulate import DESIGNS, Noise, tabulate
from eagle_lab.verdict.stats import judge

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "calibrate.ipynb"


@pytest.fixture(scope="module")
def rows():
    return tabulate(4000)


# --- the bars


def test_all_bars_hold_at_the_notebooks_default(rows):
    judged = calibration.judge_bars(rows)
    assert len(judged) == 5 and {row["status"] for row in judged} == {"holds"}
    assert calibration.misses(judged) == []


@pytest.mark.parametrize(
    ("share", "repetitions", "status"),
    [
        (0.930, 4000, "holds"),
        (0.925, 4000, "too near to tell at so few repetitions"),
        (0.925, 20_000, "missed"),
        (0.88, 4000, "missed"),
        (0.88, 500, "missed"),
    ],
)
def test_a_bar_is_missed_only_beyond_the_simulations_own_error(share, repetitions, status):
    row = {"design": "d", "power_2": share, "repetitions": repetitions}
    (judged,) = calibration.judge_bars([row], [Bar("d", "power_2", 0.93, 1.0)])
    assert judged["status"] == status
    missed = calibration.misses([judged])
    assert bool(missed) == (status == "missed")
    if missed:
        assert missed[0] == f"d: power at 2% is {share:.2%}, wanted at least 93.0%."


def test_a_naive_design_would_miss_our_bars(rows):
    bars = [Bar(ORIGINAL, "false_verdicts", 0, 0.005), Bar(DESIGNS[1].name, "coverage", 0.94, 0.965)]
    assert len(calibration.misses(calibration.judge_bars(rows, bars))) == 2


def test_too_few_repetitions_are_refused():
    assert calibration.check_repetitions(500) == 500
    with pytest.raises(ValueError, match="repetitions is 100; fewer than 500"):
        calibration.check_repetitions(100)


def test_the_other_reading_of_the_noise_misses_the_power_and_says_so():
    variants = {name: calibration.VARIANTS[name] for name in list(calibration.VARIANTS)[:2]}
    assumed, other = calibration.sensitivity_table(calibration.sensitivity(4000, variants=variants))
    assert assumed["bars missed"] == "none"
    assert "power at 2%, 88." in other["bars missed"] and "by less than" not in other["bars missed"]
    assert all(isinstance(noise, Noise) for noise in calibration.VARIANTS.values())


def test_the_finding_is_computed(rows):
    text = calibration.finding(rows)
    found = {row["design"]: row for row in rows}
    for share in (
        found[ORIGINAL]["false_verdicts"],
        found[BIASED.name]["false_verdicts"],
        found[FIVE_FORKS.name]["power_2"],
    ):
        assert f"{share:.1%}" in text
    changed = [{**row, "false_verdicts": 0.123} if row["design"] == ORIGINAL else row for row in rows]
    assert "12.3%" in calibration.finding(changed)


def test_an_effect_of_delta_is_found_in_about_half_at_most():
    curves = {curve["design"]: curve for curve in calibration.power_curves(1000)}
    for name in (ONE_FORK.name, FIVE_FORKS.name):
        curve = dict(zip(np.round(curves[name]["effects"], 6), curves[name]["adopt"], strict=True))
        assert curve[0.0] < 0.01 < curve[0.01] < 0.6 and curve[0.06] > 0.98
    assert curves[ORIGINAL]["adopt"][0] > 0.3  # ADOPT where nothing changed


def test_costs_of_the_control_and_of_peeking():
    alike, differ = list(calibration.control_costs(1000)[0])[1:]
    first, *_, last = calibration.control_costs(1000)
    assert float(first[differ].rstrip("%")) < 10 < 40 < float(last[differ].rstrip("%"))
    assert float(last[alike].rstrip("%")) < 8
    once, often, declared, always = (
        float(row["an interval excludes 1"].rstrip("%")) for row in calibration.peeking_costs(800)
    )
    assert declared <= 5 < often < always


def test_the_designs_chart_shows_the_tables_figures(rows):
    figure = charts_calibrate.designs_figure(rows)
    for trace, metric in zip(figure.data, ("coverage", "false_verdicts", "power_2"), strict=True):
        assert list(trace.x) == [round(100 * (row[metric] or 0), 2) for row in rows]
    assert figure.data[0].text[0] == "no interval"
    assert len(figure.layout.shapes) == 7  # two ends of two coverages, two rates, one power
    assert len(charts_calibrate.power_figure(calibration.power_curves(500)).data) == 4


# --- A against A


def test_scatter_is_the_sd_within_forks():
    rng = np.random.default_rng(0)
    forks = [[(1.0, shift * math.exp(x)) for x in rng.normal(0, 0.01, 400)] for shift in (0.9, 1.1)]
    assert aa.scatter(forks) == pytest.approx(0.01, rel=0.1)
    assert 0.005 < aa.simulated_scatter() < 0.012


@pytest.mark.parametrize(
    ("ratio", "sd", "wanted"),
    [
        (1.0, 0.0005, ("**No difference**", "less than the", "cautious")),
        (1.05, 0.001, ("**A false verdict**",)),
        (1.0, 0.05, ("**Inconclusive**", "more than the", "flatter")),
    ],
)
def test_words_of_an_aa_run(ratio, sd, wanted):
    rng = np.random.default_rng(1)
    forks = [[(1.0, ratio * math.exp(x)) for x in rng.normal(0, sd, 20)]]
    text = aa.words(judge(forks), forks)
    assert all(words in text for words in wanted), text


def test_words_of_an_aa_run_with_few_pairs():
    assert "Too few pairs are left (2)" in aa.words(judge([[(1.0, 1.0)] * 2]), [[(1.0, 1.0)] * 2])


# --- what spans cost


@pytest.fixture(scope="module")
def spanned(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    sizes = {"max_new_tokens": 8, "total_tokens": 8, "depth": 2, "top_k": 4}
    prompts = [list(range(3, 12)), list(range(20, 29))]
    return overhead.measure(
        tiny_pair, prompts=prompts, iterations=6, forks=1, results_dir=folder, progress=False, **sizes
    )


def test_the_overhead_record_is_a_comparison_of_spans_and_keeps_its_own_name(spanned):
    assert [path.name for path in spanned.path.parent.iterdir()] == [spanned.path.name]
    assert spanned.path.name.startswith("overhead-")
    record = records.read(spanned.path)
    assert record["settings"]["spans"] == [False, True] and len(record["samples"]) == 6
    found, skipped = overhead.found(spanned.path.parent)
    assert list(found) == [spanned.path] and not skipped
    (row,) = history.load(spanned.path.parent)[0]
    assert row.pair == "rebuild with spans against rebuild"


def test_the_overhead_of_any_strategy_is_measured_and_named(tiny_pair, tmp_path, monkeypatch):
    plan = {"prompts": [list(range(3, 12))], "iterations": 1, "forks": 1, "progress": False}
    sizes = {"max_new_tokens": 6, "total_tokens": 8, "depth": 2, "top_k": 4}
    done = overhead.measure(tiny_pair, "doubling,attention=tree", results_dir=tmp_path, **plan, **sizes)
    settings = done.record["settings"]
    assert settings["baseline"] == settings["candidate"] == "doubling,attention=tree"
    assert "-p strategy doubling,attention=tree" in done.record["command"]
    assert overhead.words(done.record).startswith(
        "Spans on against off, `doubling,attention=tree`: too few pairs"
    )
    told = overhead.committed_words(*overhead.found(tmp_path))
    assert "`: Spans on against off, `doubling,attention=tree`:" in told
    honest, decoded = overhead.generate, []

    def seen(*args, strategy, **options):
        decoded.append(strategy)
        return honest(*args, strategy=strategy, **options)

    monkeypatch.setattr(overhead, "generate", seen)
    ids = tuple(range(3, 12))
    monkeypatch.setattr(overhead, "prepare", lambda tokenizer, name: [Prompt(name, "own", "", ids)])
    assert overhead.expected(tiny_pair, done.record).spans > 0 and decoded == ["doubling,attention=tree"]


def test_what_isnt_an_overhead_record_is_named(spanned, tmp_path):
    record = records.read(spanned.path)
    plain = {**record, "settings": {**record["settings"], "spans": [False, False]}}
    records.write(plain, tmp_path / "overhead-plain.json")
    records.write({**record, "samples": [{}]}, tmp_path / "overhead-half.json")
    (tmp_path / "overhead-torn.json").write_text("{")
    found, skipped = overhead.found(tmp_path)
    assert not found and len(skipped) == 3
    text = overhead.committed_words(found, skipped)
    assert (
        all(f"overhead-{name}.json" in text for name in ("plain", "half", "torn"))
        and str(tmp_path) not in text
    )
    assert "No overhead record" in overhead.committed_words(*overhead.found(tmp_path / "none"))


def synthetic(spanned, ratios):
    record = json.loads(json.dumps(spanned.record))
    for sample, ratio in zip(record["samples"], ratios, strict=True):
        sample |= {"baseline_s": 1.0, "candidate_s": ratio, "dropped": None}
    return record


def test_inside_one_percent_means_the_whole_interval(spanned):
    assert "**inside** ±1%" in overhead.words(synthetic(spanned, [1.0, 1.001, 0.999, 1.002, 0.998, 1.0]))
    assert "**not inside** ±1%" in overhead.words(synthetic(spanned, [1.0, 1.02, 0.98, 1.0, 1.0, 1.0]))
    assert not overhead.within(judge([[(1.0, 1.0)] * 5]))  # no interval
    short = synthetic(spanned, [1.0] * 6)
    short["samples"] = short["samples"][:3]
    assert "too few pairs for an interval" in overhead.words(short)


def test_a_span_costs_well_under_a_hundredth_of_a_millisecond(spanned):
    assert 0 < overhead.span_cost("cpu", 500, 5) < 1e-5
    count = overhead.Expected(120, 5e-7, 0.0001)
    assert "120 spans of 0.50 µs each: they should add 0.0100%" in overhead.words(spanned.record, count)


def test_the_count_of_spans_comes_from_a_decode(tiny_pair, spanned, monkeypatch):
    record = json.loads(json.dumps(spanned.record))
    # the tiny target has no tokenizer for the kit's own prompts
    ids = tuple(range(3, 12))
    monkeypatch.setattr(overhead, "prepare", lambda tokenizer, name: [Prompt(name, "own", "", ids)])
    found = overhead.expected(tiny_pair, record)
    cycles = record["samples"][0]["cycles"]
    assert found.spans >= 5 * cycles and found.share > 0
    assert overhead.expected(tiny_pair, {**record, "samples": []}) is None


def test_the_commands_parameters_are_the_notebooks(spanned):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    words = spanned.record["command"].split()
    given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
    assert words[:2] == ["papermill", "notebooks/calibrate.ipynb"] and "iterations" in given
    assert set(given) <= set(parameters.declared(source))


def test_simulated_cells_are_checked_and_measured_ones_are_not():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    ignored = {c["id"] for c in cells if "nbval-ignore-output" in c["metadata"].get("tags", ())}
    checked = {
        "simulated",
        "designs",
        "finding",
        "bars",
        "bars-hold",
        "power",
        "assumptions",
        "control",
        "peeking",
    }
    assert not checked & ignored and {"real", "real-pairs", "real-words", "overhead"} <= ignored
    assert checked | ignored <= {c["id"] for c in cells}
