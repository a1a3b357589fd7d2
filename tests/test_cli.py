import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from make import GOLDEN, make_record
from typer.testing import CliRunner

from eagle_lab import ROOT
from eagle_lab.__main__ import EXIT_CODES, app, parsed
from eagle_lab.measure import records
from eagle_lab.measure.environment import Cause
from eagle_lab.measure.records import Counts
from eagle_lab.report.words import render
from eagle_lab.train.train import TrainSettings
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Decision

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
    whole, cut = json.loads(path.read_text()), tmp_path / "cut.json"
    for name, content, reason in (
        ("lost", json.dumps({key: value for key, value in whole.items() if key != "settings"}), "settings"),
        ("half", path.read_text()[: len(path.read_text()) // 2], "ends in the middle"),
        ("empty", "", "is empty"),
        ("of another kind", json.dumps({**whole, "schema": "eagle_lab.sweep.v2"}), "is a mask sweep, and"),
        ("of no kind", json.dumps({**whole, "schema": "x"}), "is a record of another kind, x,"),
        ("of another rule", json.dumps({**whole, "settings": {**whole["settings"], "delta": 5}}), "delta"),
        ("of the old form", json.dumps({"schema": 1, "kind": "comparison"}), "17e310d"),
    ):
        cut.write_text(content)
        for command in ("verdict", "report"):
            told = run.invoke(app, [command, str(cut)])
            assert told.exit_code == 1 and isinstance(told.exception, SystemExit), (name, told.exception)
            assert told.output.startswith("error: ") and told.output.count("\n") == 1, (name, told.output)
            assert reason in told.output, (name, told.output)
    folder = run.invoke(app, ["verdict", str(tmp_path)])
    assert folder.exit_code == 1 and "is a folder" in folder.output
    assert run.invoke(app, ["verdict", str(path), "--fail-on", "MAYBE"]).exit_code == 2


def test_what_is_no_comparison_is_named_in_a_readers_words_with_where_it_is_shown():
    """Every kind of record that the package defines, from its source."""
    source = "".join(file.read_text() for file in (ROOT / "eagle_lab").rglob("*.py"))
    kinds = set(re.findall(r'Literal\["eagle_lab\.(\w+)\.v\d+"\] = Field', source)) - {"comparison"}
    assert "sweep" in kinds
    for kind in kinds:
        told = render("other_kind.j2", path="r.json", kind=kind).strip()
        assert "another kind" not in told and "eagle_lab." not in told and told.endswith("."), told
        for page in re.findall(r"(?:notebooks|docs)/[\w.]+\w", told):
            assert (ROOT / page).exists(), told


def test_prefixes_that_are_no_numbers_are_refused_before_anything_is_loaded(tmp_path):
    told = run.invoke(app, ["record", "contexts", "--prefixes", "1k,4k", "--results-dir", str(tmp_path)])
    assert told.exit_code == 1 and told.output.startswith("error: prefixes are '1k,4k'; give whole numbers")


@pytest.mark.parametrize("candidate", ["code=HEAD", "engine=vllm,plain", "dtype=float16", "target=other"])
@pytest.mark.parametrize("baseline", ["rebuild", "rebuild,total_tokens=auto"])
def test_minutes_that_cannot_bound_an_arm_are_refused_before_anything_is_loaded(
    monkeypatch, tmp_path, baseline, candidate
):
    monkeypatch.setattr("eagle_lab.load", lambda *_, **__: pytest.fail("the pair was loaded"))
    words = [
        "--device",
        "cpu",
        "--baseline",
        baseline,
        "--candidate",
        candidate,
        "--results-dir",
        str(tmp_path),
    ]
    for more in ([], ["--dry-run"]):
        told = run.invoke(app, ["compare", *words, "--minutes", "1", *more])
        assert told.exit_code == 1 and told.output.startswith("error: minutes is for arms that this kit's")
        assert told.output.count("\n") == 1


def test_an_arm_that_minutes_can_bound_is_loaded(monkeypatch):
    def load(*_):
        raise ValueError("here it would load.")

    monkeypatch.setattr("eagle_lab.load", load)
    for candidate in ("doubling,dtype=float32", "draft=other", "incremental,total_tokens=auto"):
        told = run.invoke(app, ["compare", "--device", "cpu", "--candidate", candidate, "--minutes", "1"])
        assert told.output == "error: here it would load.\n", told.output


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without it
from eagle_lab.__main__ import app
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("forks", ["1", "2"])
def test_an_interrupted_comparison_says_where_its_record_lies_and_goes_on(tmp_path, forks):
    told = f"compare --target shape:tiny --device cpu --candidate doubling --iterations 4 --forks {forks}"
    told += " --max-new-tokens 8 --total-tokens 8 --results-dir kept"
    command = [sys.executable, "-c", INTERRUPTED, *told.split()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            files = list((tmp_path / "kept").glob("*.json"))
            if files and records.read(files[0], ComparisonRecord).instances:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    place = f"kept/{files[0].name}"
    last = f"stopped: {place} holds what was taken; the same command with --resume {place} takes the rest."
    assert process.returncode == 130 and said.endswith(f"\n{last}\n") and "Traceback" not in said, said
    before = records.read(files[0], ComparisonRecord)
    assert 0 < len(before.instances) < 4 and before.finished is None
    subprocess.run([*command, "--resume", place], cwd=tmp_path, check=True, capture_output=True)
    after = records.read(files[0], ComparisonRecord)
    assert after.instances[: len(before.instances)] == before.instances and after.finished
    assert sorted(i.iteration for i in after.instances) == list(range(4))


def test_a_file_for_a_folder_and_a_folder_for_a_file(path, tmp_path):
    for words, reason in (
        (["last", "--results", str(path)], "is a file; name the folder of the records"),
        (["history", str(path)], "is not there; name one that holds records"),
        (["acceptance", "--target", "nowhere/at/all", "--out", str(tmp_path)], "is a folder; name a file"),
        (["acceptance", "--target", "nowhere/at/all", "--out", str(path / "x.json")], "cannot be written"),
    ):
        told = run.invoke(app, words)
        assert told.exit_code == 1 and isinstance(told.exception, SystemExit), (words, told.exception)
        assert told.output.startswith("error: ") and told.output.count("\n") == 1, told.output
        assert reason in told.output


def test_where_nothing_was_measured_no_option_hides_it(path):
    record = make_record(1.1)
    busy = [s.model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)}) for s in record.samples]
    for samples in ([], busy):
        record.samples = samples
        records.write(record, path)
        for options in ([], ["--fail-on", "REVERT"]):
            told = run.invoke(app, ["verdict", str(path), *options])
            assert told.exit_code == 1 and "No pair is left" in told.output, told.output


def test_the_report_is_written_beside_the_record(path):
    done = run.invoke(app, ["report", str(path)])
    assert done.exit_code == 0, done.output
    assert "REVERT" in path.with_suffix(".md").read_text()
    lost = run.invoke(app, ["report", str(path), "--out", str(path.parent / "nowhere" / "page.md")])
    assert lost.exit_code == 1 and "cannot be written" in lost.output


def test_last_names_the_newest_record(path, tmp_path):
    done = run.invoke(app, ["last", "--results", str(tmp_path)])
    assert done.exit_code == 0 and "comparison-1.json" in done.output and "REVERT" in done.output
    assert "factors:" not in done.output, "nobody counted cycles"
    counts = (Counts(cycles=25, committed=50), Counts(cycles=20, committed=50))
    record = records.read(path, ComparisonRecord)
    record.samples = [sample.model_copy(update={"counts": counts}) for sample in record.samples]
    records.write(record, path)
    assert "factors:  cycles needed -20.0%" in run.invoke(app, ["last", "--results", str(tmp_path)]).output
    assert run.invoke(app, ["last", "--results", str(tmp_path / "empty")]).exit_code == 1


def test_places_are_told_from_where_one_stands(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "record:   comparison-1.json\n" in run.invoke(app, ["last", "--results", str(tmp_path)]).output


def test_without_a_command_the_help_says_what_to_do_first():
    told = run.invoke(app, []).output
    for wanted in ("make compare", "results/", "data/results/", "train", "record", "docs", "acceptance"):
        assert wanted in told
    assert "NO_DIFFERENCE" in run.invoke(app, ["verdict", "--help"]).output


def test_every_decision_has_its_own_exit_code():
    assert set(EXIT_CODES) == {decision.value for decision in Decision}
    assert len({0, 1, 2, *EXIT_CODES.values()}) == len(Decision) + 3


def test_a_verdict_does_not_wait_for_torch(path):
    records.write(make_record(1.1, call=(0.005, 0.01)), path)
    code = (
        "import sys; from typer.testing import CliRunner; from eagle_lab.__main__ import app;"
        "done = CliRunner().invoke(app, ['verdict', sys.argv[1]]);"
        "assert 'REVERT' in done.output, done.output; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_settings_come_from_words(monkeypatch):
    found = parsed(TrainSettings, ["steps=3", "lr=0.5", "mlp=96", "warm_start=false", "optimizer=muon"])
    assert found == TrainSettings(steps=3, lr=0.5, mlp=96, warm_start=False, optimizer="muon")
    for word, reason in (
        ("stps=3", "did you mean 'steps'"), ("steps=many", "steps is 'many'; it must be"), ("steps=0", "at least 1"),
        ("optimizer=x", "optimizer"), ("lr=2", "lr is '2'"),
    ):  # fmt: skip
        failed = run.invoke(app, ["train", "--training", word])
        assert failed.exit_code == 1 and reason in failed.output, failed.output
    assert "--training steps=2000" in run.invoke(app, ["train", "--settings"]).output
    assert run.invoke(app, ["ship", "nowhere"]).exit_code == 1


def test_compare_and_acceptance_decode(tmp_path):
    pair = ["--target", str(GOLDEN / "target"), "--draft", str(GOLDEN / "draft_official"), "--device", "cpu"]
    few = [*pair, "--max-new-tokens", "4"]
    # the golden target has no tokenizer, and the kit's prompts are texts: a comparison takes random ids
    failed = run.invoke(app, ["acceptance", "--sizes", "4", *few])
    assert failed.exit_code == 1 and "tokenizer" in failed.output, failed.output
    told = ["--candidate", "doubling", "--forks", "1", "--iterations", "2", "--results-dir", str(tmp_path)]
    assert run.invoke(app, ["compare", *told, *few]).exit_code == 0
    (path,) = tmp_path.glob("comparison-*.json")
    assert json.loads(path.read_text())["settings"]["prompts"] == ["random-0", "random-1"]
    assert "did you mean" in run.invoke(app, ["compare", "--baseline", "rebild", *pair]).output


@pytest.mark.parametrize("kind", ["profile", "seed", "ladder", "sweep"])
def test_a_record_on_an_unknown_device_is_refused_in_one_line(kind):
    failed = run.invoke(app, ["record", kind, "--device", "nothing"])
    assert failed.exit_code == 1 and failed.output.startswith("error: "), failed.output
