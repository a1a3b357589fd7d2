"""What a comparison's record says: verdict, table, ceiling, consistency. The record alone is enough, on any machine."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eagle_lab.measure.old_records import Record
from eagle_lab.verdict.consistency import Consistency, consistency
from eagle_lab.verdict.stats import (
    Decision,
    Verdict,
    hodges_lehmann,
    judge,
    look_alpha,
    median_interval,
    signed_rank_interval,
    t_interval,
)

Interval = tuple[float, float, float]  # low, estimate, high

# too few left: less than this share of the planned pairs survived
ENOUGH_PAIRS = 0.5


def fork_pairs(record: Record, control: bool = False) -> list[list[tuple[float, float]]]:
    """(baseline, candidate) seconds of the kept pairs, by fork; of the A/A control where asked."""
    forks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for sample in record["samples"]:
        if sample["control"] == control and not sample["dropped"]:
            forks[sample["fork"]].append((sample["baseline_s"], sample["candidate_s"]))
    return [forks[number] for number in sorted(forks)]


def shortfalls(record: Record) -> list[str]:
    """What is missing or was dropped, in words: nothing is ever silently short."""
    settings = record["settings"]
    main = [s for s in record["samples"] if not s["control"]]
    told = [event["what"] for event in record.get("events", ())]
    for control, what in ((False, "pairs"), (True, "pairs of the A/A control")):
        taken = [s for s in record["samples"] if s["control"] == control]
        dropped = [s for s in taken if s["dropped"]]
        if dropped:
            reasons = "; ".join(sorted({s["dropped"].split(" took ")[0] for s in dropped}))
            told.append(
                f"{len(dropped)} of {len(taken)} {what} were dropped by the declared rule ({reasons})."
            )
    if len(main) < settings["iterations"] and not record.get("stopped_early"):
        told.append(f"{len(main)} of the {settings['iterations']} planned pairs were taken.")
    return told


def verdict_of(record: Record) -> Verdict:
    """The verdict that the samples support by the rule that the settings declared."""
    settings = record["settings"]
    looks = settings.get("looks") or []
    alpha = look_alpha(settings["alpha"], looks) if looks else settings["alpha"]
    forks, told = fork_pairs(record), shortfalls(record)
    kept = sum(map(len, forks))
    planned = (
        len([s for s in record["samples"] if not s["control"]])
        if record.get("stopped_early")
        else settings["iterations"]
    )
    if not forks:
        nothing = "No pair is left to judge."
        ends = (0.0, math.inf)
        return Verdict(
            Decision.INCONCLUSIVE,
            math.nan,
            *ends,
            ends,
            "none",
            0,
            0,
            settings["delta"],
            alpha,
            True,
            (nothing, *told),
        )
    control = fork_pairs(record, control=True)
    verdict = judge(forks, settings["delta"], alpha, control=control or None)
    doubts = []
    if kept < ENOUGH_PAIRS * planned:
        doubts.append(f"Too few pairs are left: {kept} of {planned}.")
    if settings.get("control_forks") and not control:
        doubts.append("No pair of the declared A/A control is left.")
    if doubts:
        verdict = replace(verdict, decision=Decision.INCONCLUSIVE)
    return replace(verdict, reasons=(*verdict.reasons, *doubts, *told))


def shift(forks: list[list[float]], alpha: float = 0.05) -> Interval:
    """Low, estimate and high of paired differences: signed rank in one fork, t over the forks' estimates in more."""
    if len(forks) == 1:
        low, high = signed_rank_interval(np.asarray(forks[0]), alpha)
        return float(low), float(hodges_lehmann(forks[0])), float(high)
    estimates = [float(hodges_lehmann(fork)) for fork in forks]
    low, high = t_interval(estimates, alpha)
    return float(low), float(np.mean(estimates)), float(high)


def part_pairs(record: Record) -> list[list[tuple[float, float]]]:
    """Seconds of each call of the part, (baseline, candidate) on the same tree of the same decode, by fork."""
    calls: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for part in record["parts"]:
        calls[part["fork"]][part["arm"]] = part["calls_s"]
    # an arm that replays a captured cycle has no span to time; arms that part at a near tie end with other cycles
    both = [c for _, c in sorted(calls.items()) if c.get("baseline") and c.get("candidate")]
    return [list(zip(c["baseline"], c["candidate"], strict=False)) for c in both]


@dataclass(frozen=True)
class Row:
    """One metric of the table: the arms' medians with intervals, and candidate / baseline with its interval."""

    metric: str
    unit: str
    baseline: Interval
    candidate: Interval
    ratio: Interval


def _row(metric: str, unit: str, scale: float, forks: list[list[tuple[float, float]]]) -> Row:
    flat = [pair for fork in forks for pair in fork]
    arms = [median_interval([pair[arm] * scale for pair in flat]) for arm in (0, 1)]
    low, at, high = shift([[math.log(c / b) for b, c in fork] for fork in forks])
    return Row(metric, unit, arms[0], arms[1], (math.exp(low), math.exp(at), math.exp(high)))


def table(record: Record) -> list[Row]:
    """The original investigation's table: end-to-end latency, mask construction, token throughput."""
    forks, parts = fork_pairs(record), part_pairs(record)
    rows = []
    if forks:
        rows.append(_row("end-to-end latency", "ms", 1e3, forks))
    if parts:
        rows.append(_row("mask construction, a call", "ms", 1e3, parts))
    if forks:
        speed: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for s in record["samples"]:
            if not s["control"] and not s["dropped"]:
                speed[s["fork"]].append(
                    (s["new_tokens"] / s["baseline_s"], s["new_tokens"] / s["candidate_s"])
                )
        rows.append(_row("throughput", "tokens/s", 1, [speed[k] for k in sorted(speed)]))
    return rows


@dataclass(frozen=True)
class Ceiling:
    """The part's share of the baseline's time and what its removal would bring at most (Amdahl): share / (1 - share)."""

    share: float
    gain: float
    calls: float


def part_share(record: Record, arm: str = "baseline") -> tuple[float, float] | None:
    """The part's share of a whole decode in one arm ("baseline", "candidate"), and its calls; None where the part was
    not measured."""
    parts = part_pairs(record)
    kept = [s for s in record["samples"] if not s["control"] and not s["dropped"]]
    if not parts or not kept:
        return None
    which = ("baseline", "candidate").index(arm)
    call = float(np.median([pair[which] for fork in parts for pair in fork]))
    calls = float(np.median([s["cycles"] for s in kept]))
    return call * calls / float(np.median([s[f"{arm}_s"] for s in kept])), calls


def ceiling(record: Record) -> Ceiling | None:
    """The most that any change of the part can bring; None where the part was not measured."""
    found = part_share(record)
    if found is None:
        return None
    share, calls = found
    return Ceiling(share, share / (1 - share) if share < 1 else math.inf, calls)


def consistency_of(record: Record) -> Consistency | None:
    """Does the part's measured change, times its calls, account for the end-to-end change? None where unmeasured."""
    parts, forks, top = part_pairs(record), fork_pairs(record), ceiling(record)
    if top is None:
        return None
    part = shift([[c - b for b, c in fork] for fork in parts])
    whole = shift([[c - b for b, c in fork] for fork in forks])
    return consistency(part, top.calls, whole)


def sentence(record: Record) -> str:
    """The verdict line: who against whom, the decision, the ratio with its interval, what stands behind it."""
    settings = record["settings"]
    return f"{settings['candidate']} against {settings['baseline']}: {verdict_of(record)}"


def acceptance_length(record: Record) -> float | None:
    """τ over the kept pairs: new tokens a cycle."""
    kept: list[dict[str, Any]] = [s for s in record["samples"] if not s["control"]]
    cycles = sum(s["cycles"] for s in kept)
    return sum(s["new_tokens"] for s in kept) / cycles if cycles else None


# settings that the notebook has no parameter for, and what they usually are
USUAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k_sampling": 0,
    "alpha": 0.05,
    "looks": [],
    "spans": [False, False],
}


def again(settings: dict[str, Any]) -> str:
    """The command that runs the comparison again: papermill's, or Python's where the notebook lacks a parameter."""
    pair = ("target", "draft", "device", "dtype")
    plain = (
        "baseline", "candidate", "iterations", "forks", "max_new_tokens", "total_tokens", "depth", "top_k", "delta", "seed",
    )  # fmt: skip
    unusual = [name for name, usual in USUAL.items() if settings.get(name, usual) != usual]
    own, load = settings.get("own_prompts", {}), settings.get("load", {})
    prompts = ",".join(settings["prompts"])
    # the default pair is what nothing names; random weights of published sizes ("shape:") bring their head
    left_out = (
        pair[:2] if settings["embedded"] else pair[1:2] if settings["target"].startswith("shape:") else ()
    )
    names = [name for name in pair if name not in left_out]
    if unusual or own or load:
        given = ", ".join(
            f"{name}={value!r}" for name, value in [*((n, settings[n]) for n in names), *load.items()]
        )
        rest = ", ".join(f"{name}={settings[name]!r}" for name in (*plain, *unusual))
        ids = {name: f"[{', '.join(text.split())}]" for name, text in own.items()}
        listed = ", ".join(ids.get(name, f"*e.load_prompts({name!r})") for name in settings["prompts"])
        what = f"[{listed}]" if own else repr(prompts)
        code = f"import eagle_lab as e; print(e.compare(e.load({given}), prompts={what}, {rest}))"
        return shlex.join(["python", "-c", code])
    words = ["papermill", "notebooks/compare.ipynb", "out.ipynb"]
    for name in (*names, *plain):
        words += ["-p", name, str(settings[name])]
    return shlex.join([*words, "-p", "prompts", prompts])
