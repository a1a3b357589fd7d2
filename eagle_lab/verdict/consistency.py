"""Does the part that was changed account for the change of the whole?

A part's change per call, times its calls, is what the whole can owe to it. Where the two differ by more than
their intervals, something else moved between the runs, whatever the verdict on the whole says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float, float]  # low, estimate, high


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
    def coarse(self) -> bool:
        """Whether the whole was measured too coarsely to tell the expected change from none."""
        return self.whole[0] <= 0 <= self.whole[2] and not self.expected[0] <= 0 <= self.expected[2]


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


def implied_calls(part_s: tuple, whole_s: tuple, shares: tuple) -> Interval:
    """How often a part was called in a run: by the change of the whole, its share before, its share after.

    Args, each (before, after): seconds a call, seconds a run, the part's share of the run (0 to 1).
    Raises ValueError for figures that are not positive, and for a part that did not change.
    """
    if not all(0 < x < math.inf for x in (*part_s, *whole_s, *shares)) or part_s[0] == part_s[1]:
        raise ValueError("Implied calls need positive finite figures and a part that changed.")
    before, after = (share * whole / part for share, whole, part in zip(shares, whole_s, part_s, strict=True))
    return (whole_s[1] - whole_s[0]) / (part_s[1] - part_s[0]), before, after


def contradiction(
    part_s: tuple, whole_s: tuple, shares: tuple, most_calls: float = math.inf, slack: float = 0.5
) -> str | None:
    """Why no one number of calls makes all of a report's figures true (`implied_calls`); None where one does.

    most_calls: what a run can hold (a tree is built once for the prompt and at most once a token); slack: how
    far apart rounding may bring the numbers ("2%" is 1.5 to 2.5%), 0.5 for 50%.
    """
    calls = implied_calls(part_s, whole_s, shares)
    if min(calls) > 0 and max(calls) <= (1 + slack) * min(calls) and min(calls) <= most_calls:
        return None
    change, whole = part_s[1] - part_s[0], whole_s[1] - whole_s[0]
    low, high = sorted(x * change for x in calls[1:])
    actual = [calls[0] * part / run for part, run in zip(part_s, whole_s, strict=True)]
    bound = f" A run holds at most {most_calls:g} calls." if max(calls) > most_calls else ""
    return (
        f"{_ms(whole)} of the whole at {_ms(change)} a call are {calls[0]:.0f} calls, thus shares of "
        f"{actual[0]:.1%} and {actual[1]:.1%}; shares of {shares[0]:.1%} and {shares[1]:.1%} are "
        f"{calls[1]:.0f} and {calls[2]:.0f} calls, thus {_ms(low)} to {_ms(high)} of the whole.{bound}"
    )


def _three(x: NDArray) -> Interval:
    return float(x[0]), float(x[1]), float(x[2])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:+.2f} ms"
