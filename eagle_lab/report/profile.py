"""A profile in tables and words; everything is worked out from the record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import pandas as pd
import torch

from eagle_lab.decode.strategy import check
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.floor import cycle_work
from eagle_lab.measure.old_records import Record
from eagle_lab.models.pair import Pair
from eagle_lab.studies.breakdown import (
    acceptance,
    bound,
    closes,
    cycle_times,
    decodes,
    disagreement,
    hot_list,
    lane,
    over_floor,
    random_weights,
    slowdown,
    stages,
    weights_words,
    whole_seconds,
)
from eagle_lab.verdict.old_form import comparison
from eagle_lab.verdict.summary import table


def stage_table(record: Record) -> pd.DataFrame:
    """One row a stage: calls, host and device ms a cycle, how many times its physical floor that is (where it has one),
    share with its spread, share of the decode, ceiling."""
    rows, floors = [], {name: times for name, _, _, times in over_floor(record)}
    for s in stages(record):
        timed = not math.isnan(s.share)
        rows.append(
            {
                "stage": s.name,
                "calls a cycle": f"{s.calls:.3g}" if timed else "once",
                "host ms": round(s.host_s * 1e3, 3),
                "device ms": "" if s.device_s is None else f"{s.device_s * 1e3:.3f}",
                "× floor": f"{floors[s.name]:.3g}" if s.name in floors else "",
                "share of the cycle": f"{s.share:.1%}" if timed else "",
                "median [quartiles]": f"{s.median:.1%} [{s.low:.1%}, {s.high:.1%}]" if timed else "",
                "share of the decode": f"{s.whole:.1%}",
                "ceiling": f"{s.ceiling:+.1%}",
                "hot": "hot" if s.hot else "",
            }
        )
    return pd.DataFrame(rows).set_index("stage")


def check_strategies(strategy: str, beside: str | None, device: torch.device | str) -> None:
    """ValueError for a strategy that can't run on the device, and where `beside` is the other one by any name."""
    plan = check(strategy, device)
    if beside is not None and check(beside, device) == plan:
        raise ValueError(
            f"beside is {beside!r}, which is the strategy {strategy!r} itself; give another one."
        )


def beside_table(one: Record, other: Record) -> pd.DataFrame:
    """The stages of two profiles side by side: ms a cycle, on the device where there is one, and share of the cycle.

    A stage that one of them doesn't have, as one graph is one stage, "replay", is left empty there. Raises ValueError
    for two profiles of one strategy, whose columns couldn't be told apart.
    """
    names = [record["settings"]["strategy"] for record in (one, other)]
    if names[0] == names[1]:
        raise ValueError(f"both profiles are of {names[0]}; columns are named by strategy, so give two.")
    columns: dict[str, dict[str, str]] = {}
    for record in (one, other):
        name, found = record["settings"]["strategy"], stages(record)
        timed = [s for s in found if not math.isnan(s.share)]
        took = {s.name: s.host_s if s.device_s is None else s.device_s for s in timed}
        columns[f"{name}, ms"] = {stage: f"{seconds * 1e3:.3f}" for stage, seconds in took.items()}
        columns[f"{name}, share"] = {s.name: f"{s.share:.1%}" for s in timed}
    return pd.DataFrame(columns).fillna("").rename_axis("stage")


def clock_table(record: Record) -> pd.DataFrame:
    """Each stage by spans and with a synchronise around it, ms a cycle, and how far apart they are."""
    rows = [
        {
            "stage": name,
            "spans, ms": round(loose, 3),
            "synchronised, ms": round(tight, 3),
            "apart": f"{tight / loose - 1:+.0%}",
        }
        for name, loose, tight in disagreement(record)
        if loose > 0
    ]
    return pd.DataFrame(rows).set_index("stage")


def floor_table(record: Record) -> pd.DataFrame:
    """Measured ms beside the floor's, with the bytes and operations behind it.

    Raises ValueError where the record has no floor.
    """
    parts = record.get("floor", {}).get("parts")
    if not parts:
        raise ValueError(
            f"there is no floor: {record.get('floor', {}).get('missing', 'it was not measured')}"
        )
    rows = [
        {
            "part": name,
            "measured, ms": round(took, 3),
            "floor, ms": round(least, 4),
            "measured / floor": f"{times:.3g}×",
            "MB moved": round(parts[name]["bytes"] / 1e6, 2),
            "by memory, ms": round(parts[name]["memory_s"] * 1e3, 4),
            "by arithmetic, ms": round(parts[name]["arithmetic_s"] * 1e3, 4),
        }
        for name, took, least, times in over_floor(record)
    ]
    return pd.DataFrame(rows).set_index("part")


def bytes_table(pair: Pair, top_k: int, depth: int, total_tokens: int, prefix: int) -> pd.DataFrame:
    """What a cycle must move and compute after `prefix` tokens: exact counts from the sizes alone."""
    work = cycle_work(pair, top_k, depth, total_tokens, prefix)
    rows = [{"stage": name, "bytes": w.bytes, "operations": w.flops} for name, w in work.items()]
    total = {
        "stage": "cycle",
        "bytes": sum(w.bytes for w in work.values()),
        "operations": sum(w.flops for w in work.values()),
    }
    return pd.DataFrame([*rows, total]).set_index("stage")


def operator_table(record: Record) -> pd.DataFrame:
    """The operators with the most time of their own, under the profiler, over its few cycles."""
    return pd.DataFrame(record["operators"]["top"]).dropna(axis=1, how="all").set_index("name")


def answer(record: Record) -> str:
    """Where the time goes, in words."""
    hot = ", ".join(f"**{s.name}** {s.share:.0%} (ceiling {s.ceiling:+.0%})" for s in hot_list(record))
    mask = next((s for s in stages(record) if s.name == "tree_mask"), None)
    seconds, count = whole_seconds(record)
    length, words = acceptance(record)
    told = [
        f"A cycle takes {cycle_times(record).mean() * 1e3:.1f} ms ({lane(record)} time) and a decode of "
        f"{record['settings']['max_new_tokens']} tokens {seconds:.2f} s in {count:.0f} cycles; {words}, so "
        f"{length / cycle_times(record).mean():.1f} tokens/s while decoding.",
        f"Above 10% of the cycle: {hot or 'nothing'}.",
    ]
    if mask:
        told.append(
            f"The tree mask takes {mask.share:.2%}: were it free, decoding would be {mask.ceiling:.2%} faster, and no more."
        )
    told.append(closes(record)[3])
    return "\n\n".join([*told, bound(record)])


def clocks(record: Record) -> str:
    """What recording and what synchronising does to the decode, in words."""
    loose, tight = slowdown(record, "spans"), slowdown(record, "synchronised")
    count = len(decodes(record, "off"))
    rows = [row for row in disagreement(record) if row[0] not in ("cycle", "rest") and row[1] > 0]
    name, mine, other = max(rows, key=lambda row: abs(math.log(row[2] / row[1])))
    end = (
        "The spans are the device's time from one stage's first command to its last, waiting for launches included; a "
        "synchronise adds the wait for the device to drain, and keeps the host from going ahead. Believe the spans."
        if lane(record) == "device"
        else "On a CPU there is nothing to wait for, so both should agree but for noise; on a GPU they don't."
    )
    return (
        f"Against the bare decode, {count} of each in random order, spans changed its time by {loose:+.1%} and synchronising "
        f"by {tight:+.1%}. The two differ most in **{name}**: {mine:.3f} ms by spans, {other:.3f} ms synchronised. {end}"
    )


def over(record: Record) -> str:
    """The floor in words."""
    found = record["floor"]
    if "missing" in found:
        return f"There is no floor: {found['missing']}"
    cycle = over_floor(record)[0]
    how = "" if record["environment"].get("gpu") else f", {found['threads']} threads"
    return (
        f"This machine copies {found['bandwidth'] / 1e9:,.1f} GB/s and multiplies {found['rate'] / 1e9:,.0f} Gflop/s "
        f"(best of eight{how}). A cycle can't take less than {cycle[2]:.2f} ms; it takes "
        f"{cycle[1]:.1f} ms, **{cycle[3]:.1f}× the floor**."
    )


def overview(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row for each record: cycle, acceptance, hot list, the mask's share and ceiling, distance to the floor."""
    rows = []
    for name, r in records.items():
        mask = next((s for s in stages(r) if s.name == "tree_mask"), None)
        most = over_floor(r)
        found = r.get("operators") or {}
        busy = (
            found["busy_s"] / found["cycles"] / float(cycle_times(r).mean()) if found.get("busy_s") else None
        )
        rows.append(
            {
                "record": name,
                "machine": machine_key(r["environment"]),
                "target": r["settings"]["target"].rpartition("/")[2],
                "dtype": r["settings"]["dtype"],
                "cycle, ms": round(float(cycle_times(r).mean()) * 1e3, 1),
                "tokens a cycle": acceptance(r)[1].removeprefix("acceptance length "),
                "hot": ", ".join(f"{s.name} {s.share:.0%}" for s in hot_list(r)),
                "device busy": "" if busy is None else f"{busy:.0%}",
                "tree mask": f"{mask.share:.2%}" if mask else "",
                "its ceiling": f"{mask.ceiling:+.2%}" if mask else "",
                "cycle / floor": f"{most[0][3]:.1f}×" if most else r.get("floor", {}).get("missing", ""),
            }
        )
    return pd.DataFrame(rows)


def seed_overview(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row for each metric of each redone investigation: both arms and candidate / baseline, with intervals."""
    rows: list[dict[str, Any]] = []
    for name, r in records.items():
        for row in table(comparison(r["comparison"])):
            if row.metric == "throughput" and random_weights(r):
                continue  # tokens of random weights: what they accept says nothing
            rows.append(
                {
                    "record": name,
                    "target": weights_words(r),
                    "metric": f"{row.metric}, {row.unit}",
                    "rebuild": _interval(row.baseline),
                    "incremental": _interval(row.candidate),
                    "candidate / baseline": _interval(row.ratio),
                }
            )
    return pd.DataFrame(rows)


def seed_settings(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row for each redone investigation: pairs, fresh processes, control, and how long its decodes were."""
    rows = []
    for name, r in records.items():
        compared = comparison(r["comparison"])
        s, samples = compared.settings, compared.samples
        kept = [sample for sample in samples if not sample.control]
        stated = r["settings"].get("stated_acceptance")
        rows.append(
            {
                "record": name,
                "pairs": len(kept),
                "processes": len({sample.fork for sample in kept}),
                "pairs of the A/A control": len(samples) - len(kept),
                "tokens a decode": s.max_new_tokens,
                "cycles a decode": median(sample.cycles for sample in kept),
                "reckoned as": f"{r['settings']['tokens_reckoned_with']} tokens at {stated:g} a cycle"
                if stated
                else "–",
            }
        )
    return pd.DataFrame(rows)


def _interval(found: tuple[float, float, float]) -> str:
    low, at, high = found
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{at:.4g} (too few for an interval)"
    return f"{at:.4g} [{low:.4g}, {high:.4g}]"
