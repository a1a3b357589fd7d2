"""Works that can be stopped, a watched decode, and the texts of its tokens."""

from __future__ import annotations

import threading

import pytest
from make import byte_tokenizer

from eagle_lab.decode.generate import Cycle
from eagle_lab.notebook import live
from eagle_lab.runtime.clock import no_span


def test_texts_add_up_to_the_text_and_a_character_comes_whole():
    tokenizer = byte_tokenizer()
    text = "A naïve café: 12 €, 天気, 🦅 and\n\n  more. " * 8
    ids, pieces = tokenizer.encode(text), live.Pieces(tokenizer)
    for token in ids:
        pieces.add([token])
    assert "".join(pieces.texts) == text and "🦅" in pieces.texts and len(pieces.texts) == len(ids)
    without = live.Pieces(None)
    without.add([3, 4])
    assert without.texts == ["#3 ", "#4 "]


def test_one_work_at_a_time_which_ends_where_it_asks():
    work, begun, ended = live.Work(), threading.Event(), []

    def job():
        begun.set()
        try:
            while True:
                work.go_on()
        except live.Stopped:
            ended.append(True)

    work.start(job)
    assert begun.wait(10) and work.running
    with pytest.raises(RuntimeError, match="still going on"):
        work.start(job)
    work.stop()
    assert work.wait(10) and ended == [True]
    assert work.start(lambda: 3, wait=True) == 3  # an old stop doesn't end a new work


def test_the_watchers_own_time_is_not_the_decodes(tiny_pair, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(live, "perf_counter", lambda: next(clock))
    run = live.Run(limit=6)

    def slow(_):
        for _ in range(10):
            next(clock)

    cycles = [Cycle(0, (11, 12, 13), 14), Cycle(3, (14,), 15), Cycle(4, (15, 16, 17), 18)]
    live.watch(tiny_pair, run, lambda span: (c for c in cycles), lambda: None, slow)
    assert run.cycle_s == [1, 1, 1]
    assert run.speed == 2.0  # 4 tokens in the two seconds after the first cycle
    assert run.committed == 7 and run.acceptance_length == 7 / 3
    assert [token for token, _ in run.tokens] == [11, 12, 13, 14, 15, 16]


def test_a_stop_closes_the_decode_and_marks_the_run(tiny_pair):
    closed = []

    def stream(span):
        assert span("draft") is not no_span
        try:
            while True:
                yield Cycle(0, (11, 12), 13)
        finally:
            closed.append(True)

    def stop(run):
        if len(run.cycles) == 3:
            raise live.Stopped

    run = live.Run(limit=50)
    live.watch(tiny_pair, run, stream, lambda: None, stop)
    assert run.stopped and len(run.cycles) == 3 and closed == [True]
