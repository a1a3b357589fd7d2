"""How often the verdict errs: simulated designs at a seed, and an A/A run held against what the simulation assumes.

A share counted over R simulated comparisons is itself uncertain by about sqrt(p (1 - p) / R).
"""

from __future__ import annotations

import numpy as np

from eagle_lab.verdict.simulate import DESIGNS, Noise, draw
from eagle_lab.verdict.stats import Forks, hodges_lehmann

FEWEST = 500
USUAL = DESIGNS[0]  # two blocks, the difference of their means
ONE_FORK = next(d for d in DESIGNS if d.analysis == "signed-rank" and not d.process_bias)
BIASED = next(d for d in DESIGNS if d.analysis == "signed-rank" and d.process_bias)
FIVE_FORKS = next(d for d in DESIGNS if d.analysis == "forks t")

TO_SD = 1.4826  # of a normal distribution's median absolute deviation


def check_repetitions(repetitions: int) -> int:
    """The number itself, or ValueError where a share counted over so few would say nothing."""
    if repetitions < FEWEST:
        raise ValueError(
            f"repetitions is {repetitions}; fewer than {FEWEST} can't show a rate of half a percent."
        )
    return repetitions


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
