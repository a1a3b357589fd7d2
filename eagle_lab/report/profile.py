"""A profile in tables and words; everything is worked out from the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.floor import Experts
from eagle_lab.report.words import percent, plain, render, signed_percent, table
from eagle_lab.studies import breakdown
from eagle_lab.studies.breakdown import Stage, cycle_seconds, over_floor, stages
from eagle_lab.studies.profile import MODES, ProfileRecord, WhatIf
from eagle_lab.studies.whatif import WIDE, effect
from eagle_lab.verdict.stats import median_interval


def title(record: ProfileRecord) -> str:
    """Model, dtype, machine and strategy in one line; a stated acceptance is said."""
    return render("profile_title.j2", record=record)


def answer(record: ProfileRecord) -> str:
    """Where the time goes, whether it adds up, and what bounds the cycle, in words."""
    return render("profile.md.j2", record=record, study=breakdown)


def clocks(record: ProfileRecord) -> str:
    """What recording and what synchronising does to the decode, in words."""
    rows = [r for r in breakdown.disagreement(record) if r[0] not in ("cycle", "rest") and min(r[1:]) > 0]
    name, loose, tight = max(rows, key=lambda row: abs(math.log(row[2] / row[1])))
    spans, synchronised = (median_interval(breakdown.slowdown(record, mode)) for mode in MODES[1:])
    return render(
        "profile_clocks.md.j2", record=record, study=breakdown, spans=spans, synchronised=synchronised,
        stage=name, loose=loose, tight=tight,
    )  # fmt: skip


def floor(record: ProfileRecord) -> str:
    """How far the cycle is from the physical floor, in words."""
    return render("profile_floor.md.j2", record=record, study=breakdown)


def delays(record: ProfileRecord, found: Sequence[WhatIf]) -> str:
    """What each delay in a stage did, beside the stage's share, and which of the two to believe, as Markdown."""
    effects = [(effect(record, one), len(one.samples)) for one in found]
    groups = [list(alike) for _, alike in groupby(effects, key=lambda e: (e[0].meaning, e[0].replayed))]
    stated = record.settings.stated_acceptance
    return render("whatif.md.j2", groups=groups, WIDE=WIDE, stated=stated).strip()


def stage_table(record: ProfileRecord) -> str:
    """One row a stage: calls and ms a cycle, times its floor, share with its spread, share of the decode, ceiling."""
    floors = {row.name: plain(row.times) for row in over_floor(record)}
    device = breakdown.lane(record) == "device"
    return table(
        [
            {
                "stage": f"**{s.name}**" if s.hot else s.name,
                "calls": f"{s.calls:.3g}" if s.in_cycle else "once",
                "host ms": plain(round(s.host_s * 1e3, 4)),
                **(
                    {"device ms": "" if s.device_s is None else plain(round(s.device_s * 1e3, 4))}
                    if device
                    else {}
                ),
                "× floor": floors.get(s.name, ""),
                "of the cycle (quartiles)": _share(s),
                "of the decode": percent(s.whole),
                "ceiling": signed_percent(s.ceiling),
            }
            for s in stages(record)
        ]
    )


def _share(stage: Stage) -> str:
    if not stage.in_cycle:
        return ""
    return f"{percent(stage.share)} ({percent(stage.low)} to {percent(stage.high)})"


def beside_table(one: ProfileRecord, other: ProfileRecord, names: tuple[str, str]) -> str:
    """The stages of two profiles, so called, side by side: ms a cycle and share of the cycle; empty where one has no
    such stage."""
    both = [{s.name: s for s in stages(record) if s.in_cycle} for record in (one, other)]
    rows = []
    for stage in dict.fromkeys([*both[0], *both[1]]):
        row = {"stage": stage}
        for name, known in zip(names, both, strict=True):
            found = known.get(stage)
            row[f"{name}, ms"] = plain(found.seconds * 1e3) if found else ""
            row[f"{name}, share"] = percent(found.share) if found else ""
        rows.append(row)
    return table(rows)


def clock_table(record: ProfileRecord) -> str:
    """Each stage by spans and with a synchronise around it, ms a cycle, and how far apart they are."""
    return table(
        [
            {
                "stage": name,
                "spans, ms": plain(loose),
                "synchronised, ms": plain(tight),
                "apart": signed_percent(tight / loose - 1, 0),
            }
            for name, loose, tight in breakdown.disagreement(record)
            if loose > 0
        ]
    )


def floor_table(record: ProfileRecord) -> str:
    """Measured ms beside the floor's, with the bytes and operations behind it; empty where there is no floor."""
    if record.floor is None or isinstance(record.floor, Experts):
        return ""
    parts = record.floor.parts
    return table(
        [
            {
                "part": row.name,
                "measured ms": plain(row.took),
                "floor ms": plain(row.least),
                "× floor": plain(row.times),
                "MB": plain(parts[row.name].bytes / 1e6),
                "Gflop": plain(parts[row.name].flops / 1e9),
                "memory ms": plain(parts[row.name].memory_s * 1e3),
                "arithmetic ms": plain(parts[row.name].arithmetic_s * 1e3),
            }
            for row in over_floor(record)
        ]
    )


def operator_table(record: ProfileRecord) -> str:
    """The operators with the most time of their own, under the profiler, over its few cycles."""
    found = record.operators
    assert found is not None
    return table(
        [
            {
                "operator": f"`{row.name}`",
                "calls": f"{row.calls:,}",
                "host ms": plain(row.host_ms),
                **({} if row.device_ms is None else {"device ms": plain(row.device_ms)}),
            }
            for row in found.top
        ]
    )


def overview(records: Mapping[str, ProfileRecord]) -> str:
    """A column for each record: cycle, acceptance, hot list, the mask's share and ceiling, distance to the floor."""
    rows: dict[str, dict[str, str]] = {}
    for name, record in records.items():
        s, mask, bound = record.settings, breakdown.stage(record, "tree_mask"), breakdown.bound(record)
        most = over_floor(record)
        cells = {
            "machine": machine_key(record.environment),
            "target": f"{s.target.rpartition('/')[2]}, {s.dtype}",
            "strategy": f"`{s.strategy}`",
            "cycle": f"{plain(cycle_seconds(record) * 1e3)} ms",
            "tokens a cycle": f"{breakdown.acceptance(record):.2f}{', stated' if s.stated_acceptance else ''}",
            "hot stages": ", ".join(f"{h.name} {percent(h.share, 0)}" for h in breakdown.hot_list(record)),
            "device busy": percent(bound.busy, 0) if bound and record.environment.gpu else "–",
            "tree mask": f"{percent(mask.share, 2)}, ceiling {signed_percent(mask.ceiling, 2)}"
            if mask
            else "–",
            "cycle / floor": f"{plain(most[0].times)}×" if most else "–",
        }
        for key, cell in cells.items():
            rows.setdefault(key, {"": key})[name] = cell
    return table(list(rows.values()))


def section(record: ProfileRecord) -> str:
    """One profile as a part of a page: what was decoded where, its stages, and what bounds it."""
    return "\n\n".join(
        text.strip() for text in (f"{title(record)}:", stage_table(record), answer(record), floor(record))
    )
