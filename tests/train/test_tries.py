"""Trainings side by side: what differs, what it brought paired by prompt, and how fast they went."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from make import GOLDEN

from eagle_lab.decode.generate import generate, generate_plain
from eagle_lab.measure.acceptance import AcceptanceRecord, acceptance
from eagle_lab.measure.cluster import ENDED, ClusterFailed
from eagle_lab.measure.records import RecordError, made, read, write
from eagle_lab.models.pair import load
from eagle_lab.report.training import tries_words
from eagle_lab.train import tries
from eagle_lab.train.text import TextSettings
from eagle_lab.train.train import TrainSettings
from eagle_lab.train.tries import Tries, TriesRecord, changed, gains, gather, run_tries

TARGET = GOLDEN / "target"
TEXT = TextSettings(batch=16, answer_tokens=30, greedy_share=0.5)
TRAINING = TrainSettings(batch=4, length=64, draft_vocab=256, ttt_steps=2, lr=3e-3, steps=14, save_every=99)
PROMPTS = [[1, 124, 306], [1, 7, 9], [1, 30, 31]]


WANTED = Tries(
    name="tiny", target=str(TARGET), device="cpu", answer_tokens=600, text=asdict(TEXT), training=asdict(TRAINING),
    tries={
        "norms": {"norms": True, "loss": "lk_hybrid"},
        "greedy": {"greedy_share": 1.0},
        "hopeless": {"draft_vocab": 10**6},
    },
    options={"prompts": PROMPTS, "judged_on": PROMPTS, "max_new_tokens": 16, "sizes": [16]},
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("tries")
    made = run_tries(WANTED, out)
    assert len(made.tries) == 2 and list(made.missing) == ["hopeless"], made.missing
    return [out / name for name in ("reference", "norms", "greedy")]


def test_finished_trainings_are_not_made_again_and_what_cannot_be_trained_is_marked(folders, monkeypatch):
    again = []
    monkeypatch.setattr(tries, "make_draft", lambda **options: again.append(options["out"].name))
    found = run_tries(
        WANTED.model_copy(update={"tries": {"norms": WANTED.tries["norms"]}}), folders[0].parent
    )
    assert not again and len(found.tries) == 1 and not found.missing
    run_tries(WANTED, folders[0].parent)
    assert again == ["hopeless"]
    with pytest.raises(ValueError, match="try 'odd' sets stepz"):
        run_tries(WANTED.model_copy(update={"tries": {"odd": {"stepz": 1}}}), folders[0].parent)


class Script:
    """Tasks whose first process dies under it; the second one ends."""

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, key, function, *arguments):
        self.started.append(key)

    def answers(self):
        yield "a", RuntimeError("node died")
        if self.folder:
            (self.folder / "record.json").touch()
        yield "a", ENDED


def test_a_training_whose_node_died_goes_on_elsewhere_and_must_leave_its_record_here(tmp_path):
    calls = {"a": (1, {"out": tmp_path})}
    with pytest.raises(ClusterFailed, match="must share that folder"):
        tries._there(calls, Script(None))
    script = Script(tmp_path)
    assert tries._there(calls, script) == {} and script.started == ["a", "a"]


def test_tries_are_told_apart_by_tau_paired_by_prompt(folders, tmp_path):
    pair = load(TARGET, folders[1] / "training" / "draft", "cpu", verbose=False)
    warm = acceptance(pair, PROMPTS, 16, sizes=(16,), progress=False, temperature=1.0)
    record = AcceptanceRecord(**made("cpu"), target="t", draft="d", acceptance=warm)
    for folder in folders[:2]:
        write(record, folder / "sampled.json")
    found = gather(folders, folders[:1])
    assert [changed(t, found.reference) for t in found.tries] == [
        {"norms": True, "loss": "lk_hybrid"},
        {"greedy_share": 1.0},
    ]
    greedy, sampled = gains(found.tries[0], found.reference)
    assert greedy.tau.value == pytest.approx(
        found.tries[0].acceptance.tau - found.reference.acceptance.tau, abs=2e-4
    )
    assert (
        sampled is not None and sampled.tau.value == 0 and gains(found.tries[1], found.reference)[1] is None
    )
    rate = found.rates[0]
    assert (rate.processes, rate.batch, rate.steps) == (1, 4, 4), "the first ten steps compile"
    assert rate.rows == pytest.approx(16 / rate.seconds)
    write(found, tmp_path / "tries.json")
    assert read(tmp_path / "tries.json", TriesRecord) == found
    told = tries_words(found)
    assert (
        f"| norms True, loss lk_hybrid | {found.tries[0].acceptance.tau:.2f} | {greedy.tau.value:+.3f}"
        in told
    )


def test_a_head_with_norms_is_read_again_and_decodes_what_the_target_does(folders):
    draft = folders[1] / "training" / "draft"
    raw = json.loads((draft / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"] and raw["fc_norm"] and raw["norm_output"]
    pair = load(TARGET, draft, "cpu", verbose=False)
    assert set(pair.facts.switches) == {"fc_norm", "norm_output"}
    prompt = [1, 124, 306, 281, 69, 192]
    assert generate(pair, prompt, 12).tokens == generate_plain(pair, prompt, 12).tokens


def test_nothing_to_gather_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the reference first"):
        gather([])
    with pytest.raises(RecordError):
        gather([tmp_path])


def test_the_newest_record_of_tries_is_the_one_that_is_shown(tmp_path, folders):
    from datetime import timedelta

    from eagle_lab.measure.records import write
    from eagle_lab.report.training import tries as newest

    tried = gather(folders)
    with pytest.raises(ValueError, match="record tries"):
        newest(tmp_path)
    write(tried, tmp_path / "a.json")
    write(tried.model_copy(update={"created": tried.created + timedelta(days=1)}), tmp_path / "b.json")
    assert newest(tmp_path).created == tried.created + timedelta(days=1)
