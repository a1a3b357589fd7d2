"""Records of several machines and kinds, broken and foreign files: each in its place, none fatal."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from eagle_lab.measure import old_records as records
from eagle_lab.report.charts import history as charts_history
from eagle_lab.verdict import history


def comparison(ratio=0.95, created="2026-01-01T10:00:00+00:00", cpu="CPU A", forks=5, per_fork=4, **settings):
    """A finished comparison whose candidate takes `ratio` of the time, within 0.2%."""
    samples = [
        {
            "fork": fork, "iteration": fork * per_fork + i, "prompt": "p", "control": False, "order": "baseline first",
            "baseline_s": 1.0, "candidate_s": ratio * (1 + 0.001 * ((fork + i) % 3 - 1)), "new_tokens": 50, "cycles": 20,
            "foreign_load": 0.0, "dropped": None,
        }
        for fork in range(forks) for i in range(per_fork)
    ]  # fmt: skip
    chosen = {
        "target": "org/target", "draft": "data/head", "device": "cpu", "dtype": "float32", "baseline": "rebuild",
        "candidate": "incremental", "iterations": forks * per_fork, "forks": forks, "delta": 0.01, "alpha": 0.05,
        "max_new_tokens": 50, "total_tokens": 63, "depth": 7, "top_k": 10, "looks": [], "spans": [False, False],
    }  # fmt: skip
    return {
        "schema": records.SCHEMA, "kind": "comparison", "created": created, "finished": created, "settings": {**chosen, **settings},
        "environment": {"cpu": {"name": cpu, "cores": 2, "torch_threads": 2}, "gpu": None, "commit": "0123456789abc", "dirty": False},
        "samples": samples, "parts": [], "events": [],
    }  # fmt: skip


def on_gpu(record, name="GPU G"):
    record = copy.deepcopy(record)
    record["environment"]["gpu"] = {"name": name}
    record["settings"]["device"] = "cuda"
    return record


def put(folder, **named):
    for name, record in named.items():
        records.write(record, folder / f"{name}.json")


def test_no_record_at_all(tmp_path, monkeypatch):
    rows, skipped = history.load(tmp_path)
    assert (rows, skipped, history.trends(rows)) == ([], [], [])
    assert history.overview(rows, skipped) == "There is no record here yet."
    assert "No comparison" in history.trend_words([])
    assert charts_history.trends_figure([]).layout.annotations[0].text == "no comparison recorded yet"
    monkeypatch.setattr(history, "KEPT", tmp_path / "never made")
    assert history.load() == ([], [])
    with pytest.raises(ValueError, match="is not there; name one"):
        history.load(tmp_path / "never made")


def test_one_record(tmp_path):
    put(tmp_path, a=comparison(0.95))
    rows, skipped = history.load(tmp_path)
    (trend,) = history.trends(rows)
    assert not skipped and history.overview(rows, skipped).startswith(
        "1 record (1 comparison) from 1 machine."
    )
    assert "1 record, the latest ADOPT, 0.95" in history.words(trend)
    (line,) = history.table(rows)
    assert (
        line["machine"] == "CPU A, 2 cores" and line["decision"] == "ADOPT" and line["baseline"] == "1000 ms"
    )
    assert line["candidate against baseline"] == "incremental against rebuild"


def test_machines_are_never_on_one_trend(tmp_path):
    put(
        tmp_path,
        a=comparison(0.95, "2026-01-01T10:00:00+00:00"),
        b=comparison(1.05, "2026-01-02T10:00:00+00:00", cpu="CPU B"),
        c=comparison(0.951, "2026-01-03T10:00:00+00:00"),
        d=on_gpu(comparison(0.90, "2026-01-04T10:00:00+00:00")),
    )
    rows, _ = history.load(tmp_path)
    found = history.trends(rows)
    assert {trend.machine: [row.file for row in trend.rows] for trend in found} == {
        "CPU A, 2 cores": ["a.json", "c.json"],
        "CPU B, 2 cores": ["b.json"],
        "GPU G": ["d.json"],
    }
    figure = charts_history.trends_figure(found)
    assert len({trace.yaxis or "y" for trace in figure.data}) == 3  # an axis each


def test_other_strategies_sizes_threads_and_spans_are_other_trends(tmp_path):
    threads = comparison()
    threads["environment"]["cpu"]["torch_threads"] = 1
    put(
        tmp_path,
        a=comparison(),
        b=comparison(candidate="doubling"),
        c=comparison(total_tokens=15),
        d=comparison(spans=[False, True]),
        e=threads,
        f=comparison(draft="data/other"),
        g=comparison(temperature=1.0),
    )
    found = history.trends(history.load(tmp_path)[0])
    assert [len(trend.rows) for trend in found] == [1] * 7
    assert "incremental with spans against rebuild" in {trend.pair for trend in found}


def test_a_change_between_two_records_is_said(tmp_path):
    put(
        tmp_path,
        a=comparison(0.95, "2026-01-01T10:00:00+00:00"),
        b=comparison(0.9501, "2026-01-02T10:00:00+00:00"),
    )
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert "2 records" in history.words(trend) and "as the one before" in history.words(trend)
    put(tmp_path, c=comparison(1.0, "2026-01-03T10:00:00+00:00"))
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert "does not meet that of the one before, so something changed" in history.words(trend)
    short = comparison(0.8, "2026-01-04T10:00:00+00:00", forks=1, per_fork=3)
    put(tmp_path, d=short)
    (trend,) = history.trends(history.load(tmp_path)[0])
    assert "latest INCONCLUSIVE, 0.800 (no interval)" in history.words(
        trend
    ) and "before" not in history.words(trend)
    symbols = charts_history.trends_figure([trend]).data[0].marker.symbol
    assert [symbol.endswith("-open") for symbol in symbols] == [False, False, False, True]


def test_broken_and_foreign_files_are_named_and_skipped(tmp_path):
    put(tmp_path, good=comparison())
    torn = json.dumps(comparison())[:300]
    (tmp_path / "torn.json").write_text(torn)
    (tmp_path / "latin.json").write_bytes(b'{"kind": "\xe9"}')
    (tmp_path / "foreign.json").write_text('{"name": "package", "version": 1}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "readme.txt").write_text("not looked at")
    without = comparison()
    del without["samples"]
    newer = {**comparison(), "schema": records.SCHEMA + 1}
    negative = comparison()
    negative["samples"][0]["candidate_s"] = -1.0
    no_machine = {**comparison(), "environment": None}
    put(tmp_path, without=without, newer=newer, negative=negative, no_machine=no_machine)
    put(tmp_path, undated={**comparison(), "created": "yesterday"})
    rows, skipped = history.load(tmp_path)
    assert [row.file for row in rows] == ["good.json"]
    told = "\n".join(skipped)
    for name in (
        "torn",
        "latin",
        "foreign",
        "list",
        "folder",
        "without",
        "newer",
        "negative",
        "no_machine",
        "undated",
    ):
        assert sum(sentence.startswith(f"{name}.json ") for sentence in skipped) == 1, name
    assert (
        "without.json says that it is a comparison record, but can't be used: it lacks 'samples'." in skipped
    )
    assert str(tmp_path) not in told  # a committed notebook must not tell where it ran
    assert told.count("\n") == 9 and "readme" not in told
    assert all(f"- skipped: {sentence}" in history.overview(rows, skipped) for sentence in skipped)


def test_an_unfinished_record_and_one_without_kept_pairs_are_shown_as_they_are(tmp_path):
    unfinished = comparison()
    del unfinished["finished"]
    dropped = comparison(created="2026-01-02T10:00:00+00:00")
    for sample in dropped["samples"]:
        sample["dropped"] = "other processes took 40% of the cores"
    put(tmp_path, unfinished=unfinished, dropped=dropped)
    rows, skipped = history.load(tmp_path)
    assert not skipped
    first, second = history.table(rows)
    assert first["decision"] == "ADOPT (unfinished)"
    assert (
        second["decision"].startswith("INCONCLUSIVE") and second["ratio"] == "–" and second["baseline"] == "–"
    )
    (trend,) = history.trends(rows)
    assert len(charts_history.trends_figure([trend]).data[0].x) == 1


def test_other_kinds_are_listed_and_not_trended(tmp_path):
    profile = {key: comparison()[key] for key in ("schema", "created", "environment")} | {
        "kind": "profile",
        "settings": {},
    }
    (tmp_path / "inner").mkdir()
    put(tmp_path / "inner", profile=profile)
    put(tmp_path, a=comparison(), sweep={**profile, "kind": "sweep"})
    rows, skipped = history.load(tmp_path)
    assert not skipped
    assert {line["file"]: line["kind"] for line in history.others(rows)} == {
        "inner/profile.json": "profile",
        "sweep.json": "sweep",
    }
    assert [trend.rows[0].file for trend in history.trends(rows)] == ["a.json"]
    assert len(history.table(rows)) == 1


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
    put(tmp_path / "many", a=comparison(), b=comparison(cpu="CPU B"), c={**comparison(), "kind": "profile"})
    (tmp_path / "many" / "torn.json").write_text("{")
    papermill.execute_notebook(
        notebook, tmp_path / "2.ipynb", {"results_dir": str(tmp_path / "many")}, progress_bar=False
    )
    text = (tmp_path / "2.ipynb").read_text()
    assert "3 records (2 comparison, 1 profile) from 2 machines." in text and "skipped: torn.json" in text
