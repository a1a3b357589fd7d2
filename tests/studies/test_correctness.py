"""The proof for a pair: green on a correct one, red where something is wrong, and red is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.sampling import Sampling
from eagle_lab.models.prompts import Prompt
from eagle_lab.report.charts.head import acceptance_figure
from eagle_lab.studies import correctness
from eagle_lab.studies.correctness import Check, IncorrectPair, require

PROMPTS = [
    Prompt("one", "maths", "", (1, 124, 306, 281, 69, 192, 471, 312)),
    Prompt("two", "code", "", (1, 5, 77, 230)),
]
SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}


@pytest.fixture(scope="module")
def greedy(tiny_pair):
    return correctness.decoding(tiny_pair, PROMPTS, 24, SIZES)


def test_a_correct_pair_is_green(tiny_pair, greedy):
    check, runs = greedy
    assert check.ok and "2 prompts" in check.words and "the same as the target alone" in check.words
    sampled, _ = correctness.decoding(tiny_pair, PROMPTS, 24, SIZES, temperature=0.8, top_p=0.9, seed=1)
    assert sampled.ok and sampled.name == "sampled decoding, same seed, rebuild"
    masks = correctness.builders(tiny_pair, runs[0])
    assert {c.name for c in masks} == {f"mask {name}" for name in MASK_BUILDERS} and all(
        c.ok is not False for c in masks
    )
    fit = correctness.consistent(runs)
    assert fit.ok
    words = require([check, sampled, fit, *masks])
    assert "checks are green" in words


@pytest.fixture
def one_wrong_token(monkeypatch):
    """EAGLE-3's sixth new token is another than it was."""
    honest = correctness.generate

    def wrong(*args, **options):
        found = honest(*args, **options)
        found.tokens[5] = (found.tokens[5] + 1) % 512
        return found

    monkeypatch.setattr(correctness, "generate", wrong)


def test_greedy_is_red_where_a_token_differs(tiny_pair, one_wrong_token):
    check, _ = correctness.decoding(tiny_pair, PROMPTS, 12, SIZES)
    assert check.ok is False and "prompt one: new token 5" in check.words and "margin" in check.words
    with pytest.raises(IncorrectPair, match="1 of 1 checks are red. greedy decoding, rebuild: prompt one"):
        require([check])


def test_a_red_run_that_ended_early_still_has_a_table(tiny_pair, one_wrong_token):
    _, runs = correctness.decoding(tiny_pair, PROMPTS, 12, SIZES)
    rows = correctness.acceptance_rows(PROMPTS, runs)
    assert len(runs) == 1 and [row["prompts"] for row in rows] == ["maths", "all"]


def test_another_strategy_stands_beside_the_first_against_the_same_plain_decoding(tiny_pair, monkeypatch):
    plans = correctness.arms("rebuild", "doubling,attention=tree", "cpu")
    assert plans == ["rebuild", "doubling,attention=tree"] and correctness.arms("walk", None, None) == [
        "walk"
    ]
    plain, eagle, decoded = correctness.generate_plain, correctness.generate, []

    def seen(pair, ids, count, *, strategy, **options):
        decoded.append(("plain", strategy))
        return plain(pair, ids, count, strategy=strategy, **options)

    def wrong(pair, ids, count, *, strategy, **options):
        decoded.append(("eagle", strategy))
        found = eagle(pair, ids, count, strategy=strategy, **options)
        found.tokens[5] = (found.tokens[5] + (strategy != "rebuild")) % 512
        return found

    monkeypatch.setattr(correctness, "generate_plain", seen)
    monkeypatch.setattr(correctness, "generate", wrong)
    checks = [correctness.decoding(tiny_pair, PROMPTS[:1], 8, SIZES, one, plans[0])[0] for one in plans]
    assert decoded == [("plain", "rebuild"), ("eagle", plans[0]), ("plain", "rebuild"), ("eagle", plans[1])]
    assert [c.name for c in checks] == [
        "greedy decoding, rebuild",
        "greedy decoding, doubling,attention=tree",
    ]
    assert [c.ok for c in checks] == [True, False] and "attention=tree: RED.**" in correctness.said(checks)
    with pytest.raises(
        IncorrectPair, match="1 of 2 checks are red. greedy decoding, doubling,attention=tree"
    ):
        require(checks)


@pytest.mark.parametrize(
    ("strategy", "beside", "words"),
    [
        ("rebuilt", None, "did you mean 'rebuild'"),
        ("rebuild", "mask=cuda", "mask=cuda needs a CUDA device"),
        ("walk", "mask=walk", "beside is 'mask=walk', the same as the strategy"),
    ],
)
def test_strategies_are_refused_before_anything_is_loaded(strategy, beside, words):
    with pytest.raises(ValueError, match=words):
        correctness.arms(strategy, beside, "cpu")


def test_a_tie_is_red_in_float32_on_the_cpu_and_told_elsewhere(tiny_pair, monkeypatch):
    from eagle_lab.verdict.agreement import Difference

    monkeypatch.setattr(correctness, "agree", lambda *args, **options: Difference(3, 1, 2, 0.0, 0.1))
    assert correctness.decoding(tiny_pair, PROMPTS, 8, SIZES)[0].ok is False
    monkeypatch.setattr(correctness, "exact", lambda pair: False)
    check, _ = correctness.decoding(tiny_pair, PROMPTS, 8, SIZES)
    assert check.ok and "near ties" in check.words and "new token 3" in check.words


def test_the_distribution_on_a_real_tree(tiny_pair, greedy):
    cycle = greedy[1][0][0]
    for sampling in (Sampling(1.0), Sampling(0.7, 0.9)):
        check = correctness.sampling_distribution(
            tiny_pair, PROMPTS[0], cycle, [], sampling, 200_000, 0, attention="sdpa"
        )
        assert check.ok and "200,000 draws" in check.words and "second token after" in check.words


def test_the_distribution_is_red_for_a_wrong_tree_mask(tiny_pair, greedy, monkeypatch):
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
        tiny_pair, PROMPTS[0], greedy[1][0][0], [], Sampling(1.0), 200_000, 0, attention="sdpa"
    )
    assert check.ok is False


def test_p_values():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    drawn = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert correctness.p_value(drawn, p) > 0.001
    assert correctness.p_value(drawn, torch.tensor([0.47, 0.33, 0.2, 0.0], dtype=torch.float64)) < 1e-6
    assert correctness.p_value(torch.tensor([0, 3]), p) == 0.0
    assert correctness.p_value(torch.tensor([0, -1]), p) == 0.0


def test_a_wrong_builder_is_red(tiny_pair, monkeypatch):
    def lazy(parents):
        return torch.eye(len(parents) + 1, dtype=torch.bool)

    monkeypatch.setitem(MASK_BUILDERS, "lazy", lazy)
    found = {c.name: c for c in correctness.builders(tiny_pair, [])}
    assert found["mask lazy"].ok is False and found["mask rebuild"].ok
    with pytest.raises(IncorrectPair, match="mask lazy"):
        require(list(found.values()))


def test_cycles_that_do_not_fit_together(greedy):
    runs = greedy[1]
    assert correctness.consistent(runs).ok
    moved = [[runs[0][0], replace(runs[0][1], prefix=99)]]
    assert correctness.consistent(moved).ok is False
    alien = [[replace(runs[0][0], committed=(runs[0][0].committed[0], 511))]]
    assert "no path" in correctness.consistent(alien).words


def test_skipped_is_neither_green_nor_red():
    checks = [Check("a", True, "fine"), Check("b", None, "needs a GPU")]
    assert require(checks).startswith("**1 checks are green, 1 could not run here.**")
    assert [c.sign for c in checks] == ["green", "skipped"]
    page = correctness.html([*checks, Check("c", False, "broken")])
    assert all(word in page for word in ("green", "skipped", "RED", "broken"))


def test_acceptance_by_category_and_depth(greedy):
    runs = greedy[1]
    rows = correctness.acceptance_rows(PROMPTS, runs)
    assert [row["prompts"] for row in rows] == ["maths", "code", "all"]
    every = [cycle for cycles in runs for cycle in cycles]
    assert rows[-1]["τ"] == round(sum(len(c.committed) for c in every) / len(every), 2)
    depths = correctness.depth_rows(runs, 3)
    assert depths[0]["reached"] == len(every)
    figure = acceptance_figure(rows, depths)
    assert len(figure.data) == 2 and len(figure.data[0].x) == 3
