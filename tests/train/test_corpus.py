"""Texts on disk: a stopped and resumed writing holds the texts of one that was not stopped."""

from __future__ import annotations

import itertools
import time

import pytest

from eagle_lab.models.prompts import encode, load_prompts
from eagle_lab.train import corpus
from eagle_lab.train.corpus import read_texts, write_texts
from eagle_lab.train.processes import Processes
from eagle_lab.train.text import Request, Text, TextSettings

SETTINGS = TextSettings(batch=8, answer_tokens=30, greedy_share=0.5, answer_temperature=1.0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(corpus, "PART", 200)


def clock(monkeypatch, calls):
    """The clock strikes at so many looks at it."""
    left = iter(range(calls))
    monkeypatch.setattr(corpus.time, "monotonic", lambda: 0.0 if next(left, None) is not None else 1.0)


def test_stopped_and_resumed_is_uninterrupted(tiny_pair, tmp_path, monkeypatch):
    whole = write_texts(tiny_pair.target, None, 1200, SETTINGS, tmp_path / "whole")
    assert whole >= 1200
    with monkeypatch.context() as patched:
        clock(patched, 12)
        part = write_texts(tiny_pair.target, None, 1200, SETTINGS, tmp_path / "stopped", until=0.5)
    assert 0 < part < 1200
    kept = {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
    assert (
        write_texts(tiny_pair.target, None, 1200, SETTINGS, tmp_path / "stopped", time.monotonic() + 999)
        == whole
    )
    for name, content in kept.items():
        assert (tmp_path / "stopped" / name).read_bytes() == content, "what was written stays"
    one, other = (list(read_texts(tmp_path / name, 1200)) for name in ("whole", "stopped"))
    assert one == other and len(one) > 30
    assert write_texts(tiny_pair.target, None, 1200, SETTINGS, tmp_path / "stopped") == whole, "nothing to do"


def test_each_process_writes_its_own_share(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    for rank in (0, 1):
        write_texts(tiny_pair.target, None, 600, SETTINGS, tmp_path, processes=Processes(rank, 2))
    texts = list(read_texts(tmp_path, 600))
    assert len({t.prompt for t in texts}) == len(texts)
    assert {path.name[:9] for path in tmp_path.glob("*.safetensors")} == {"random-00", "random-01"}


@pytest.mark.parametrize("fault", ["answers end at once", "no question ends", "one question for ever"])
def test_text_without_end_is_an_error(tiny_pair, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(corpus, "IN_VAIN", 20)
    if fault == "answers end at once":
        monkeypatch.setattr(corpus, "end_ids", lambda target: list(range(3, 512)))
    else:
        text = None if fault == "no question ends" else Text((5, 6), tuple(range(30)))
        monkeypatch.setattr(corpus, "write", lambda *_: ((number, text) for number in itertools.count()))
    with pytest.raises(ValueError, match="20 texts in a row can't be learnt from"):
        write_texts(tiny_pair.target, None, 200, SETTINGS, tmp_path)
    assert read_texts(tmp_path, 200).answer_tokens == (30 if fault == "one question for ever" else 0), "kept"


def test_other_settings_are_refused(tiny_pair, tmp_path):
    write_texts(tiny_pair.target, None, 100, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="holds texts of other settings"):
        write_texts(tiny_pair.target, None, 100, TextSettings(seed=9), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/texts can't be made \(Not a directory\)"):
        write_texts(tiny_pair.target, None, 100, SETTINGS, tmp_path / "file" / "texts")


class Letters:
    """A tokenizer of the tiny target: one id a word, with a chat template."""

    chat_template = "yes"

    def apply_chat_template(self, turns, add_generation_prompt, tokenize=True, return_dict=True):
        text = f"<u> {turns[0]['content']} </u>"
        return text if not tokenize else self(text, False).input_ids

    def __call__(self, text, add_special_tokens):
        return type("Encoded", (), {"input_ids": [3 + hash(w) % 500 for w in text.split()]})()


def test_nothing_twice_and_nothing_held_out(tiny_pair, tmp_path, monkeypatch):
    tokenizer = Letters()
    train, held = load_prompts("train")[:3], load_prompts("heldout")[:3]
    # requests that would ask what is held out, and each of them twice
    asked = [Request(tuple(encode(tokenizer, p.text))) for p in (*train, *held, *train)]
    stream = corpus.Stream("open", sorted(asked, key=lambda r: -len(r.opening)), SETTINGS)
    monkeypatch.setattr(corpus, "streams", lambda *_: [stream])
    write_texts(tiny_pair.target, tokenizer, 10_000, SETTINGS, tmp_path)
    prompts = [t.prompt for t in read_texts(tmp_path, 10_000)]
    assert sorted(prompts) == sorted(tuple(encode(tokenizer, p.text)) for p in train)


def test_the_training_prompts_come_first_and_greedily(tiny_pair):
    own, questions = corpus.streams(tiny_pair.target, Letters(), SETTINGS)
    assert (own.name, questions.name) == ("prompts", "open") and own.settings.greedy_share == 1.0
    assert len(own.requests) == len(load_prompts("train"))
    lengths = [len(r.opening) for r in own.requests]
    assert lengths == sorted(lengths, reverse=True)
    assert next(iter(questions.requests)).middle
