"""What the simulated error rates mean: the bars they must clear, what they rest on, what safety costs.

Everything here is derived from `eagle_lab.verdict.simulate` at a seed, so the same arguments give the same table. A share
counted over R simulated comparisons is itself uncertain by about sqrt(p (1 - p) / R); the bars say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eagle_lab.verdict.simulate import DESIGNS, Noise, control_rate, peeking, simulate

FEWEST = 500
ORIGINAL = DESIGNS[0].name
ONE_FORK = next(d for d in DESIGNS if d.analysis == "signed-rank" and not d.process_bias)
BIASED = next(d for d in DESIGNS if d.analysis == "signed-rank" and d.process_bias)
FIVE_FORKS = next(d for d in DESIGNS if d.analysis == "forks t")
OURS = (ONE_FORK.name, BIASED.name, FIVE_FORKS.name)

METRICS = {
    "coverage": "95% interval covers the truth",
    "false_verdicts": "false verdicts when A = B",
    "no_difference": "NO DIFFERENCE when A = B",
    "power_1": "power at 1%",
    "power_2": "power at 2%",
    "power_5": "power at 5%",
}


@dataclass(frozen=True)
class Bar:
    """A share that a design must reach: low to high, each 0 to 1."""

    design: str
    metric: str
    low: float
    high: float


BARS = (
    Bar(ONE_FORK.name, "coverage", 0.94, 0.965),
    Bar(ONE_FORK.name, "false_verdicts", 0.0, 0.005),
    Bar(FIVE_FORKS.name, "coverage", 0.94, 0.965),
    Bar(FIVE_FORKS.name, "false_verdicts", 0.0, 0.015),
    Bar(FIVE_FORKS.name, "power_2", 0.93, 1.0),
)


def check_repetitions(repetitions: int) -> int:
    """The number itself, or ValueError where a share counted over so few would say nothing."""
    if repetitions < FEWEST:
        raise ValueError(
            f"repetitions is {repetitions}; fewer than {FEWEST} can't show a rate of half a percent."
        )
    return repetitions


def percent(share: float | None, places: int = 1) -> str:
    """0.0123 as "1.2%"; "–" for None."""
    return "–" if share is None else f"{share:.{places}%}"


def table(rows: Sequence[dict]) -> list[dict[str, str]]:
    """The rows of `simulate.tabulate` as text, with the metrics' names as columns."""
    return [
        {"design and analysis": row["design"]} | {METRICS[key]: percent(row[key]) for key in METRICS}
        for row in rows
    ]


def judge_bars(rows: Sequence[dict], bars: Sequence[Bar] = BARS) -> list[dict[str, str]]:
    """Each bar beside its simulated share: "holds", "missed", or "too near to tell at so few repetitions".

    The last is a share outside its bar by less than two standard errors of the simulation.
    """
    found = {row["design"]: row for row in rows}
    told = []
    for bar in bars:
        row = found[bar.design]
        share, bound = row[bar.metric], min(max(row[bar.metric], bar.low), bar.high)
        error = 2 * math.sqrt(max(bound * (1 - bound), 0.0) / row["repetitions"])
        near = abs(share - bound) <= error
        status = "holds" if share == bound else "too near to tell at so few repetitions" if near else "missed"
        wanted = f"{percent(bar.low)} to {percent(bar.high)}" if bar.low and bar.high < 1 else (
            f"at least {percent(bar.low)}" if bar.low else f"at most {percent(bar.high)}")  # fmt: skip
        told.append(
            {
                "design": bar.design,
                "bar": METRICS[bar.metric],
                "wanted": wanted,
                "simulated": percent(share, 2),
                "status": status,
            }
        )
    return told


def misses(judged: Sequence[dict[str, str]]) -> list[str]:
    """One sentence for each bar of `judge_bars` that was missed."""
    return [
        f"{row['design']}: {row['bar']} is {row['simulated']}, wanted {row['wanted']}."
        for row in judged
        if row["status"] == "missed"
    ]


def finding(rows: Sequence[dict]) -> str:
    """What the table says, in Markdown."""
    row = {r["design"]: r for r in rows}
    original, one, biased, five = (row[name] for name in (ORIGINAL, *OURS))
    return (
        f"The original investigation's design calls two equal programs different in **{percent(original['false_verdicts'])}** "
        f"of runs. Pairs in random order with the signed-rank interval do so in **{percent(one['false_verdicts'], 2)}**, "
        "as long as nothing lasts as long as its process.\n\n"
        f"Where one arm is favoured by {BIASED.process_bias:.1%} (sd) for the life of a process, one process errs in "
        f"**{percent(biased['false_verdicts'])}** and its interval covers the truth in only {percent(biased['coverage'])}: "
        "that is why one fork is *provisional*. Five forks of four pairs err in "
        f"**{percent(five['false_verdicts'], 2)}** and find a true 2% in {percent(five['power_2'])}. The price: when "
        f"A = B they say NO DIFFERENCE in {percent(five['no_difference'])} and INCONCLUSIVE in nearly all the rest.\n\n"
        f"An effect of 1%, just δ, is found in {percent(one['power_1'])} and {percent(five['power_1'])}. No number of pairs "
        "brings that much above a half: ADOPT asks for an *estimate* of at least δ, and half of all estimates of an "
        "effect of δ fall below it. Choose δ below what you want to find."
    )


# Each assumption that is a reading or a guess, and what it could as well be.
VARIANTS: dict[str, Noise] = {
    "as assumed": Noise(),
    "white noise: 0.5% as t's scale, not its sd": Noise(white=0.005 * math.sqrt(3)),
    "spikes half as large (mean 3%)": Noise(spike=0.03),
    "spikes twice as large (mean 12%)": Noise(spike=0.12),
    "drift twice as fast (100 decodes)": Noise(drift_period=100.0),
    "no clock states": Noise(clock_state=0.0),
    "clock states of 3%": Noise(clock_state=0.03),
}


def sensitivity(repetitions: int = 4000, seed: int = 0, variants: dict[str, Noise] = VARIANTS) -> list[dict]:
    """Our two designs under each variant of the noise: shares (0 to 1) that have a bar."""
    found = []
    for name, noise in variants.items():
        one = simulate(ONE_FORK, (0.02,), repetitions, seed, noise)
        five = simulate(FIVE_FORKS, (0.02,), repetitions, seed, noise)
        found.append({"noise": name, "one": one, "five": five, "rows": [one, five]})
    return found


def sensitivity_table(found: Sequence[dict]) -> list[dict[str, str]]:
    """`sensitivity` as text, with the bars that each variant of the noise would miss."""
    told = []
    for entry in found:
        one, five = entry["one"], entry["five"]
        missed = [
            f"{r['bar']}, {r['simulated']}"
            + (" (by less than the simulation's error)" if r["status"] != "missed" else "")
            for r in judge_bars(entry["rows"])
            if r["status"] != "holds"
        ]
        told.append(
            {
                "noise": entry["noise"],
                "one fork: coverage": percent(one["coverage"]),
                "one fork: false": percent(one["false_verdicts"], 2),
                "5 forks: coverage": percent(five["coverage"]),
                "5 forks: false": percent(five["false_verdicts"], 2),
                "5 forks: power at 2%": percent(five["power_2"]),
                "bars missed": "; ".join(missed) or "none",
            }
        )
    return told


def power_curves(repetitions: int = 4000, seed: int = 0, steps: int = 24, top: float = 0.06) -> list[dict]:
    """Share of ADOPT against the true effect, 0 to `top`, of our designs and two naive ones.

    Returns for each design: design, effects [steps + 1], adopt [steps + 1].
    """
    effects = tuple(top * i / steps for i in range(steps + 1))
    curves = []
    for design in (DESIGNS[0], DESIGNS[4], ONE_FORK, FIVE_FORKS):
        row = simulate(design, effects, repetitions, seed)
        curves.append(
            {
                "design": design.name,
                "effects": list(effects),
                "adopt": [row[f"power_{effect * 100:g}"] for effect in effects],
            }
        )
    return curves


CONTROLS = ((5, 4), (2, 4), (1, 4), (1, 20))  # (forks, pairs in each) of an A/A control
LOOKS = (10, 15, 20)
PEEKS = tuple(range(5, 101, 5))


def control_costs(
    repetitions: int = 4000, seed: int = 0, bias: float = FIVE_FORKS.process_bias
) -> list[dict[str, str]]:
    """How often an A/A control stops a verdict although nothing is wrong, by its size."""
    return [
        {
            "A/A control": f"{forks} fork{'s' * (forks > 1)} of {pairs} pairs",
            "processes alike": percent(control_rate(forks, pairs, repetitions, seed)),
            f"processes differ by {bias:.1%}": percent(
                control_rate(forks, pairs, repetitions, seed, Noise(process_bias=bias))
            ),
        }
        for forks, pairs in CONTROLS
    ]


def peeking_costs(repetitions: int = 4000, seed: int = 0) -> list[dict[str, str]]:
    """What looking early does when A = B. Looking up to 100 pairs costs time, so an eighth of the repetitions do."""
    few = repetitions // 8
    plans = (
        ("once, at 20 pairs", (20,), False, repetitions),
        ("at 10, 15 and 20, each at 5%", LOOKS, False, repetitions),
        ("at 10, 15 and 20, declared, each at 5% / 3", LOOKS, True, repetitions),
        (f"every 5 pairs up to {PEEKS[-1]}, each at 5%", PEEKS, False, few),
    )
    told = []
    for name, looks, spend, count in plans:
        excluded, wrong = peeking(looks, spend, count, seed)
        told.append(
            {
                "looks": name,
                "an interval excludes 1": percent(excluded),
                "false ADOPT or REVERT": percent(wrong, 2),
                "repetitions": f"{count:,}",
            }
        )
    return told
