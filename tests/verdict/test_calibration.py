"""The simulated error rates, told from their rows, and an A/A run held against the simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eagle_lab.report import calibration as words
from eagle_lab.report.charts import calibration as charts
from eagle_lab.verdict import calibration
from eagle_lab.verdict.calibration import BIASED, FIVE_FORKS, ONE_FORK, USUAL
from eagle_lab.verdict.simulate import tabulate
from eagle_lab.verdict.stats import judge

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "calibrate.ipynb"


@pytest.fixture(scope="module")
def rows():
    return tabulate(4000)


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
    for design, metric in ((USUAL, "false_verdicts"), (BIASED, "false_verdicts"), (FIVE_FORKS, "power_2")):
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


def test_scatter_is_the_sd_within_forks():
    rng = np.random.default_rng(0)
    forks = [[(1.0, shift * math.exp(x)) for x in rng.normal(0, 0.01, 400)] for shift in (0.9, 1.1)]
    assert calibration.scatter(forks) == pytest.approx(0.01, rel=0.1)
    assert 0.005 < calibration.simulated_scatter() < 0.012


@pytest.mark.parametrize(
    ("ratio", "sd", "pairs", "wanted"),
    [
        (1.0, 0.0005, 20, ("**No difference**", "less than the", "cautious")),
        (1.05, 0.001, 20, ("**A false verdict**",)),
        (1.0, 0.05, 20, ("**Inconclusive**", "more than the", "flatter")),
        (1.0, 0.001, 2, ("Too few pairs are left (2)",)),
    ],
)
def test_words_of_an_aa_run(ratio, sd, pairs, wanted):
    rng = np.random.default_rng(1)
    forks = [[(1.0, ratio * math.exp(x)) for x in rng.normal(0, sd, pairs)]]
    text = words.same_words(judge(forks), forks)
    assert all(part in text for part in wanted), text


def test_simulated_cells_are_checked_and_measured_ones_are_not():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    ignored = {c["id"] for c in cells if "nbval-ignore-output" in c["metadata"].get("tags", ())}
    checked = {"simulated", "designs", "finding"}
    assert not checked & ignored and {"real", "real-pairs", "real-words", "overhead"} <= ignored
    assert checked | ignored <= {c["id"] for c in cells}
