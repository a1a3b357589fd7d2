"""What the explorer shows as HTML, held to its templates' snapshots; a model's text is escaped."""

from __future__ import annotations

import pytest

from eagle_lab.decode.generate import Cycle
from eagle_lab.notebook import cards, live
from eagle_lab.verdict.mask_check import Finding
from eagle_lab.verdict.stats import Decision, judge


class Letters:
    """Token 7 and 8 are the two bytes of one character."""

    def decode(self, ids):
        return b"".join(b"\xc3" if i == 7 else b"\xa9" if i == 8 else bytes([i]) for i in ids).decode(
            errors="replace"
        )


def test_a_character_of_two_tokens_comes_with_its_second():
    assert cards.pieces(Letters(), [65, 7, 8, 66]) == ["A", "", "é", "B"]


def test_text_from_a_model_is_escaped():
    run = live.Run((1,), {}, tokens=[(60, 0), (98, 1), (62, 2)])
    story = cards.story(run, Letters())
    assert "<b>" not in story and "&lt;" in story


@pytest.fixture
def run():
    cycles = [Cycle(0, (1, 2, 3), 4), Cycle(3, (4,), 5)]
    tokens = live.committed(cycles, 10, frozenset())
    stages = [{"target": 0.3, "tree_mask": 0.1}, {"target": 0.6}]
    return live.Run((1,), {}, cycles, stages, tokens, 2.0)


def test_the_last_cycles_tokens_after_an_end_id_do_not_count(run):
    assert run.tokens == [(1, 0), (2, 1), (3, 2), (4, 0), (5, 0)]
    assert live.committed(run.cycles, 10, frozenset({3})) == [(1, 0), (2, 1), (3, 2)]


def test_what_a_run_shows(run, snapshot):
    shown = [cards.legend(12), cards.story(run, None), cards.meter(run, done=True), cards.run_words(run)]
    snapshot("\n".join(shown), "run.html")
    run.stages = []
    assert "cycles' time" not in cards.run_words(run)
    assert "running" in cards.meter(run, done=False)
    run.stopped = True
    assert "stopped" in cards.meter(run, done=True)
    assert cards.run_words(live.Run((1,), {})).strip() == "Nothing was decoded."


def test_cards(snapshot):
    pairs = [(1.0 + 0.01 * i, 0.8 * (1.0 + 0.01 * i) * (1 + 1e-4 * (i % 3))) for i in range(10)]
    shown = [
        cards.verdict_card(judge([some], 0.01, 0.05), "rebuild", "<mine>", "Do it.")
        for some in (pairs, pairs[:1])
    ]
    shown += [cards.finding_card(Finding("mine", fault, 3, 5)) for fault in (None, "'mine' does <so>.")]
    snapshot("\n".join([*shown, cards.problem_card("It is 1 < 2.")]), "cards.html")
    assert "<mine>" not in shown[0] and "1 pair in 1 process" in shown[1]


@pytest.mark.parametrize(
    ("ratio", "decision"), [(0.8, Decision.ADOPT), (1.25, Decision.REVERT), (1.0, Decision.NO_DIFFERENCE)]
)
def test_a_card_has_its_decisions_colour(ratio, decision):
    pairs = [(1.0 + 0.01 * i, ratio * (1.0 + 0.01 * i) * (1 + 1e-4 * (i % 3))) for i in range(10)]
    verdict = judge([pairs], 0.01, 0.05)
    assert verdict.decision is decision
    assert cards.DECISION_COLOURS[decision] in cards.verdict_card(verdict, "a", "b", "")


def test_the_finding_card_is_green_or_red():
    assert cards.GREEN in cards.finding_card(Finding("mine", None, 3, 5))
    assert cards.RED in cards.finding_card(Finding("mine", "'mine' differs", 3, 5))
