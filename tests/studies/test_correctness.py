"""The proof for a pair: it passes for a correct one, fails where something is wrong, and a failure is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.acceptance import by_depth
from eagle_lab.measure.records import Difference
from eagle_lab.models.prompts import Prompt
from eagle_lab.studies import correctness
from eagle_lab.studies.correctness import IncorrectPair, MaskCheck, Outcome, against_plain, require

PROMPTS = [
    Prompt("one", "maths", "", (1, 124, 306, 281, 69, 192, 471, 312)),
    Prompt("two", "code", "", (1, 5, 77, 230)),
]


def how(tokens=24, strategy="rebuild", **sampling):
    return Decoding.of(tokens, strategy, top_k=4, depth=3, total_tokens=16, **sampling)


@pytest.fixture(scope="module")
def greedy(tiny_pair):
    return against_plain(tiny_pair, PROMPTS, how())


def test_a_correct_pair_passes(tiny_pair, greedy):
    check, runs = greedy
    assert (check.outcome, check.prompts, check.differences) == (Outcome.PASSED, 2, ())
    assert check.name == "greedy decoding, rebuild" and check.tokens > 24
    sampled, _ = against_plain(tiny_pair, PROMPTS, how(temperature=0.8, top_p=0.9, seed=1))
    assert sampled.outcome == Outcome.PASSED and sampled.name == "sampled decoding, same seed, rebuild"
    masks = correctness.builders(tiny_pair, runs[0])
    assert {c.builder for c in masks} == set(MASK_BUILDERS)
    assert {c.outcome for c in masks} <= {Outcome.PASSED, Outcome.SKIPPED}
    assert all(c.trees > 0 for c in masks if c.outcome == Outcome.PASSED)
    fit = correctness.consistent(runs)
    assert fit.outcome == Outcome.PASSED and fit.cycles == sum(map(len, runs))
    require([check, sampled, fit, *masks])


@pytest.fixture
def one_wrong_token(monkeypatch):
    """EAGLE-3's sixth new token is another than it was, with any strategy but `walk`."""
    honest = correctness.decode

    def wrong(pair, ids, decoding):
        found = honest(pair, ids, decoding)
        found.tokens[5] = (found.tokens[5] + (decoding.strategy.mask != "walk")) % 512
        return found

    monkeypatch.setattr(correctness, "decode", wrong)


def test_decoding_fails_where_a_token_differs_and_its_runs_still_have_a_table(tiny_pair, one_wrong_token):
    check, runs = against_plain(tiny_pair, PROMPTS, how(12))
    assert check.outcome == Outcome.FAILED
    ((prompt, where),) = check.differences
    assert prompt == "one" and where.position == 5 and where.margin > where.tolerance
    with pytest.raises(IncorrectPair, match=r"1 of 1 checks failed: greedy decoding, rebuild\."):
        require([check])
    rows = correctness.acceptance_rows(PROMPTS, runs)
    assert len(runs) == 1 and [row.category for row in rows] == ["maths", None]


def test_another_strategy_stands_beside_the_first_against_the_same_plain_decoding(
    tiny_pair, monkeypatch, one_wrong_token
):
    plans = correctness.arms("walk", "doubling,attention=tree", "cpu")
    assert plans == ["walk", "doubling,attention=tree"] and correctness.arms("walk", None, None) == ["walk"]
    plain, alone = correctness.decode_plain, []

    def seen(pair, ids, decoding):
        alone.append(str(decoding.strategy))
        return plain(pair, ids, decoding)

    monkeypatch.setattr(correctness, "decode_plain", seen)
    checks = [against_plain(tiny_pair, PROMPTS[:1], how(8, one), plans[0])[0] for one in plans]
    assert len(set(alone)) == 1 and "walk" in alone[0]
    assert [c.outcome for c in checks] == [Outcome.PASSED, Outcome.FAILED]
    with pytest.raises(
        IncorrectPair, match="1 of 2 checks failed: greedy decoding, .*doubling,attention=tree"
    ):
        require(checks)


@pytest.mark.parametrize(
    ("strategy", "beside", "words"),
    [
        ("rebuilt", None, "did you mean 'rebuild'"),
        ("rebuild", "mask=cuda", "mask=cuda needs a CUDA GPU"),
        *(
            ("walk", same, f"beside is '{same}', the same")
            for same in ("walk", "mask=walk", "walk,runtime=eager")
        ),
    ],
)
def test_strategies_are_refused_before_anything_is_loaded(strategy, beside, words):
    with pytest.raises(ValueError, match=words):
        correctness.arms(strategy, beside, "cpu")


def test_a_tie_fails_in_float32_on_the_cpu_and_is_kept_elsewhere(tiny_pair, monkeypatch):
    tie = Difference(position=3, left=1, right=2, margin=0.0, tolerance=0.1)
    monkeypatch.setattr(correctness, "agree", lambda *args: tie)
    assert against_plain(tiny_pair, PROMPTS, how(8))[0].outcome == Outcome.FAILED
    monkeypatch.setattr(correctness, "exact", lambda pair: False)
    check, _ = against_plain(tiny_pair, PROMPTS, how(8))
    assert check.outcome == Outcome.PASSED and check.differences == (("one", tie), ("two", tie))


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_the_distribution_on_a_real_tree(tiny_pair, greedy, sampling):
    check = correctness.sampling_distribution(
        tiny_pair, PROMPTS[0], greedy[1][0][0], [], how(seed=0, **sampling), 200_000
    )
    assert check.outcome == Outcome.PASSED and check.forward and check.draws == 200_000
    assert check.p_values[0][0] is None and len(check.p_values) > 1


def test_the_distribution_fails_for_a_wrong_tree_mask(tiny_pair, greedy, monkeypatch):
    """Every node sees its siblings: the second token's distribution is wrong, and the chi-square says so."""

    def blind(parents):
        mask = rebuild(parents)
        mask[:, : mask.shape[0] // 2] = True
        return mask

    monkeypatch.setattr(correctness, "rebuild", blind)
    logits = correctness.node_logits(tiny_pair, PROMPTS[0].ids, greedy[1][0][0], "sdpa")
    monkeypatch.setattr(correctness, "node_logits", lambda *args: logits)
    monkeypatch.setattr(correctness, "rebuild", rebuild)  # acceptance itself is right
    check = correctness.sampling_distribution(
        tiny_pair, PROMPTS[0], greedy[1][0][0], [], how(temperature=1.0, seed=0), 200_000
    )
    assert check.outcome == Outcome.FAILED and min(p for _, p in check.p_values) <= check.least


def test_p_values():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    drawn = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert correctness.p_value(drawn, p) > 0.001
    assert correctness.p_value(drawn, torch.tensor([0.47, 0.33, 0.2, 0.0], dtype=torch.float64)) < 1e-6
    assert correctness.p_value(torch.tensor([0, 3]), p) == 0.0
    assert correctness.p_value(torch.tensor([0, -1]), p) == 0.0


def test_a_wrong_builder_fails(tiny_pair, monkeypatch):
    def lazy(parents):
        return torch.eye(len(parents) + 1, dtype=torch.bool)

    monkeypatch.setitem(MASK_BUILDERS, "lazy", lazy)
    found = {c.builder: c for c in correctness.builders(tiny_pair, [])}
    assert found["lazy"].outcome == Outcome.FAILED and found["lazy"].fault
    assert found["rebuild"].outcome == Outcome.PASSED and found["rebuild"].fault is None
    with pytest.raises(IncorrectPair, match="mask lazy"):
        require(list(found.values()))


def test_cycles_that_do_not_fit_together(greedy):
    runs = greedy[1]
    moved = [[runs[0][0], replace(runs[0][1], prefix=99)]]
    assert correctness.consistent(moved).fault == ("gap", 99)
    alien = [[replace(runs[0][0], committed=(runs[0][0].committed[0], 511))]]
    found = correctness.consistent(alien)
    assert found.fault == ("path", runs[0][0].prefix) and found.outcome == Outcome.FAILED


def test_skipped_is_no_failure():
    require([MaskCheck("a", Outcome.PASSED, 3), MaskCheck("b", Outcome.SKIPPED, fault="needs a GPU")])


def test_acceptance_by_category_and_depth(greedy):
    runs = greedy[1]
    rows = correctness.acceptance_rows(PROMPTS, runs)
    assert [row.category for row in rows] == ["maths", "code", None]
    every = [cycle for cycles in runs for cycle in cycles]
    assert rows[-1].tau == pytest.approx(sum(len(c.committed) for c in every) / len(every))
    assert by_depth(every, 3)[0].reached == len(every) == rows[-1].cycles
