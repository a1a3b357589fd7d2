"""The first investigation: its arithmetic, its claims held against our records, and its experiment done again.

It measured one alternative to `rebuild` and said "revert" (data/seed.json has its figures). A claim is confirmed or
refuted where its own figures or our records decide it; else nothing that it measured decides it, whatever the truth is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from eagle_lab import ROOT
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.records import Part, Record, made
from eagle_lab.models.pair import Pair
from eagle_lab.studies.breakdown import Stage, stages
from eagle_lab.studies.profile import ProfileRecord, get_prompts, stated_acceptance
from eagle_lab.studies.sweep import BASELINE, NODES, SweepRecord
from eagle_lab.studies.sweep_summary import growth, ratio
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Decision, Interval, Verdict
from eagle_lab.verdict.summary import part_share, table, verdict_of

LARGE = (511, 1023)  # its "500+ tokens", by the recorded trees
SLACK = 0.5  # how far apart rounding may bring numbers of calls: "2%" is 1.5 to 2.5%


class Arm(Part):
    """What it published of one arm; mask_share: of the run's time, 0 to 1."""

    strategy: str
    latency_ms: PositiveFloat
    mask_ms_per_call: PositiveFloat
    tokens_per_second: PositiveFloat
    mask_share: PositiveFloat


class Deltas(Part):
    """The differences that it derived from its table."""

    latency_percent: float
    mask_ratio: float
    tokens_per_second_percent: float


class Claim(Part):
    """A sentence of its report."""

    id: str
    quote: str


class Published(Part):
    """data/seed.json: what the investigation published. settings: iterations, max_new_tokens, total_tokens."""

    title: str
    citation: str
    date: str
    question: str
    settings: dict[str, int]
    arms: dict[Literal["baseline", "candidate"], Arm]
    deltas: Deltas
    verdict: str
    claims: list[Claim]

    def both(self, figure: str) -> tuple[float, float]:
        """A figure of baseline and candidate."""
        return getattr(self.arms["baseline"], figure), getattr(self.arms["candidate"], figure)


def published(path: str | Path = ROOT / "data" / "seed.json") -> Published:
    """The investigation's published figures."""
    return Published.model_validate_json(Path(path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Audit:
    """The published figures worked out again from each other.

    Percent of change and the mask's ratio; tokens a run (throughput × latency); calls a run by the change of the whole, by
    the shares before and after, and the most that a run can hold; the mask's shares by the change's calls and at most;
    milliseconds a call of what the claimed shares fit; agrees: which figures are right, by name; consistent: one number of
    calls makes all of them true.
    """

    latency: float
    mask_ratio: float
    throughput: float
    tokens: tuple[float, float]
    calls: tuple[float, float, float]
    most_calls: int
    shares: tuple[float, float]
    most_shares: tuple[float, float]
    fits_ms: tuple[float, float]
    agrees: dict[str, bool]
    consistent: bool


def audit(p: Published) -> Audit:
    """Every derived figure of the report from its table."""
    whole, part, shares = p.both("latency_ms"), p.both("mask_ms_per_call"), p.both("mask_share")
    speed, asked = p.both("tokens_per_second"), p.settings["max_new_tokens"]
    latency, throughput = (100 * (after / before - 1) for before, after in (whole, speed))
    mask, tokens = part[1] / part[0], (whole[0] * speed[0] / 1e3, whole[1] * speed[1] / 1e3)
    held = [s * run / call for s, run, call in zip(shares, whole, part, strict=True)]
    fits = [call / s for call, s in zip(part, shares, strict=True)]
    calls = (whole[1] - whole[0]) / (part[1] - part[0]), held[0], held[1]
    # a tree is built once for the prompt and at most once a token, of those really decoded
    most = math.ceil(max(*tokens, asked)) + 1
    at_most = most * part[0] / whole[0], most * part[1] / whole[1]
    return Audit(
        latency, mask, throughput, tokens, calls, most, (calls[0] * part[0] / whole[0], calls[0] * part[1] / whole[1]),
        at_most, (min(fits), max(fits)),
        agrees={
            "latency": abs(latency - p.deltas.latency_percent) < 0.06,
            "mask_ratio": abs(mask - p.deltas.mask_ratio) < 0.6,
            "throughput": abs(throughput - p.deltas.tokens_per_second_percent) < 0.06,
            "tokens": abs(tokens[0] - asked) < 0.5,
            "calls_by_change": calls[0] <= most,
            "calls_by_shares": max(calls[1:]) <= most,
            "share_before": at_most[0] >= shares[0],
            "share_after": at_most[1] >= shares[1],
        },
        consistent=min(calls) > 0 and max(calls) <= (1 + SLACK) * min(calls) and min(calls) <= most,
    )  # fmt: skip


class SeedSettings(Part):
    """tokens: what a decode stands for; stated_acceptance: tokens a cycle where random weights accept nothing."""

    target: str
    tokens: int
    stated_acceptance: float | None


class SeedRecord(Record):
    """The experiment done again: `rebuild` against `incremental` in whole decodes."""

    schema_name: Literal["eagle_lab.seed.v2"] = Field("eagle_lab.seed.v2", alias="schema")
    settings: SeedSettings
    comparison: ComparisonRecord


def redo(
    pair: Pair, *, iterations: int = 20, max_new_tokens: int = 50, forks: int | None = None
) -> SeedRecord:
    """The experiment by this kit.

    A shape's random weights accept next to nothing, so there a decode has as many cycles as `max_new_tokens` take at
    the stated acceptance; the settings say so.
    """
    stated = stated_acceptance(pair)
    done = compare(
        pair, baseline=BASELINE, candidate="incremental", prompts=get_prompts(pair, iterations), iterations=iterations,
        max_new_tokens=max_new_tokens if stated is None else math.ceil(max_new_tokens / stated), forks=forks,
        pairs_of="decodes",  # what was published are whole decodes
    )  # fmt: skip
    settings = SeedSettings(
        target=done.record.settings.target, tokens=max_new_tokens, stated_acceptance=stated
    )
    return SeedRecord(**made(str(pair.device)), settings=settings, comparison=done.record)


@dataclass(frozen=True)
class InDecodes:
    """One redone experiment: candidate over baseline in whole decodes and a mask's call, the mask's share of a decode in
    both arms, and how many of the pairs decoded the same tokens."""

    verdict: Verdict
    mask: Interval | None
    shares: tuple[float, float] | None
    same: int
    pairs: int


@dataclass(frozen=True)
class Ours:
    """What our records of one kind of machine say; by target where decodes matter, ratios over `rebuild`'s time."""

    machine: str | None
    decodes: dict[str, InDecodes]
    ratios: dict[tuple[str, int], Interval]  # (builder, nodes)
    growths: dict[str, Interval]
    kernel_s: float | None  # the CUDA kernel's median inside a graph
    profiles: dict[str, dict[str, Stage]]  # by target, then by stage

    def large(self) -> list[Interval]:
        """The ratios of `incremental` at large trees."""
        return [self.ratios["incremental", n] for n in LARGE if ("incremental", n) in self.ratios]

    @property
    def best(self) -> str | None:
        """The builder with the least ratio at 63 nodes, by the upper ends."""
        known = {name: r[2] for (name, n), r in self.ratios.items() if n == NODES and name != BASELINE}
        return min(known, key=lambda name: known[name]) if known else None

    @property
    def without_clone(self) -> float | None:
        """The part of `incremental`'s time that goes away when its clone does."""
        found = [self.ratios.get((name, NODES)) for name in ("incremental_inplace", "incremental")]
        return 1 - found[0][1] / found[1][1] if found[0] and found[1] else None


def ours(
    gpu: bool,
    seeds: Mapping[str, SeedRecord],
    profiles: Mapping[str, ProfileRecord],
    sweeps: Mapping[Any, SweepRecord],
) -> Ours:
    """The numbers of our records of CPUs, or of GPUs. Records of different kinds of machine are never mixed."""

    def here(records: Mapping[Any, Any]) -> list[Any]:
        return [r for r in records.values() if bool(r.environment.gpu) == gpu]

    machines = [machine_key(r.environment) for kind in (sweeps, seeds, profiles) for r in here(kind)]
    staged = {short(r.settings.target): {s.name: s for s in stages(r)} for r in here(profiles)}
    ratios, growths, kernel = {}, {}, []
    for record in here(sweeps):
        for name in record.settings.builders:
            for size in record.settings.sizes:
                if found := ratio(record, name, size):
                    ratios[name, size] = found
            if order := growth(record, name):
                growths[name] = order
        kernel += record.samples("cuda", NODES, 1, "graph_s")
    return Ours(
        machines[0] if machines else None,
        {short(r.settings.target): _in_decodes(r.comparison) for r in here(seeds)},
        ratios, growths, median(kernel) if kernel else None,
        {target: found for target, found in staged.items() if "tree_mask" in found},  # a replayed cycle has none
    )  # fmt: skip


def short(target: str) -> str:
    """The last part of a target's name."""
    return target.rpartition("/")[2].removeprefix("shape:")


def _in_decodes(record: ComparisonRecord) -> InDecodes:
    rows = {row.metric: row.ratio for row in table(record)}
    shares = [part_share(record, arm) for arm in ("baseline", "candidate")]
    same = sum(sample.difference is None for sample in record.samples)
    return InDecodes(
        verdict_of(record), rows.get("mask construction, a call"),
        (shares[0][0], shares[1][0]) if shares[0] and shares[1] else None, same, len(record.samples),
    )  # fmt: skip


class Finding(StrEnum):
    """What becomes of a claim."""

    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    UNSUPPORTED = "not supported by its data"


def decide(found: Iterable[Any], confirms: Callable[[Any], bool], refutes: Callable[[Any], bool]) -> Finding:
    """Confirmed or refuted where every number found does so, and there is one."""
    known = [x for x in found if x is not None]
    if known and all(map(confirms, known)):
        return Finding.CONFIRMED
    return Finding.REFUTED if known and all(map(refutes, known)) else Finding.UNSUPPORTED


def faster(r: Interval) -> bool:
    """Whether the whole interval of a ratio is below 1."""
    return r[2] < 1


def slower(r: Interval) -> bool:
    """Whether it is above 1."""
    return r[0] > 1


def never(x: Any) -> bool:
    """What our records can't show."""
    return False


def _end_to_end(p: Published, cpu: Ours, gpu: Ours) -> Finding:
    # on another GPU than theirs an effect of half to twice the size is the same finding
    x = p.deltas.latency_percent / 100
    return decide(
        [d.verdict for d in gpu.decodes.values()],
        lambda v: v.low > 1 and x / 2 <= v.estimate - 1 <= 2 * x,
        lambda v: v.high < 1 + x / 2 or v.low > 1 + 2 * x,
    )


def _eleven(p: Published, cpu: Ours, gpu: Ours) -> Finding:
    x = p.deltas.mask_ratio
    found = [gpu.ratios.get(("incremental", NODES)), *(d.mask for d in gpu.decodes.values())]
    return decide(found, lambda r: x / 2 <= r[0] and r[2] <= 2 * x, lambda r: r[2] < x / 2 or r[0] > 2 * x)


def _order(m: Ours) -> Interval | None:
    """By how much the exponent of `incremental` is below that of `rebuild`; one order is claimed."""
    a, b = m.growths.get(BASELINE), m.growths.get("incremental")
    return (a[0] - b[2], a[1] - b[1], a[2] - b[0]) if a and b else None


def _share(which: int) -> Callable[[Published, Ours, Ours], Finding]:
    # by its own table: even a tree for each token takes less than the share that it states
    def rule(p: Published, cpu: Ours, gpu: Ours) -> Finding:
        refuted = audit(p).most_shares[which] < p.both("mask_share")[which]
        return Finding.REFUTED if refuted else Finding.UNSUPPORTED

    return rule


def _profiles(cpu: Ours, gpu: Ours) -> list[dict[str, Stage]]:
    return [*cpu.profiles.values(), *gpu.profiles.values()]


CLAIMS: dict[str, Callable[[Published, Ours, Ours], Finding]] = {
    "end-to-end-slower": _end_to_end,
    "revert": lambda p, cpu, gpu: decide(
        [d.verdict.decision for d in gpu.decodes.values()],
        lambda decision: decision == Decision.REVERT,
        lambda decision: decision == Decision.ADOPT,
    ),
    "mask-11x-slower": _eleven,
    # eleven times because of the clone means that over 90% of the time go away without it
    "clone-overhead": lambda p, cpu, gpu: decide(
        [cpu.without_clone, gpu.without_clone], lambda part: part >= 0.5, lambda part: part < 0.5
    ),
    "baseline-optimal": lambda p, cpu, gpu: decide(
        [gpu.ratios[gpu.best, NODES]] if gpu.best else [], never, lambda r: r[2] < 0.9
    ),
    "too-small": lambda p, cpu, gpu: decide([*cpu.large(), *gpu.large()], never, slower),
    "complexity": lambda p, cpu, gpu: decide(
        [_order(cpu), _order(gpu)], lambda drop: drop[0] > 0 and drop[2] >= 1, lambda drop: drop[2] < 1
    ),
    "mask-2-percent": _share(0),
    "mask-20-percent": _share(1),
    "helps-large-trees": lambda p, cpu, gpu: decide([*cpu.large(), *gpu.large()], faster, slower),
    "helps-cpu-only": lambda p, cpu, gpu: decide([cpu.ratios.get(("incremental", NODES))], faster, slower),
    "helps-custom-kernel": lambda p, cpu, gpu: decide([gpu.ratios.get(("cuda", NODES))], faster, never),
    "optimize-elsewhere": lambda p, cpu, gpu: decide(
        _profiles(cpu, gpu), lambda s: s["draft"].whole + s["target"].whole > 0.5, never
    ),
    "dont-optimize-mask": lambda p, cpu, gpu: decide(_profiles(cpu, gpu), lambda s: s["tree_mask"].ceiling < 0.02, never),
    "output-consistent": lambda p, cpu, gpu: decide(
        [*cpu.decodes.values(), *gpu.decodes.values()], lambda d: d.same == d.pairs, never
    ),
}  # fmt: skip


def findings(p: Published, cpu: Ours, gpu: Ours) -> dict[str, Finding]:
    """What becomes of each claim, by its id. Raises ValueError for a claim without a rule: none is passed over."""
    unknown = [claim.id for claim in p.claims if claim.id not in CLAIMS]
    if unknown:
        raise ValueError(f"there is no rule for the claim {unknown[0]!r} of the investigation.")
    return {claim.id: CLAIMS[claim.id](p, cpu, gpu) for claim in p.claims}
