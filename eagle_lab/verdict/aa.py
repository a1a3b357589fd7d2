"""An A/A comparison: the baseline against itself, held against what the simulation assumes of a machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eagle_lab.verdict.simulate import Noise, draw
from eagle_lab.verdict.stats import Decision, Verdict, hodges_lehmann

Forks = Sequence[Sequence[tuple[float, float]]]

TO_SD = 1.4826  # of a normal distribution's median absolute deviation
FEWEST = 6


def scatter(forks: Forks) -> float:
    """Robust sd of log(candidate / baseline) about its own fork's estimate (median absolute deviation, scaled).

    Args: forks: pairs of seconds by fork, as `summary.fork_pairs` gives them; at least one pair.
    """
    logs = [np.log([c / b for b, c in fork]) for fork in forks]
    return TO_SD * float(np.median(np.concatenate([np.abs(d - hodges_lehmann(d)) for d in logs])))


def simulated_scatter(pairs: int = 20, repetitions: int = 1000, seed: int = 0) -> float:
    """`scatter` of simulated pairs under the assumed noise."""
    base, candidate = draw("random", 1, pairs, repetitions, np.random.default_rng(seed), Noise())
    d = (candidate - base)[:, 0]
    return TO_SD * float(np.median(np.abs(d - hodges_lehmann(d)[:, None])))


def words(verdict: Verdict, forks: Forks) -> str:
    """What an A/A comparison's verdict says about the machine, in Markdown.

    Args: verdict: of the baseline against itself; forks: the pairs behind it.
    """
    pairs = sum(map(len, forks))
    if verdict.decision in (Decision.ADOPT, Decision.REVERT):
        told = "**A false verdict**: both arms were the same program. Something other than the program moved the times here."
    elif verdict.decision is Decision.NO_DIFFERENCE:
        told = f"**No difference**, as it must be: on this machine {pairs} pairs could tell that A is A to within δ."
    else:
        told = "**Inconclusive**: no false verdict, but these pairs could not show that A is A to within δ either."
    told += "\n\n" + "\n".join(f"- {reason.why}" for reason in verdict.reasons)
    if pairs < FEWEST:
        return f"{told}\n\nToo few pairs are left ({pairs}) to say how much they scatter."
    here, assumed = scatter(forks), simulated_scatter()
    size = (
        "less than" if here < 0.8 * assumed else "more than" if here > 1.25 * assumed else "about as much as"
    )
    consequence = {
        "less than": "so the rates above are cautious for it.",
        "about as much as": "so the rates above are fair for it.",
        "more than": "so the rates above flatter it: more pairs, longer decodes or a quieter machine are needed for as much power.",
    }[size]
    return f"{told}\n\nPairs scatter by {here:.2%} here, {size} the {assumed:.2%} of the simulation, {consequence}"
