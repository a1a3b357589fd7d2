"""What a profile says: shares of the time, ceilings, whether the stages add up, what bounds the cycle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from eagle_lab.measure.floor import Floor
from eagle_lab.studies.profile import CycleTimes, Decode, Mode, ProfileRecord
from eagle_lab.verdict.summary import gain

HOT = 0.10  # above this share of the cycle, a stage is on the hot list
CLOSES = 0.03  # named stages must cover the cycle, and cycles the decode, to within this share
# busy shares of the device from which on it, and up to which the host, bounds the cycle
BUSY, IDLE = 0.8, 0.5


@dataclass(frozen=True)
class Stage:
    """One stage. Seconds and calls are means a cycle.

    share: of all cycles' time; median, low, high: the median and the quartiles of each cycle's own share; whole: the
    share of the decode, prefill included; ceiling: the gain that follows from it. "prefill" and "set-up" are parts of a
    decode and no share of a cycle (NaN).
    """

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

    @property
    def seconds(self) -> float:
        """By the device's clock where there is one, else by the host's."""
        return self.host_s if self.device_s is None else self.device_s

    @property
    def in_cycle(self) -> bool:
        """Whether it is a part of each cycle."""
        return not math.isnan(self.share)

    @property
    def hot(self) -> bool:
        """Whether it takes more than HOT of the cycle."""
        return self.share > HOT and self.name != "rest"


def decodes(record: ProfileRecord, mode: Mode = "spans") -> list[Decode]:
    """The decodes of a mode; ValueError where the record has none."""
    found = [d for d in record.decodes if d.mode == mode]
    if not found:
        raise ValueError(f"this profile has no decode in the mode {mode!r}.")
    return found


def lane(record: ProfileRecord, mode: Mode = "spans") -> Literal["host", "device"]:
    """Which clock the shares are of: "device" where its stages were timed, else "host"."""
    return "device" if decodes(record, mode)[0].cycles[0].device is not None else "host"


def cycle_times(record: ProfileRecord, mode: Mode = "spans") -> np.ndarray:
    """Seconds of each cycle by the clock that counts, float64 [cycles]."""
    key = f"{lane(record, mode)}_s"
    return np.array([getattr(c, key) for d in decodes(record, mode) for c in d.cycles])


def cycle_seconds(record: ProfileRecord, mode: Mode = "spans") -> float:
    """The mean cycle, by the clock that counts."""
    return float(cycle_times(record, mode).mean())


def acceptance(record: ProfileRecord) -> float:
    """Tokens a cycle: stated, or measured in these decodes."""
    stated = record.settings.stated_acceptance
    return stated or float(np.mean([count for d in decodes(record) for count in d.committed]))


def whole_seconds(record: ProfileRecord, mode: Mode = "spans") -> tuple[float, float]:
    """Seconds of a decode of max_new_tokens (set-up, prefill, cycles) and its cycles, at the record's acceptance."""
    found, clock = decodes(record, mode), lane(record, mode)
    prefill = float(np.mean([getattr(d.prefill, clock) + d.setup_s for d in found]))
    limit, stated = record.settings.max_new_tokens, record.settings.stated_acceptance
    count = limit / stated if stated else float(np.mean([len(d.cycles) for d in found]))
    return prefill + count * cycle_seconds(record, mode), count


def _per_cycle(cycles: list[CycleTimes], name: str, clock: str) -> np.ndarray:
    """Seconds of a stage in each cycle by a clock, float64 [cycles]; of "rest", what no stage covers."""
    parts = [getattr(c, clock) for c in cycles]
    if name == "rest":
        return np.array(
            [getattr(c, f"{clock}_s") - sum(p.values()) for c, p in zip(cycles, parts, strict=True)]
        )
    return np.array([p.get(name, 0.0) for p in parts])


def stages(record: ProfileRecord, mode: Mode = "spans") -> list[Stage]:
    """Every stage in the order of the cycle, "rest" after them, "prefill" and "set-up" last."""
    found, clock = decodes(record, mode), lane(record, mode)
    cycles = [c for d in found for c in d.cycles]
    times, (whole, count) = cycle_times(record, mode), whole_seconds(record, mode)
    rows = []
    for name in [*dict.fromkeys(name for c in cycles for name in c.host), "rest"]:
        counted = _per_cycle(cycles, name, clock)
        low, median, high = (float(q) for q in np.quantile(counted / times, (0.25, 0.5, 0.75)))
        part = float(count * counted.mean() / whole)
        calls = float(np.mean([c.calls.get(name, 0) for c in cycles]))
        host = float(_per_cycle(cycles, name, "host").mean())
        device = float(counted.mean()) if clock == "device" else None
        share = float(counted.sum() / times.sum())
        rows.append(Stage(name, calls, host, device, share, median, low, high, part, gain(part)))
    host = float(np.mean([d.prefill.host for d in found if d.prefill]))
    device = float(np.mean([d.prefill.device for d in found if d.prefill])) if clock == "device" else None  # type: ignore[misc]
    setup = float(np.mean([d.setup_s for d in found]))  # type: ignore[misc]
    for name, host_s, device_s in (("prefill", host, device), ("set-up", setup, None)):
        part, nan = (host_s if device_s is None else device_s) / whole, math.nan
        rows.append(Stage(name, 1.0, host_s, device_s, nan, nan, nan, nan, part, gain(part)))
    return rows


def stage(record: ProfileRecord, name: str) -> Stage | None:
    """The stage of that name; None where this decode has none."""
    return next((s for s in stages(record) if s.name == name), None)


class Closure(NamedTuple):
    """Shares that stay uncovered: of the cycles by the named stages, of the decodes by set-up, prefill and cycles."""

    rest: float
    beyond: float

    @property
    def good(self) -> bool:
        """Whether both add up to within CLOSES."""
        return abs(self.rest) <= CLOSES and abs(self.beyond) <= CLOSES


def closes(record: ProfileRecord) -> Closure:
    """Whether the stages add up to the cycle, and the cycles to the decode by the outer clock."""
    found = decodes(record)
    inside = sum(
        (d.setup_s or 0.0) + (d.prefill.host if d.prefill else 0.0) + sum(c.host_s for c in d.cycles)
        for d in found
    )
    rest = next(s.share for s in stages(record) if s.name == "rest")
    return Closure(rest, 1 - inside / sum(d.seconds for d in found))


def hot_list(record: ProfileRecord) -> list[Stage]:
    """Stages above HOT of the cycle, the largest first."""
    return sorted((s for s in stages(record) if s.hot), key=lambda s: -s.share)


def slowdown(record: ProfileRecord, mode: Mode) -> list[float]:
    """Seconds of each of a mode's decodes over those of the bare one beside it, by prompt and repeat."""
    bare, other = (sorted(decodes(record, m), key=lambda d: d.prompt) for m in ("off", mode))
    return [b.seconds / a.seconds for a, b in zip(bare, other, strict=True)]


def disagreement(record: ProfileRecord) -> list[tuple[str, float, float]]:
    """(stage, ms a cycle by spans, ms a cycle with a synchronise around each stage); "cycle" at the end."""
    tight = {s.name: s for s in stages(record, "synchronised")}
    rows = [
        (s.name, s.seconds * 1e3, tight[s.name].host_s * 1e3)
        for s in stages(record)
        if s.in_cycle and s.name in tight
    ]
    return [*rows, ("cycle", cycle_seconds(record) * 1e3, cycle_seconds(record, "synchronised") * 1e3)]


@dataclass(frozen=True)
class Bound:
    """What bounds the cycle ("cpu" where host and device are one).

    busy: the share of it in which the device had something to do, or, on a CPU, that inside torch's operators; kernels:
    launches a cycle; replayed: whether the cycle is one graph or compiled whole.
    """

    by: Literal["device", "host", "both", "cpu"]
    busy: float
    kernels: float
    replayed: bool


def bound(record: ProfileRecord) -> Bound | None:
    """What bounds the cycle; None where no operator profile was taken."""
    found = record.operators
    if found is None:
        return None
    replayed = stage(record, "replay") is not None
    if found.busy_s is None:
        return Bound("cpu", found.operators_s / found.seconds, 0, replayed)
    share = found.busy_s / found.cycles / cycle_seconds(record)
    kernels = found.kernels / found.cycles
    return Bound("device" if share >= BUSY else "host" if share <= IDLE else "both", share, kernels, replayed)


class OverFloor(NamedTuple):
    """Milliseconds of a cycle or a stage, those of its floor, and their ratio."""

    name: str
    took: float
    least: float
    times: float


def over_floor(record: ProfileRecord) -> list[OverFloor]:
    """The cycle and the stages that have a floor; empty where there is none."""
    if not isinstance(record.floor, Floor):
        return []
    parts = record.floor.parts
    rows = [("cycle", cycle_seconds(record)), *((s.name, s.seconds) for s in stages(record))]
    return [
        OverFloor(name, took * 1e3, parts[name].seconds * 1e3, took / parts[name].seconds)
        for name, took in rows
        if name in parts
    ]


def random_weights(target: str) -> bool:
    """Whether the target is a shape: its times are true, and what it accepts says nothing."""
    return target.startswith("shape:")
