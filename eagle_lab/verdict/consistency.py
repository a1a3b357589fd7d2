"""Does the part that was changed account for the change of the whole?

A part's change per call, times its calls, is what the whole can owe to it. Where the two differ by more than
their intervals, something else moved between the runs, whatever the verdict on the whole says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eagle_lab.verdict.stats import Interval


@dataclass(frozen=True)
class Consistency:
    """Whether a part's change a call, times its calls, accounts for the whole's change a run (None: can't tell).

    In seconds: part a call; expected, whole and unexplained a run.
    """

    accounts: bool | None
    part: Interval
    calls: float
    expected: Interval
    whole: Interval
    unexplained: Interval

    @property
    def coarse(self) -> Literal["whole", "part"] | None:
        """Which of the two was measured too coarsely to tell the other's change from none; None where neither was, or
        both hold no change."""
        whole, part = (low <= 0 <= high for low, _, high in (self.whole, self.expected))
        return None if whole == part else "whole" if whole else "part"


def consistency(part_delta_s: float | Interval, calls: float, end_to_end_delta_s: Interval) -> Consistency:
    """Hold a part's change per call against the whole's change per run; intervals that overlap agree.

    Args: seconds; the part's change may be one number. Raises ValueError for intervals that are not (low,
    estimate, high) and for calls below 0.
    """
    one = isinstance(part_delta_s, (int, float))
    part, whole = np.array([part_delta_s] * 3 if one else part_delta_s), np.array(end_to_end_delta_s)
    if any(x.shape != (3,) or not (x[0] <= x[1] <= x[2]) for x in (part, whole)):
        raise ValueError(f"Intervals must be (low, estimate, high), not {part} and {whole}.")
    if not 0 <= calls < math.inf:
        raise ValueError(f"calls is {calls}; it must be 0 or a positive number.")
    expected = part * calls if calls else np.zeros(3)
    with np.errstate(invalid="ignore"):  # infinity less infinity: can't tell
        rest = whole - expected[::-1]
    accounts = bool(rest[0] <= 0 <= rest[2]) if np.isfinite(rest).all() else None
    return Consistency(accounts, _three(part), float(calls), _three(expected), _three(whole), _three(rest))


def _three(x: NDArray) -> Interval:
    return float(x[0]), float(x[1]), float(x[2])
