"""Records of several machines and kinds, broken and foreign files: each in its place, none fatal."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from make import ENVIRONMENT, make_record

from eagle_lab.measure import records
from eagle_lab.measure.environment import Cause, Environment
from eagle_lab.report import history as words
from eagle_lab.report.charts import history as charts
from eagle_lab.report.charts.style import COLOURS, apart
from eagle_lab.verdict import history
from eagle_lab.verdict.record import ArmTold
from eagle_lab.verdict.stats import Decision
from eagle_lab.verdict.summary import verdict_of


def comparison(ratio=0.95, day=1, cpu="CPU A", threads=2, gpu=None, forks=5, per_fork=4, **settings):
    """A finished comparison whose candidate takes `ratio` of the time, within 0.2%."""
    usual = {"target": "org/target", "draft": "data/head", "candidate": "incremental"}
    found = make_record(ratio, forks, per_fork, call=(0.02, 0.0175), **{**usual, **settings})
    environment = {**ENVIRONMENT, "cpu": {**ENVIRONMENT["cpu"], "name": cpu, "torch_threads": threads}}
    if gpu:
        environment["gpu"] = {"name": gpu, "memory_bytes": 1, "multiprocessors": 1, "cuda": "13"}
    when = datetime(2026, 1, day, 10, tzinfo=UTC)
    return found.model_copy(
        update={"created": when, "finished": when, "environment": Environment.model_validate(environment)}
    )


def put(folder, **named):
    for name, record in named.items():
        records.write(record, folder / f"{name}.json")


def test_no_record_at_all(tmp_path, monkeypatch):
    rows, skipped = history.load(tmp_path)
    assert (rows, skipped, history.trends(rows)) == ([], [], [])
    assert words.overview(rows, skipped) == "There is no record here yet."
    assert words.trend_words([]) == "No comparison has been recorded here yet."
    assert charts.trends_figure([]).layout.annotations[0].text == "no comparison recorded yet"
    monkeypatch.setattr(history, "RESULTS", tmp_path / "never made")
    assert history.load() == ([], [])
    with pytest.raises(ValueError, match="is not there; name one"):
        history.load(tmp_path / "never made")


def test_one_record(tmp_path):
    put(tmp_path, a=comparison(0.95))
    rows, skipped = history.load(tmp_path)
    (trend,) = history.trends(rows)
    assert not skipped and words.overview(rows, skipped) == "1 record (1 comparison) from 1 machine."
    assert (trend.latest.decision, trend.before, trend.changed) == (Decision.ADOPT, None, False)
    (line,) = words.table(rows)
    assert line["machine"] == "CPU A, 2 cores" and line["verdict"] == "ADOPT"
    assert line["candidate against baseline"] == "incremental against rebuild"


def test_what_other_code_measured_is_listed_and_on_no_trend(tmp_path):
    shutil.copy(records.RESULTS / "engines-h100.json", tmp_path)
    put(tmp_path, a=comparison(0.95))
    rows, skipped = history.load(tmp_path)
    assert not skipped and len(history.trends(rows)) == 1
    assert words.overview(rows, skipped) == "2 records (1 comparison, 1 engines) from 2 machines."
    (line,) = words.others(rows)
    assert line == {
        "when (UTC)": "2026-11-26", "kind": "engines", "machine": "H100 80GB", "commit": "17e310d", "file": "engines-h100.json",
    }  # fmt: skip
    assert history.chosen(rows, "h100") == [row for row in rows if row.file == "engines-h100.json"]
    (tmp_path / "b.json").write_text('{"schema": "eagle_lab.engines.v1", "machine": "M"}')
    assert "b.json is no whole record" in history.load(tmp_path)[1][0]


def test_machines_are_never_on_one_trend(tmp_path):
    put(
        tmp_path, a=comparison(0.95, 1), b=comparison(1.05, 2, cpu="CPU B"), c=comparison(0.951, 3),
        d=comparison(0.90, 4, gpu="GPU G", device="cuda"),
    )  # fmt: skip
    found = history.trends(history.load(tmp_path)[0])
    assert {trend.machine: [row.file for row in trend.rows] for trend in found} == {
        "CPU A, 2 cores": ["a.json", "c.json"],
        "CPU B, 2 cores": ["b.json"],
        "GPU G": ["d.json"],
    }
    figure = charts.trends_figure(found)
    assert len({trace.yaxis or "y" for trace in figure.data}) == 3  # an axis each
    assert figure.data[0].x == (0, 1)  # a place for each record, however close their dates
    assert [trace.name[:2] for trace in figure.data] == ["1:", "2:", "3:"]
    assert figure.layout.legend.maxheight >= 3 * charts.LINE  # none is cut off


def test_other_strategies_sizes_threads_and_spans_are_other_trends(tmp_path):
    put(
        tmp_path, a=comparison(), b=comparison(candidate="doubling"), c=comparison(total_tokens=15),
        d=comparison(spans=(False, True)), e=comparison(threads=1), f=comparison(draft="data/other"),
        g=comparison(temperature=1.0), h=comparison(temperature=1.0, top_p=0.9),
    )  # fmt: skip
    found = history.trends(history.load(tmp_path)[0])
    assert [len(trend.rows) for trend in found] == [1] * 8
    spanned = {trend.arms[1] for trend in found if trend.arms[1].spans}
    assert spanned == {history.Arm("incremental", spans=True)}
    assert "incremental with spans against rebuild" in words.trend_words(found)


def test_pairs_of_arms_differ_in_colour_and_days_are_told_once(tmp_path):
    arms = ["doubling", "incremental", *(f"total_tokens={n}" for n in range(10))]
    put(tmp_path, **{f"r{n}": comparison(day=1 + n // 4, candidate=arm) for n, arm in enumerate(arms)})
    put(tmp_path, small=comparison(day=4, candidate="doubling", total_tokens=15))
    figure = charts.trends_figure(history.trends(history.load(tmp_path)[0]))
    paints = {trace.name.partition(": ")[2]: trace.line.color for trace in figure.data}
    assert (
        len(figure.data) == 13 and len(paints) == len(set(paints.values())) == 12
    )  # one pair has two workloads
    assert paints["doubling against rebuild (target)"] == COLOURS["doubling"]
    assert figure.layout.xaxis.ticktext == ("01 Jan", "02 Jan", "03 Jan", "04 Jan")
    assert figure.layout.xaxis.tickvals == (0, 4, 8, 12)
    thirteen = apart(dict.fromkeys(range(13), "no strategy"))
    assert thirteen[0] == thirteen[12] and len(set(thirteen.values())) == 12


def test_an_engine_s_upgrade_is_said(tmp_path):
    def at(day, version):
        arms = [
            ArmTold(keys={}, engine=name, version=v) for name, v in (("eagle_lab", "abc"), ("vllm", version))
        ]
        return comparison(0.95, day, candidate="engine=vllm", outside=True).model_copy(update={"arms": arms})

    put(tmp_path, a=at(1, "0.26.0"), b=at(2, "0.32.0"))
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert trend.upgrades == [("vllm 0.26.0", "vllm 0.32.0")]
    assert "vllm 0.26.0 was followed by vllm 0.32.0" in words.trend_words([trend])
    put(tmp_path, c=at(3, "0.32.0"))
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert not trend.upgrades


def test_a_change_between_two_records_is_said(tmp_path, snapshot):
    put(tmp_path, a=comparison(0.95, 1), b=comparison(0.9501, 2))
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert trend.before is not None and not trend.changed
    put(tmp_path, c=comparison(1.0, 3))
    (changed,) = history.trends(history.load(tmp_path)[0])
    assert changed.changed
    put(tmp_path, d=comparison(0.8, 4, forks=1, per_fork=3))
    (short,) = history.trends(history.load(tmp_path)[0])
    assert not short.latest.known and not short.changed
    symbols = charts.trends_figure([short]).data[0].marker.symbol
    assert [symbol.endswith("-open") for symbol in symbols] == [False, False, False, True]
    snapshot(words.trend_words([trend, changed, short]), "trends.md")


def test_machines_and_arms_are_chosen_by_a_part_of_their_names(tmp_path):
    put(
        tmp_path,
        a=comparison(),
        b=comparison(cpu="CPU B"),
        c=comparison(candidate="doubling", gpu="GPU G", device="cuda"),
    )
    rows, _ = history.load(tmp_path)
    assert {row.file for row in history.chosen(rows, machine="cpu")} == {"a.json", "b.json"}
    assert [row.file for row in history.chosen(rows, arm="DOUBL")] == ["c.json"]
    assert history.chosen(rows) == rows and history.chosen([], "x", "y") == []
    with pytest.raises(ValueError, match="there are CPU A, 2 cores, CPU B, 2 cores, GPU G"):
        history.chosen(rows, machine="TPU")
    with pytest.raises(ValueError, match="there are rebuild, incremental, doubling"):
        history.chosen(rows, arm="walk")


def test_commits_between_two_records_are_told_where_git_knows_them(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(
            ["git", "-C", tmp_path, *words], capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    told = []
    for name in ("first", "second", "third"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        git(*who, "commit", "-q", "--allow-empty", "-m", name)
        told.append(git("rev-parse", "HEAD").strip())
    monkeypatch.setattr(history, "ROOT", tmp_path)

    def trend(first, last):
        records_ = [comparison(0.95, 1), comparison(1.0, 2)]
        for record, commit in zip(records_, (first, last), strict=True):
            put(tmp_path, **{f"at{record.created.day}": with_commit(record, commit)})
        (found,) = history.trends(history.load(tmp_path)[0])
        return found

    found = trend(told[0], told[2])
    assert found.changed and [line.split(" ", 1)[1] for line in found.commits] == ["third", "second"]
    assert "2 commits between the two:" in words.trend_words([found])
    assert trend(told[0], "0" * 40).commits is None


def with_commit(record, commit):
    return record.model_copy(update={"environment": record.environment.model_copy(update={"commit": commit})})


def test_broken_and_foreign_files_are_named_and_skipped(tmp_path):
    put(tmp_path, good=comparison())
    whole = comparison().model_dump(mode="json")
    (tmp_path / "torn.json").write_text(json.dumps(whole)[:300])
    (tmp_path / "latin.json").write_bytes(b'{"schema": "\xe9"}')
    (tmp_path / "foreign.json").write_text('{"name": "package", "version": 1}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "readme.txt").write_text("not looked at")
    changes = {
        "without": {"settings": {}},
        "newer": {"schema": 7},
        "negative": {"samples": [{**whole["samples"][0], "candidate_s": -1.0}]},
        "no_machine": {"environment": None},
        "undated": {"created": "yesterday"},
    }
    for name, change in changes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**whole, **change}))
    rows, skipped = history.load(tmp_path)
    assert [row.file for row in rows] == ["good.json"]
    told = "\n".join(skipped)
    for name in ("torn", "latin", "foreign", "list", "folder", *changes):
        assert sum(sentence.startswith(f"{name}.json ") for sentence in skipped) == 1, name
    assert str(tmp_path) not in told  # a committed notebook must not tell where it ran
    assert told.count("\n") == 9 and "readme" not in told
    assert all(f"- skipped: {sentence}" in words.overview(rows, skipped) for sentence in skipped)


def test_an_unfinished_record_and_one_without_kept_pairs_are_shown_as_they_are(tmp_path):
    dropped = comparison(day=2)
    dropped.samples = [s.model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)}) for s in dropped.samples]
    put(tmp_path, unfinished=comparison().model_copy(update={"finished": None}), dropped=dropped)
    rows, skipped = history.load(tmp_path)
    assert not skipped
    first, second = words.table(rows)
    assert first["verdict"] == "ADOPT (unfinished)"
    assert second["verdict"].startswith("INCONCLUSIVE") and second["ratio"] == "no pair was kept"
    (trend,) = history.trends(rows)
    assert len(charts.trends_figure([trend]).data[0].x) == 1


def test_other_kinds_are_listed_and_not_trended(tmp_path):
    def other(kind, path):
        whole = comparison().model_dump(mode="json")
        kept = {key: whole[key] for key in ("created", "command", "environment")}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**kept, "schema": f"eagle_lab.{kind}.v2", "cells": []}))

    put(tmp_path, a=comparison())
    other("profile", tmp_path / "inner" / "profile.json")
    other("sweep", tmp_path / "sweep.json")
    rows, skipped = history.load(tmp_path)
    assert not skipped
    found = {line["file"]: line["kind"] for line in words.others(rows)}
    assert found == {"inner/profile.json": "profile", "sweep.json": "sweep"}
    assert [trend.rows[0].file for trend in history.trends(rows)] == ["a.json"]
    assert len(words.table(rows)) == 1


@pytest.mark.slow
def test_the_notebook_runs_with_no_record_and_with_all_sorts(tmp_path):
    papermill = pytest.importorskip("papermill")
    notebook = Path(__file__).parents[2] / "notebooks" / "history.ipynb"
    (tmp_path / "empty").mkdir()
    papermill.execute_notebook(
        notebook, tmp_path / "0.ipynb", {"results_dir": str(tmp_path / "empty")}, progress_bar=False
    )
    assert "There is no record here yet." in (tmp_path / "0.ipynb").read_text()
    (tmp_path / "many").mkdir()
    put(tmp_path / "many", a=comparison(), b=comparison(cpu="CPU B"), c=comparison(day=3))
    (tmp_path / "many" / "torn.json").write_text("{")
    papermill.execute_notebook(
        notebook, tmp_path / "2.ipynb", {"results_dir": str(tmp_path / "many")}, progress_bar=False
    )
    text = (tmp_path / "2.ipynb").read_text()
    assert "3 records (3 comparison) from 2 machines." in text and "skipped: torn.json" in text


def test_a_quantized_pair_is_a_workload_of_its_own():
    eight, whole = (make_record(load=load) for load in ({"quantization": "fp8"}, {}))
    found, other = (history.Compared("x", record, verdict_of(record)).workload for record in (eight, whole))
    assert (found.quantization, other.quantization) == ("fp8", "") and found != other
    assert "float32, quantization=fp8, 63 draft tokens" in words.workload_text(found)
    assert "float32, 63 draft tokens" in words.workload_text(other)
