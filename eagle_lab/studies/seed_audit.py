"""The figures of the investigation that this kit grew out of, held against each other. Source: data/seed.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_lab import ROOT
from eagle_lab.verdict.consistency import implied_calls

SEED = ROOT / "data" / "seed.json"


@dataclass(frozen=True)
class Check:
    """One published figure worked out again from the others."""

    what: str
    published: str
    recomputed: str
    agrees: bool
    words: str


def load_seed(path: Path = SEED) -> dict[str, Any]:
    """The investigation's published figures."""
    return json.loads(path.read_text(encoding="utf-8"))


def figures(seed: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(baseline, candidate) of the published table in seconds, calls a second and shares."""
    arms = seed["arms"]["baseline"], seed["arms"]["candidate"]

    def both(key: str, scale: float) -> tuple[float, float]:
        return arms[0][key] * scale, arms[1][key] * scale

    shares = claimed_shares(seed)
    return {
        "whole": both("latency_ms", 1e-3),
        "part": both("mask_ms_per_call", 1e-3),
        "rate": both("tokens_per_second", 1),
        "shares": shares,
    }


def claimed_shares(seed: dict[str, Any]) -> tuple[float, float]:
    """The mask's share of time before and after, read from the two claims that state it."""
    quotes = {claim["id"]: claim["quote"] for claim in seed["claims"]}
    found = []
    for name in ("mask-2-percent", "mask-20-percent"):
        digits = "".join(
            c for c in quotes[name].partition("%")[0].rpartition(" ")[2] if c.isdigit() or c == "."
        )
        found.append(float(digits) / 100)
    return found[0], found[1]


def most_calls(seed: dict[str, Any]) -> int:
    """What one run can hold: a tree is built once for the prompt and at most once a token, of those really decoded."""
    f = figures(seed)
    decoded = max(whole * rate for whole, rate in zip(f["whole"], f["rate"], strict=True))
    return math.ceil(max(decoded, seed["settings"]["max_new_tokens"])) + 1


def arithmetic(seed: dict[str, Any]) -> list[Check]:
    """Every derived figure of the report worked out again from its table."""
    f, deltas = figures(seed), seed["deltas"]
    (w0, w1), (p0, p1), (r0, r1), (s0, s1) = f["whole"], f["part"], f["rate"], f["shares"]
    change, times, speed = (w1 / w0 - 1) * 100, p1 / p0, (r1 / r0 - 1) * 100
    asked, given = seed["settings"]["max_new_tokens"], (w0 * r0, w1 * r1)
    calls, limit = implied_calls((p0, p1), (w0, w1), (s0, s1)), most_calls(seed)
    base = p0 / s0 * 1e3, p1 / s1 * 1e3
    most = limit * p0 / w0, limit * p1 / w1
    return [
        Check(
            "end-to-end change", f"{deltas['latency_percent']:+.1f}%", f"{change:+.2f}%",
            abs(change - deltas["latency_percent"]) < 0.06, "The arithmetic is right.",
        ),
        Check(
            "mask construction, times as long", f"{deltas['mask_ratio']}×", f"{times:.1f}×",
            abs(times - deltas["mask_ratio"]) < 0.6, "Right; from 0.20 with two digits it is 10.9 to 11.4.",
        ),
        Check(
            "throughput change", f"{deltas['tokens_per_second_percent']:+.1f}%", f"{speed:+.2f}%",
            abs(speed - deltas["tokens_per_second_percent"]) < 0.06, "The arithmetic is right.",
        ),
        Check(
            "tokens a run (throughput × latency)", f"{asked}", f"{given[0]:.1f} and {given[1]:.1f}",
            abs(given[0] - asked) < 0.5, "Both arms decoded the same number, but more than the 50 asked for.",
        ),
        Check(
            "calls a run, by the end-to-end change", f"at most {limit}", f"{calls[0]:.0f}", calls[0] <= limit,
            f"{(w1 - w0) * 1e3:.1f} ms at {(p1 - p0) * 1e3:.2f} ms a call; {given[0] / calls[0]:.1f} tokens a cycle.",
        ),
        Check(
            "calls a run, by the shares", f"at most {limit}", f"{calls[1]:.0f} and {calls[2]:.0f}",
            max(calls[1:]) <= limit, "More trees than tokens: the shares can't be of a run's time.",
        ),
        Check(
            "the mask's share before", f"{s0:.0%}", f"{calls[0] * p0 / w0:.1%}, at most {most[0]:.1%}", most[0] >= s0,
            f"By {calls[0]:.0f} calls; at most, by a call for each of {limit} possible trees.",
        ),
        Check(
            "the mask's share after", f"{s1:.0%}", f"{calls[0] * p1 / w1:.1%}, at most {most[1]:.1%}", most[1] >= s1,
            f"As before. Both shares fit a part of {base[0]:.0f} to {base[1]:.0f} ms a call, such as the draft step.",
        ),
    ]  # fmt: skip
