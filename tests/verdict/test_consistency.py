"""Does the part account for the whole?"""

from __future__ import annotations

import math

import pytest

from eagle_lab.verdict.consistency import consistency


def test_consistency_with_31_calls_and_not_with_115():
    whole = (55e-3, 62.93e-3, 71e-3)
    found = consistency(2.03e-3, 31, whole)
    assert found.accounts is True and found.coarse is None
    assert consistency(2.03e-3, 31, (-0.1, 0.06, 0.2)).coarse == "whole"
    assert consistency((-1e-3, 2e-3, 3e-3), 31, whole).coarse == "part"
    assert consistency((-1e-3, 0.0, 1e-3), 31, (-0.1, 0.06, 0.2)).coarse is None
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
