"""One call from a target to a record, which the clock may stop at any stage."""

from __future__ import annotations

from make import GOLDEN
from typer.testing import CliRunner

from eagle_lab.__main__ import app
from eagle_lab.measure.records import read
from eagle_lab.models.pair import load
from eagle_lab.train import make_draft as module
from eagle_lab.train.make_draft import Made, TrainingRecord, make_draft
from eagle_lab.train.text import TextSettings
from eagle_lab.train.train import TrainSettings

TARGET = GOLDEN / "target"
TEXT = TextSettings(batch=16, answer_tokens=30, greedy_share=1.0)
TRAINING = TrainSettings(batch=4, length=64, draft_vocab=256, ttt_steps=2, lr=3e-3, steps=4, check_every=2)
PROMPTS = [[1, 124, 306], [1, 7, 9]]


def made(out, **changes):
    options = {"growth": [0.5], **changes}
    return make_draft(TARGET, out, 600, TEXT, TRAINING, "cpu", PROMPTS, PROMPTS[:1], 16, (16, 7), **options)


def test_from_target_to_record_stopped_at_every_stage(tmp_path):
    stopped = made(tmp_path, minutes=0)
    assert (stopped.record, stopped.stage, stopped.left) == (None, "text", 600)
    whole = made(tmp_path).record
    assert read(tmp_path / "record.json", TrainingRecord) == whole
    assert [c.step for c in whole.checks] == [2, 4] and len(whole.history) == 4
    assert whole.chosen == max(whole.checks, key=lambda c: (c.tau, -c.step)).step
    assert set(whole.acceptance.by_tree_size) == {16, 7}
    assert len(whole.growth) == 1 and whole.growth[0].answer_tokens < whole.settings.answer_tokens
    pair = load(TARGET, tmp_path / "training" / "draft", device="cpu", verbose=False)
    assert pair.head.config.draft_vocab_size == 256
    again = made(tmp_path).record
    assert again.acceptance == whole.acceptance, "a finished run is taken as it is"


def test_the_clock_stops_training_too(tmp_path):
    made(tmp_path, growth=[])
    late = make_draft(
        TARGET, tmp_path / "late", 600, TEXT, TrainSettings(**{**vars(TRAINING), "steps": 30}), "cpu", PROMPTS, None,
        16, (16,), texts=tmp_path / "texts", minutes=0,
    )  # fmt: skip
    assert (late.stage, late.left) == ("training", 28), "it looks at the clock where it judges the head"


def test_the_command_line_says_what_is_left(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "make_draft", lambda *given, **_: seen.append(given) or Made(None, "text", 600)
    )
    common = ["train", "--target", str(TARGET), "--out", str(tmp_path), "--answer-tokens", "600"]
    done = CliRunner().invoke(app, [*common, "--text", "batch=16", "--training", "steps=4", "--minutes", "0"])
    assert done.exit_code == 0 and "600 answer tokens are left" in done.stdout
    assert seen[0][2:5] == (600, TextSettings(batch=16), TrainSettings(steps=4))


def test_a_target_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path):
    """The kit's prompts are texts: without a tokenizer no head could be measured on them."""
    out = tmp_path / "work"
    done = CliRunner().invoke(app, ["train", "--target", str(TARGET), "--out", str(out), "--device", "cpu"])
    assert done.exit_code == 1 and "no tokenizer" in done.stderr and not out.exists()
