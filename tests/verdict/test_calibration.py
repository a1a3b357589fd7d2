"""The simulated error rates, told from their rows, and short runs with planted delays held against them."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import pytest
from make import ENVIRONMENT

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.records import InstanceSample, read
from eagle_lab.models.prompts import Prompt
from eagle_lab.report import calibration as words
from eagle_lab.report.charts import calibration as charts
from eagle_lab.verdict import calibration
from eagle_lab.verdict.calibration import (
    BIASED,
    CYCLES,
    FIVE_FORKS,
    ONE_FORK,
    USUAL,
    CalibrationRecord,
    CalibrationSettings,
    Run,
)
from eagle_lab.verdict.simulate import tabulate
from eagle_lab.verdict.summary import instance_estimates

SETTINGS = CalibrationSettings(
    target="t", draft="d", dtype="float32", strategy="rebuild", top_k=2, depth=2, total_tokens=4, max_new_tokens=8, seed=0,
    planted=[0.0, 0.01, 0.02, 0.05], where="host", cycle_s=0.01, seconds=25.0, forks=5, delta=0.01, alpha=0.05,
)  # fmt: skip
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "calibrate.ipynb"


@pytest.fixture(scope="module")
def rows():
    return tabulate(1000)


def test_too_few_repetitions_are_refused():
    assert calibration.check_repetitions(500) == 500
    with pytest.raises(ValueError, match="repetitions is 100; fewer than 500"):
        calibration.check_repetitions(100)


def test_a_rate_that_was_never_seen_is_not_called_zero():
    row = {"false_verdicts": 0.0, "power_2": 0.937, "coverage": None, "repetitions": 4000}
    assert [words.rate(row, key) for key in ("false_verdicts", "power_2", "coverage")] == [
        "< 0.07%",
        "93.7%",
        "–",
    ]


def test_the_finding_is_computed(rows):
    text = words.finding(rows)
    found = {row["design"]: row for row in rows}
    for design, metric in (
        (USUAL, "false_verdicts"),
        (BIASED, "false_verdicts"),
        (FIVE_FORKS, "power_2"),
        (CYCLES, "told_1"),
    ):
        assert f"{found[design.name][metric]:.1%}" in text
    changed = [{**row, "false_verdicts": 0.123} if row["design"] == USUAL.name else row for row in rows]
    assert "12.3%" in words.finding(changed) and "12.3%" not in text


def test_the_table_has_every_design_and_metric(rows):
    table = words.table(rows)
    assert [line["design and analysis"] for line in table] == [row["design"] for row in rows]
    (one,) = (line for line in table if line["design and analysis"] == ONE_FORK.name)
    assert all(one[name].endswith("%") for name in words.METRICS.values())


def test_the_designs_chart_shows_the_tables_figures(rows):
    figure = charts.designs_figure(rows)
    for trace, metric in zip(figure.data, ("coverage", "false_verdicts", "power_2"), strict=True):
        assert list(trace.x) == [round(100 * (row[metric] or 0), 2) for row in rows]
    assert figure.data[0].text[0] == "no interval"


def invented(forks: int, runs: int, between: float = 0.004) -> CalibrationRecord:
    """Runs whose candidate takes what was planted longer, with a bias for each session of each instance."""
    rng, settings = np.random.default_rng(0), SETTINGS.model_copy(update={"forks": forks})
    made_up = []
    for number, load, planted in product(range(runs), (0.0, 0.5), settings.planted):
        instances = []
        for fork in range(5):
            shift = rng.normal(0, between, 3) + np.log1p([0, 0, planted])
            times = settings.cycle_s * np.exp(shift + rng.normal(0, 0.01 * (1 + load), (5, 3)))
            instances.append(
                InstanceSample(
                    fork=fork if forks > 1 else 0, iteration=fork, prompt="p", made=range(3), first_s=[0.1] * 3,
                    seconds=times.tolist(), order=rng.permuted([range(3)] * 5, axis=1).tolist(), tokens=[1] * 5, foreign_load=load / 2,
                )
            )  # fmt: skip
        made_up.append(Run(number=number, load=load, planted=planted, seconds=25.0, instances=instances))
    return CalibrationRecord(
        created="2026-01-01T00:00:00Z", command="x", environment=ENVIRONMENT, settings=settings, runs=made_up
    )


@pytest.mark.parametrize("forks", [1, 5])
def test_rates_count_what_was_planted_and_found(forks):
    rows = {(r.load, r.planted): r for r in calibration.rates(invented(forks, 60))}
    assert len(rows) == 8 and all(r.runs == 60 for r in rows.values())
    for (load, planted), r in rows.items():
        assert r.ratio == pytest.approx(1 + planted, abs=0.003) and r.truth == pytest.approx(
            1 + planted, abs=0.002
        )
        assert r.share(r.covered)[2] >= 0.95 and r.share(r.covered)[0] > 0.8
        assert r.foreign_load == load / 2 and r.adopted == 0 or planted == 0
    assert rows[0.0, 0.05].told == 60 and rows[0.0, 0.0].told < 12 and rows[0.0, 0.02].reverted > 40
    assert rows[0.0, 0.0].half_width < rows[0.5, 0.0].half_width


def test_the_truth_of_a_loaded_run_is_that_of_its_calm_cycles():
    """Bursts make a fifth of all slices three times as long: the planted share is one of what a cycle takes without."""
    rng, settings = np.random.default_rng(0), SETTINGS
    instances = []
    for fork in range(5):
        times = settings.cycle_s / 8 * np.exp(1.1 * (rng.random((12, 3, 8)) < 0.2))
        times[:, 2, 7] += 0.05 * settings.cycle_s
        one = InstanceSample(
            fork=fork, prompt="p", made=range(3), first_s=[0.1] * 3, seconds=times.sum(2).tolist(),
            order=[range(3)] * 12, tokens=[1] * 12, foreign_load=0.25, slices=times.tolist(),
        )  # fmt: skip
        instances.append(one)
    run = Run(number=0, load=0.5, planted=0.05, seconds=25.0, instances=instances)
    found = calibration.found(run, settings)
    assert found.truth == pytest.approx(1.05, abs=0.0005)
    assert found.verdict.estimate == pytest.approx(1.05, abs=0.005)
    record = invented(5, 1).model_copy(update={"runs": [run]})
    assert calibration.design_of(record).order == "slices"
    assert calibration.simulated(record, 500)["told_5"] == 1.0


def test_a_run_of_one_process_where_several_were_asked_for_says_nothing():
    record = invented(5, 1)
    alone = [i.model_copy(update={"fork": 0}) for i in record.runs[0].instances]
    assert not calibration.found(record.runs[0].model_copy(update={"instances": alone}), record.settings)


def test_measured_and_simulated_rates_stand_side_by_side():
    record = invented(5, 10)
    design = calibration.design_of(record)
    assert (design.forks, design.pairs, design.stretches) == (5, 1, 5)
    text = words.of_runs(record)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        len(rows) == 12 and rows[5].startswith("| +5.0% |") and max(map(len, rows)) < 100
    )  # GitHub's column
    assert text.index("Quiet: other programs took 0%") < text.index(
        "50% of the time: other programs took 25%"
    )
    assert len(charts.runs_figure(record).data) == 16


@pytest.mark.parametrize("forks", [1, 2])
def test_large_planted_delays_are_found_run_by_run_and_gone_on_with(tiny_pair, tmp_path, forks):
    prompts = [Prompt("a", "own", "", tuple(range(5, 25))), Prompt("b", "own", "", tuple(range(40, 60)))]
    decoding = Decoding.of(12, top_k=2, depth=2, total_tokens=4)
    options = {"seconds": 0.5, "forks": forks, "planted": (0.0, 3.0)}
    path = tmp_path / "calibration.json"
    calibration.calibrate(tiny_pair, prompts, decoding, path, runs=1, loads=(0.0,), **options)
    seen = []
    record = calibration.calibrate(
        tiny_pair, prompts, decoding, path, runs=2, loads=(0.0, 0.5),
        on_run=lambda r: seen.append(len(r.runs)), **options,
    )  # fmt: skip
    assert seen == [3, 4, 5, 6, 7, 8] and read(path, CalibrationRecord) == record
    assert [(run.number, run.load, run.planted) for run in record.runs[2:]] == [
        (0, 0.5, 0.0), (0, 0.5, 3.0), (1, 0.0, 0.0), (1, 0.0, 3.0), (1, 0.5, 0.0), (1, 0.5, 3.0),
    ]  # fmt: skip
    ratios = [np.exp(instance_estimates(run.instances)).mean() for run in record.runs]
    assert min(ratios[1::2]) > 1.5 and max(ratios[::2]) < 1.5
    assert all(len({i.fork for i in run.instances}) == forks for run in record.runs)
    with pytest.raises(ValueError, match="begun with other settings"):
        calibration.calibrate(tiny_pair, prompts, decoding, path, runs=2, **{**options, "seconds": 1.0})
    with pytest.raises(ValueError, match="share of one core's time"):
        calibration.calibrate(tiny_pair, prompts, decoding, loads=(1.5,), **options)


def test_a_program_beside_takes_its_share_of_a_core():
    def busy(load):
        with calibration.beside(load):
            children = psutil.Process().children()
            time.sleep(1.0)
            used = sum(sum(child.cpu_times()[:2]) for child in children)
        return used

    assert busy(0.0) == 0.0 and 0.02 < busy(0.5) < 0.85  # less where others crowd it out
    assert not psutil.Process().children()


def test_simulated_cells_are_checked_and_measured_ones_are_not():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    ignored = {c["id"] for c in cells if "nbval-ignore-output" in c["metadata"].get("tags", ())}
    checked = {"simulated", "designs", "finding"}
    assert not checked & ignored and {"measured", "real", "real-words", "overhead"} <= ignored
    assert checked | ignored <= {c["id"] for c in cells}
