"""Does the part account for the whole? The original investigation's own figures are the case that must be flagged."""

from __future__ import annotations

import math

import pytest

from eagle_lab.verdict.consistency import consistency, contradiction, implied_calls

SEED = {"part_s": (0.20e-3, 2.23e-3), "whole_s": (1197.73e-3, 1260.66e-3), "shares": (0.02, 0.20)}


def test_the_original_investigations_figures_need_three_different_numbers_of_calls():
    calls = implied_calls(**SEED)
    assert calls == pytest.approx((31.0, 119.8, 113.1), abs=0.05)
    words = contradiction(**SEED, most_calls=51)  # 50 tokens: a tree for the prompt and at most one a token
    assert "+62.93 ms of the whole at +2.03 ms a call are 31 calls, thus shares of 0.5% and 5.5%" in words
    assert "120 and 113 calls, thus +229.52 ms to +243.14 ms of the whole" in words
    assert "at most 51 calls" in words
    assert contradiction(**SEED) is not None  # even with no bound on the calls


def test_figures_that_fit_are_not_flagged():
    # 31 calls carry the +63 ms; rounded shares as one would print them
    assert contradiction(SEED["part_s"], SEED["whole_s"], (0.005, 0.055), most_calls=51) is None
    assert contradiction(SEED["part_s"], SEED["whole_s"], (0.005, 0.055), most_calls=20) is not None


def test_a_slower_part_in_a_faster_whole_is_flagged():
    assert contradiction((1e-3, 2e-3), (1.0, 0.9), (0.1, 0.2)) is not None


@pytest.mark.parametrize("part", [(1e-3, 1e-3), (0.0, 1e-3), (math.nan, 1e-3)])
def test_implied_calls_refuses_what_it_cannot_divide_by(part):
    with pytest.raises(ValueError):
        implied_calls(part, (1.0, 1.1), (0.1, 0.2))


def test_consistency_with_31_calls_and_not_with_115():
    whole = (55e-3, 62.93e-3, 71e-3)
    found = consistency(2.03e-3, 31, whole)
    assert found.accounts is True and not found.coarse
    assert consistency(
        2.03e-3, 31, (-0.1, 0.06, 0.2)
    ).coarse  # it holds the expected change, and no change as well
    many = consistency((2.0e-3, 2.03e-3, 2.06e-3), 115, whole)
    assert many.accounts is False
    assert many.unexplained == pytest.approx((-181.9e-3, -170.52e-3, -159e-3), abs=1e-5)


def test_consistency_cannot_be_told_from_an_infinite_interval():
    for part, whole in (
        (1e-3, (-math.inf, 0.0, math.inf)),
        ((-math.inf, 0.0, math.inf), (-math.inf, 0.0, math.inf)),
    ):
        found = consistency(part, 3, whole)
        assert found.accounts is None


@pytest.mark.parametrize(
    ("part", "calls", "whole"),
    [
        (1e-3, -1, (0.0, 0.0, 0.0)),
        (math.nan, 1, (0.0, 0.0, 0.0)),
        (1e-3, 1, (1.0, 0.0, 2.0)),
        (1e-3, math.inf, (0.0, 0.0, 0.0)),
        ((1.0, 2.0), 1, (0.0, 0.0, 0.0)),
    ],
)
def test_consistency_refuses(part, calls, whole):
    with pytest.raises(ValueError):
        consistency(part, calls, whole)
