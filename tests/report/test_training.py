"""A trained head in words: the shipped card is what its records say, and shipping copies head, card and record."""

from __future__ import annotations

import pytest
from make import GOLDEN
from typer.testing import CliRunner

from eagle_lab.__main__ import app
from eagle_lab.measure.records import RecordError, read, write
from eagle_lab.models.pair import DEFAULT_DRAFT, load
from eagle_lab.report.charts.head import training_figure
from eagle_lab.report.training import (
    acceptance_rows,
    alike,
    card,
    grown,
    growth_words,
    per_fourfold,
    ship,
    training_words,
    trainings,
)
from eagle_lab.train.make_draft import TrainingRecord, make_draft
from eagle_lab.train.text import TextSettings
from eagle_lab.train.train import Step, TrainSettings

TARGET = GOLDEN / "target"


def test_the_shipped_card_is_what_its_records_say():
    *others, record = trainings().values()
    assert (DEFAULT_DRAFT / "README.md").read_text() == card(record, DEFAULT_DRAFT.name, others)
    points = grown(trainings().values())
    shared = set.intersection(*(set(r.acceptance.by_prompt) for r in (*others, record)))
    found = record.acceptance.on(shared)
    assert (points[-1].tau, points[-1].prompts) == (found.value, len(shared))
    assert len(points) > len(others) + 1
    # a head with norms is on no line with those without
    without = alike(points)
    assert [p.norms for p in points] == [False] * len(without) + [True] and points[:-1] == without
    slope, low, high = per_fourfold(points)
    assert (slope, low, high) == per_fourfold(without)
    assert 0.3 < low < slope < high < 1 and f"{slope:+.2f}" in growth_words(points)
    assert per_fourfold(points[:2]) is None
    assert [p.answer_tokens for p in without] == sorted(p.answer_tokens for p in without)
    brought = without[-1].tau - without[-2].tau
    assert f"{brought:+.2f} at the end" in growth_words(points)
    assert "was not measured" in growth_words(points[-1:])
    assert acceptance_rows(record)[0] == {"draft nodes": 63, "τ": round(record.acceptance.tau, 2)}


def test_the_head_of_a_training_is_shipped_with_its_card(tmp_path):
    settings = TrainSettings(
        batch=4, length=64, draft_vocab=256, ttt_steps=2, lr=3e-3, steps=4, check_every=2
    )
    text = TextSettings(batch=16, answer_tokens=30, greedy_share=1.0)
    prompts = [[1, 124, 306], [1, 7, 9]]
    with pytest.raises(RecordError, match="is not there"):
        ship(tmp_path, tmp_path / "shipped", tmp_path / "train.json")
    record = make_draft(TARGET, tmp_path, 600, text, settings, "cpu", prompts, prompts, 16, (16,)).record
    ship(tmp_path, tmp_path / "shipped", tmp_path / "train.json")
    assert read(tmp_path / "train.json", TrainingRecord) == record
    assert load(TARGET, tmp_path / "shipped", device="cpu", verbose=False).head.config.draft_vocab_size == 256
    text = (tmp_path / "shipped" / "README.md").read_text()
    assert f"τ = **{record.acceptance.tau:.2f}**" in text and record.command in text
    assert f"that of step {record.chosen}, chosen by τ" in text and "was not measured for this head" in text


def test_shipping_keeps_the_record_of_another_text_and_says_what_is_older(tmp_path, monkeypatch):
    record = list(trainings().values())[-1]
    write(record, tmp_path / "train.json")
    (tmp_path / "out" / "training" / "draft").mkdir(parents=True)
    more = record.settings.model_copy(update={"answer_tokens": 64_000_000})
    write(record.model_copy(update={"settings": more}), tmp_path / "out" / "record.json")
    (tmp_path / "profile.json").write_text('{"settings": {"draft": "data/mine"}}')
    (tmp_path / "other.json").write_text('{"settings": {"draft": "data/theirs"}}')
    words = [
        "ship", str(tmp_path / "out"), "--draft", str(tmp_path / "mine"), "--record",
        str(tmp_path / "train.json"),
    ]  # fmt: skip
    made = []
    monkeypatch.setattr("eagle_lab.__main__.record_trees", lambda: made.append("trees"))
    monkeypatch.setattr("eagle_lab.report.readme.stale", lambda root: made.append("docs") or {})
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "`: profile.json.\n" in done.stdout and "recorded trees" not in done.stdout and not made
    kept = {path.name: read(path, TrainingRecord) for path in tmp_path.glob("train*.json")}
    assert {name: r.settings.answer_tokens for name, r in kept.items()} == {
        "train.json": 64_000_000,
        f"train-{record.settings.answer_tokens / 1e6:.0f}m.json": record.settings.answer_tokens,
    }
    learnt = 64_000_000 + record.settings.training["start_tokens"]
    assert f"| {learnt:,} |" in (tmp_path / "mine" / "README.md").read_text()
    monkeypatch.setattr("eagle_lab.models.pair.DEFAULT_DRAFT", tmp_path / "mine")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and made == ["trees", "docs"] and "the recorded trees, README" in done.stdout


def test_the_course_of_a_training():
    steps = [
        Step(step=i, lr=1e-3, loss=9.0 - i / 10, accuracy=[i / 50, i / 80], tokens=9, seconds=1.0)
        for i in range(1, 41)
    ]
    told = training_words(steps)
    assert (
        "The loss fell: 8.85 at the start, 5.05 at the end of 40 steps" in told
        and "79% of the time (3%" in told
    )
    figure = training_figure(steps)
    assert [trace.name for trace in figure.data] == ["loss", "draft step 1", "draft step 2"]
    with pytest.raises(ValueError, match="history is empty"):
        training_figure([])
