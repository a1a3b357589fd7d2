"""What a profile's record says: shares, ceilings, sums, what bounds the cycle. The record alone is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record

HOT = 0.10  # above this share of the cycle, a stage is on the hot list
CLOSES = 0.03  # named stages must cover the cycle, and cycles the decode, to within this share
BUSY, IDLE = (
    0.8,
    0.5,
)  # busy shares of the device from which on, and up to which, the bound is said in one word


def gain(share: float) -> float:
    """Amdahl's ceiling, share / (1 - share): what the whole gains in speed if the part takes no time at all."""
    return share / (1 - share) if share < 1 else math.inf


@dataclass(frozen=True)
class Stage:
    """One stage of the cycle. Seconds and calls are means a cycle; `share` is of all cycles' time; `median`,
    `low` and `high` are the median and the quartiles of each cycle's own share; `whole` is the share of the decode,
    prefill included, `ceiling` the gain that follows. "prefill" and "set-up": of a decode, no share of a cycle (NaN)."""

    name: str
    calls: float
    host_s: float
    device_s: float | None
    share: float
    median: float
    low: float
    high: float
    whole: float
    ceiling: float
    hot: bool


def decodes(record: Record, mode: str = "spans") -> list[dict[str, Any]]:
    """The decodes of a mode; ValueError where the record has none."""
    found = [d for d in record["decodes"] if d["mode"] == mode]
    if not found:
        raise ValueError(f"this profile has no decode in the mode {mode!r}.")
    return found


def lane(record: Record, mode: str = "spans") -> str:
    """Which clock the shares are of: "device" where its stages were timed, else "host"."""
    return "device" if decodes(record, mode)[0]["cycles"][0]["device"] is not None else "host"


def cycle_times(record: Record, mode: str = "spans") -> np.ndarray:
    """Seconds of each cycle by the clock that counts, float64 [cycles]."""
    key = f"{lane(record, mode)}_s"
    return np.array([c[key] for d in decodes(record, mode) for c in d["cycles"]])


def acceptance(record: Record) -> tuple[float, str]:
    """Tokens a cycle, and the words that must go with every figure that rests on it."""
    stated = record["settings"]["stated_acceptance"]
    if stated is not None:
        why = ": the weights are random" if random_weights(record) else ""
        return stated, f"acceptance length {stated:g} is stated, not measured{why}"
    value = float(np.mean([count for d in decodes(record) for count in d["committed"]]))
    return value, f"acceptance length {value:.2f}, measured in these decodes"


def whole_seconds(record: Record, mode: str = "spans") -> tuple[float, float]:
    """Seconds of a decode of max_new_tokens (set-up, prefill, cycles) and its cycles, at the record's acceptance."""
    found, clock = decodes(record, mode), lane(record, mode)
    prefill = float(np.mean([d["prefill"][clock] + d["setup_s"] for d in found]))
    stated = record["settings"]["stated_acceptance"]
    count = (
        record["settings"]["max_new_tokens"] / stated
        if stated
        else np.mean([len(d["cycles"]) for d in found])
    )
    return prefill + float(count) * float(cycle_times(record, mode).mean()), float(count)


def stages(record: Record, mode: str = "spans") -> list[Stage]:
    """Every stage in the order of the cycle, "rest" after them, "prefill" and "set-up" last."""
    found, clock = decodes(record, mode), lane(record, mode)
    cycles = [c for d in found for c in d["cycles"]]
    times, (whole, count) = cycle_times(record, mode), whole_seconds(record, mode)
    names = list(dict.fromkeys(name for c in cycles for name in c["host"]))
    rows = []
    for name in [*names, "rest"]:
        calls = np.array([c["calls"].get(name, 0) for c in cycles])
        both = {}
        for key in ("host", "device"):
            if key == "device" and clock == "host":
                continue
            per = [
                c[f"{key}_s"] - sum(c[key].values()) if name == "rest" else c[key].get(name, 0.0)
                for c in cycles
            ]
            both[key] = np.array(per)
        counted = both[clock]
        low, median, high = (float(q) for q in np.quantile(counted / times, (0.25, 0.5, 0.75)))
        share, part = counted.sum() / times.sum(), count * counted.mean() / whole
        device = float(both["device"].mean()) if "device" in both else None
        rows.append(
            Stage(
                name, float(calls.mean()), float(both["host"].mean()), device, float(share), median, low, high,
                float(part), gain(float(part)), bool(share > HOT and name != "rest"),
            )
        )  # fmt: skip
    host = float(np.mean([d["prefill"]["host"] for d in found]))
    device = float(np.mean([d["prefill"]["device"] for d in found])) if clock == "device" else None
    part = (host if device is None else device) / whole
    nan = math.nan
    setup = float(np.mean([d["setup_s"] for d in found]))
    return [
        *rows,
        Stage("prefill", 1.0, host, device, nan, nan, nan, nan, part, gain(part), False),
        Stage("set-up", 1.0, setup, None, nan, nan, nan, nan, setup / whole, gain(setup / whole), False),
    ]


def closes(record: Record, mode: str = "spans") -> tuple[bool, float, float, str]:
    """Whether it all adds up: (yes or no, uncovered share of the cycles, of the decodes by the outer clock, words)."""
    rest = next(s for s in stages(record, mode) if s.name == "rest").share
    found = decodes(record, mode)
    inside = sum(d["setup_s"] + d["prefill"]["host"] + sum(c["host_s"] for c in d["cycles"]) for d in found)
    outside = sum(d["seconds"] for d in found)
    beyond = 1 - inside / outside
    good = abs(rest) <= CLOSES and abs(beyond) <= CLOSES
    words = (
        f"The named stages cover {1 - rest:.2%} of the cycles, and set-up, prefill and cycles {inside / outside:.2%} "
        f"of the decodes by an outer clock: {'they add up' if good else 'they do NOT add up'} to within {CLOSES:.0%}."
    )
    return good, float(rest), float(beyond), words


def hot_list(record: Record) -> list[Stage]:
    """Stages above 10% of the cycle, the largest first."""
    return sorted((s for s in stages(record) if s.hot), key=lambda s: -s.share)


def slowdown(record: Record, mode: str) -> float:
    """How much longer a mode's decodes took than bare ones, paired by prompt and repeat: 0.02 is 2% longer."""
    bare, other = decodes(record, "off"), decodes(record, mode)
    ratios = [
        math.log(o["seconds"] / b["seconds"]) for b, o in zip(by_prompt(bare), by_prompt(other), strict=True)
    ]
    return math.expm1(float(np.median(ratios)))


def by_prompt(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decodes in an order that is the same for all modes: by prompt, each prompt's in the order taken."""
    return sorted(found, key=lambda d: d["prompt"])


def disagreement(record: Record) -> list[tuple[str, float, float]]:
    """(stage, ms a cycle by spans, ms a cycle with a synchronise around each stage); "cycle" at the end."""
    loose = {s.name: s for s in stages(record, "spans")}
    tight = {s.name: s for s in stages(record, "synchronised")}
    rows: list[tuple[str, float, float]] = []
    for name, row in loose.items():
        if not math.isnan(row.share) and name in tight:
            mine = row.device_s if row.device_s is not None else row.host_s
            rows.append((name, mine * 1e3, tight[name].host_s * 1e3))
    whole, apart = (float(cycle_times(record, mode).mean()) * 1e3 for mode in ("spans", "synchronised"))
    return [*rows, ("cycle", whole, apart)]


def bound(record: Record) -> str:
    """Host-bound or device-bound, in words, by the share of a cycle in which the device had something to do."""
    found = record.get("operators")
    if found is None:
        return "Whether host or device bounds the cycle wasn't measured (no operator profile was taken)."
    if found["busy_s"] is None:
        share = found["operators_s"] / found["seconds"]
        return (
            f"On a CPU, host and device are one: {share:.0%} of a cycle is inside torch's operators (under the "
            f"profiler, which adds to the rest), the remaining {1 - share:.0%} is Python and dispatch."
        )
    share = found["busy_s"] / found["cycles"] / float(cycle_times(record).mean())
    each = found["kernels"] / found["cycles"]
    word = "device-bound" if share >= BUSY else "host-bound" if share <= IDLE else "bound by both in turn"
    replayed = any(s.name == "replay" for s in stages(record))
    waits = (
        "between kernels, for the copy back and the host's step" if replayed else "for the host's next launch"
    )
    return (
        f"The device is busy {share:.0%} of the cycle ({each:.0f} kernels and copies a cycle): {word}. "
        f"In the other {max(0.0, 1 - share):.0%} it waits {waits}."
    )


def over_floor(record: Record) -> list[tuple[str, float, float, float]]:
    """(what, measured ms, floor ms, measured / floor) of the cycle and of the stages that have a floor."""
    parts = record.get("floor", {}).get("parts")
    if not parts:
        return []
    rows = [("cycle", float(cycle_times(record).mean()), parts["cycle"]["seconds"])]
    for s in stages(record):
        if s.name in parts:
            rows.append((s.name, s.host_s if s.device_s is None else s.device_s, parts[s.name]["seconds"]))
    return [(name, took * 1e3, least * 1e3, took / least) for name, took, least in rows]


def title(record: Record) -> str:
    """Model, machine and dtype in one line; with a stated acceptance, the line says so."""
    s = record["settings"]
    words = f"{s['target'].rpartition('/')[2]}, {s['dtype']}, {machine_key(record['environment'])}, {s['strategy']}"
    return words if s["stated_acceptance"] is None else f"{words} ({acceptance(record)[1]})"


def random_weights(record: Record) -> bool:
    """Whether the target is a shape: times are true, but what it accepts is not."""
    return str(record["settings"]["target"]).startswith("shape:")


def weights_words(record: Record) -> str:
    """The target; where its weights are random, also how the acceptance came about."""
    target = record["settings"]["target"].rpartition("/")[2]
    stated = record["settings"].get("stated_acceptance")
    if not random_weights(record):
        return target
    return f"{target}, random weights" + (f", acceptance length {stated:g} stated" if stated else "")
