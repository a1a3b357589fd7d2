"""What the explorer shows as HTML, held to its templates' snapshots; a model's text is escaped."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from eagle_lab.decode.generate import Cycle
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Strategy
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines import arm
from eagle_lab.notebook import cards, live
from eagle_lab.verdict.mask_check import Finding
from eagle_lab.verdict.stats import Decision, judge


def test_text_from_a_model_is_escaped():
    run = live.Run(9, tokens=[(60, 0), (98, 1), (62, 2)], texts=["<", "b", ">"])
    story = cards.story(run)
    assert "<b>" not in story and "&lt;" in story


@pytest.fixture
def run():
    cycles = [Cycle(0, (1, 2, 3), 4), Cycle(3, (4,), 5)]
    tokens = live.committed(cycles, 10, frozenset())
    stages = [{"target": 0.3, "tree_mask": 0.1}, {"target": 0.6}]
    return live.Run(10, cycles, stages, tokens, [f"#{token} " for token, _ in tokens], [1.5, 0.5])


def test_the_last_cycles_tokens_after_an_end_id_do_not_count(run):
    assert run.tokens == [(1, 0), (2, 1), (3, 2), (4, 0), (5, 0)]
    assert live.committed(run.cycles, 10, frozenset({3})) == [(1, 0), (2, 1), (3, 2)]


def test_what_a_run_shows(run, snapshot):
    snapshot("\n".join([cards.story(run), cards.html("meter", run=run), cards.run_words(run)]), "run.html")
    run.stages = []
    assert "cycles' time" not in cards.run_words(run)
    run.stopped = True
    assert "stopped" in cards.html("meter", run=run)
    assert cards.run_words(live.Run(9)).strip() == "Nothing was decoded."


def test_tau_and_the_counts_beside_it_agree(run):
    shown = re.sub("<[^>]*>", "", cards.html("meter", run=run))
    tau, tokens, cycles = re.search(r"([\d.]+) τ = (\d+) tokens / (\d+) cycles", shown).groups()
    assert float(tau) == int(tokens) / int(cycles) == run.acceptance_length == 2.0


def test_what_a_result_is_of(snapshot):
    wide = arm.Arm(Strategy("doubling"), draft="h")
    small = arm.Arm(shape=TreeShape(6, 4, 24), sampling=Sampling(0.7, 0.9, 40), draft="<o>")
    of = [
        SimpleNamespace(arms=arms, prompt=prompt, device="cpu", max_new_tokens=32)
        for arms, prompt in (((wide,), "Why <b>?" + " and why" * 40), ((small, arm.Arm(plain=True)), None))
    ]
    snapshot(
        "\n".join(
            cards.html("about", of=one, own_head="h", stale=stale)
            for one, stale in zip(of, (False, True), strict=True)
        ),
        "about.html",
    )


def test_what_goes_on_is_said(snapshot):
    so_far = judge([[(1, 1.1), (1, 1.2)] * 5])
    told = [
        cards.progress("loading", device="cuda:1"), cards.progress("reading", tokens=3021),
        cards.progress("checking", name="<mine>", count=12), cards.progress("stopped"),
        cards.progress("comparing", cycles=12, taken=0, total=6, left=None, so_far=None),
        cards.progress("comparing", cycles=40, taken=2, total=6, left=41.6, so_far=so_far),
        cards.html("rule", iterations=1, delta=0.01, same=True), cards.progress("kept", taken=1, total=6, path="results/c.json"),
        cards.progress("loading_head", head="org/<head>"),
        *map(cards.progress, ("starting", "preparing", "decoding", "agreeing", "stopping", "unsound")),
    ]  # fmt: skip
    snapshot("\n".join(told), "progress.html")


def test_cards(snapshot):
    pairs = [(1.0 + 0.01 * i, 0.8 * (1.0 + 0.01 * i) * (1 + 1e-4 * (i % 3))) for i in range(10)]
    shown = [
        cards.verdict_card(judge([some], 0.01, 0.05), "rebuild", "<mine>", "Do it.")
        for some in (pairs, pairs[:1])
    ]
    shown += [cards.finding_card(Finding("mine", fault, 3, 5)) for fault in (None, "'mine' does <so>.")]
    snapshot("\n".join([*shown, cards.problem_card("It is 1 < 2.")]), "cards.html")


@pytest.mark.parametrize(
    ("ratio", "decision"), [(0.8, Decision.ADOPT), (1.25, Decision.REVERT), (1.0, Decision.NO_DIFFERENCE)]
)
def test_a_card_has_its_decisions_colour(ratio, decision):
    pairs = [(1.0 + 0.01 * i, ratio * (1.0 + 0.01 * i) * (1 + 1e-4 * (i % 3))) for i in range(10)]
    verdict = judge([pairs], 0.01, 0.05)
    assert verdict.decision is decision
    assert cards.DECISION_COLOURS[decision] in cards.verdict_card(verdict, "a", "b", "")
