import json

import pytest
from make import make_record
from typer.testing import CliRunner

from eagle_lab.__main__ import app
from eagle_lab.measure import old_records as records

run = CliRunner()


@pytest.fixture
def path(tmp_path):
    records.write(make_record(1.1), tmp_path / "comparison-1.json")
    return tmp_path / "comparison-1.json"


def test_a_pipeline_can_gate_on_the_verdict(path):
    plain = run.invoke(app, ["verdict", str(path)])
    assert plain.exit_code == 0 and "REVERT" in plain.output
    assert run.invoke(app, ["verdict", str(path), "--fail-on", "REVERT"]).exit_code == 10
    assert run.invoke(app, ["verdict", str(path), "--fail-on", "revert"]).exit_code == 10
    assert run.invoke(app, ["verdict", str(path), "--fail-on", "INCONCLUSIVE"]).exit_code == 0
    both = ["verdict", str(path), "--fail-on", "INCONCLUSIVE", "--fail-on", "REVERT"]
    assert run.invoke(app, both).exit_code == 10


def test_bad_files_and_bad_words_are_errors_not_verdicts(path, tmp_path):
    assert run.invoke(app, ["verdict", str(tmp_path / "none.json")]).exit_code == 1
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps({key: value for key, value in make_record().items() if key != "samples"}))
    told = run.invoke(app, ["verdict", str(cut)])
    assert told.exit_code == 1 and "it has no samples" in told.output
    for change in (
        {"samples": [{}]},
        {"settings": {**make_record()["settings"], "delta": 5}},
        {"correctness": {}},
    ):
        cut.write_text(json.dumps({**make_record(), **change}))
        for command in ("verdict", "report"):
            told = run.invoke(app, [command, str(cut)])
            assert told.exit_code == 1 and isinstance(told.exception, SystemExit), told.exception
            assert told.output.startswith("error: ") and told.output.count("\n") == 1, told.output
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "profile"}))
    assert run.invoke(app, ["verdict", str(path)]).exit_code == 1
    assert run.invoke(app, ["verdict", str(path), "--fail-on", "MAYBE"]).exit_code == 2


def test_the_report_is_written_beside_the_record(path):
    done = run.invoke(app, ["report", str(path)])
    assert done.exit_code == 0, done.output
    assert "REVERT" in path.with_suffix(".md").read_text()
    lost = run.invoke(app, ["report", str(path), "--out", str(path.parent / "nowhere" / "page.md")])
    assert lost.exit_code == 1 and "cannot be written" in lost.output


def test_last_names_the_newest_record(path, tmp_path):
    done = run.invoke(app, ["last", "--results", str(tmp_path)])
    assert done.exit_code == 0 and "comparison-1.json" in done.output and "REVERT" in done.output
    assert run.invoke(app, ["last", "--results", str(tmp_path / "empty")]).exit_code == 1
