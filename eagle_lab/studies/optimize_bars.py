"""What a record of the optimizations was asked to reach, and whether it did: every bar with its measured number.

`OFFICIAL` is the yardstick of one bar, measured before this kit was: the official implementation on an H100 80GB in
bfloat16 (batch 1, tree of 64, depth 7, top_k 10; torch 2.11, transformers 5.17), transformers' own eager forward of 64
rows on the same host, and the official implementation's own target forward, a part of its cycle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record
from eagle_lab.verdict.old_form import verdict as verdict_from
from eagle_lab.verdict.stats import Verdict, median_interval


class Official(NamedTuple):
    """Seconds: the official implementation's cycle, the eager forward that scales it, and the forward in that cycle."""

    cycle: float
    forward: float
    inside: float


# by a part of the target's name
OFFICIAL = {
    "llama-3.1-8b": Official(48.2e-3, 34.3e-3, 29.3e-3),
    "smollm2-135m": Official(65.5e-3, 32.3e-3, 39.0e-3),
}
WITHIN = 0.15
FASTER = {"llama-3.1-8b": 3.5, "smollm2-135m": 10.0}  # the best cycle against the first
OVER_FLOOR = {"llama-3.1-8b": (1.6, 1.25)}  # the bar, and what to aim for beyond it
CYCLE_MS = {"smollm2-135m": (4.0, 1.5)}
AGAINST_PLAIN = 1.5

Row = tuple[
    str, str, bool | None
]  # the bar, what was measured, whether it holds; None where it was not measured
Bar = Callable[[Record, str], Row]


def of_target(record: Record, known: dict[str, Any]) -> str | None:
    """The name in `known` that the record's target has in its own; None where it has none of them."""
    name = str(record["settings"]["target"]).lower()
    return next((one for one in known if one in name), None)


def rung_of(record: Record, strategy: str) -> dict[str, Any] | None:
    """The rung with that strategy and a measured cycle."""
    rungs = record["ladder"]["rungs"]
    return next((r for r in rungs if r["strategy"] == strategy and r["cycle_s"]), None)


def ends(record: Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first rung and the best, both with a measured cycle; None where one has none."""
    first = rung_of(record, record["ladder"]["rungs"][0]["strategy"])
    best = rung_of(record, record["ladder"]["best"])
    return (first, best) if first and best else None


def cycle_words(rung: dict[str, Any]) -> str:
    """A rung's cycle in ms: the median, with its 95% interval over the cycles where they are recorded."""
    low, _, high = median_interval(rung.get("cycles_s") or [rung["cycle_s"]])
    return f"{rung['cycle_s'] * 1e3:.2f} ms{_inside(low * 1e3, high * 1e3)}"


def _inside(low: float, high: float) -> str:
    """An interval in brackets; nothing where there were too few for one."""
    return f" [{low:.2f}, {high:.2f}]" if np.isfinite([low, high]).all() else ""


def _faster(record: Record, name: str) -> Row:
    bar, found = f"best cycle ≥ {FASTER[name]:g}× faster than the faithful baseline's", ends(record)
    if not found:
        return bar, "not measured", None
    times = found[0]["cycle_s"] / found[1]["cycle_s"]
    words = f"{times:.2f}×: {cycle_words(found[0])} to {cycle_words(found[1])}"
    if not record["ladder"].get("in_turn"):
        return bar, f"{words}, minutes apart", times >= FASTER[name]
    pairs = zip(found[0]["cycles_s"], found[1]["cycles_s"], strict=True)
    low, times, high = median_interval([first / best for first, best in pairs])
    words = f"{times:.2f}×{_inside(low, high)}, cycles in turn: {cycle_words(found[0])} to {cycle_words(found[1])}"
    return bar, words + _doubt(low, high, {"the bar": FASTER[name]}), times >= FASTER[name]


def _over_floor(record: Record, name: str) -> Row:
    most, aim = OVER_FLOOR[name]
    bar, found = f"best cycle ≤ {most:g}× the physical floor", ends(record)
    least = record["ladder"]["floor"].get("parts", {}).get("cycle", {}).get("seconds")
    if not found or not least:
        return bar, record["ladder"]["floor"].get("missing", "not measured"), None
    times = found[1]["cycle_s"] / least
    parts = record["ladder"]["floor"]["parts"]
    each = ", ".join(
        f"{part} {cost['seconds'] * 1e3:.2f}"
        for part, cost in parts.items()
        if part not in ("cycle", "plain token")
    )
    words = f"{times:.2f}×: {cycle_words(found[1])} over {least * 1e3:.2f} ms ({each})"
    return bar, words + _aim(f"{aim:g}×", found[1]["cycle_s"] - aim * least), times <= most


def _milliseconds(record: Record, name: str) -> Row:
    most, aim = CYCLE_MS[name]
    bar, found = f"best cycle ≤ {most:g} ms", ends(record)
    if not found:
        return bar, "not measured", None
    words = cycle_words(found[1]) + _aim(f"{aim:g} ms", found[1]["cycle_s"] - aim / 1e3)
    return bar, words, found[1]["cycle_s"] * 1e3 <= most


def _aim(what: str, above: float) -> str:
    """Whether what was aimed for beyond a bar is reached, or how many seconds are missing."""
    return f"; the aim of {what} is {'reached' if above <= 0 else f'missed by {above * 1e3:.2f} ms'}"


def _faithful(record: Record, name: str) -> Row:
    official = OFFICIAL[name]
    bar = f"faithful baseline's cycle within {WITHIN:.0%} of the official one's, scaled by the eager forward"
    here = record.get("faithful")
    if not here or not here["cycle_s"]:
        return bar, "no cycles beside eager forwards in this record", None
    # in turn, one of each: a host's rate of launching moves by a third within seconds
    low, ratio, high = median_interval(
        [c / f for c, f in zip(here["cycle_s"], here["forward_s"], strict=True)]
    )
    wanted = official.cycle / official.forward
    off = ratio / wanted - 1
    words = (
        f"{off:+.0%}: {ratio:.2f}{_inside(low, high)} eager forwards a cycle ({median(here['cycle_s']) * 1e3:.1f} ms over "
        f"{median(here['forward_s']) * 1e3:.1f} ms) against {wanted:.2f} ({official.cycle * 1e3:.1f} over "
        f"{official.forward * 1e3:.1f} ms); the target's forward inside the official cycle took {official.inside * 1e3:.1f} "
        f"ms, so of its own forwards that cycle is {official.cycle / official.inside:.2f}"
    )
    edges = {f"{wanted * (1 + side):.2f} ({side:+.0%})": wanted * (1 + side) for side in (-WITHIN, WITHIN)}
    return bar, words + _doubt(low, high, edges), abs(off) <= WITHIN


def _doubt(low: float, high: float, edges: dict[str, float]) -> str:
    """What to add where an interval holds the bar, so that more of the same could turn the answer; nothing where there
    were too few samples for an interval."""
    if not (low > 0 and np.isfinite(high)):
        return ""
    inside = [name for name, edge in edges.items() if low < edge < high]
    return (
        f"; {' and '.join(inside)} {'lies' if len(inside) == 1 else 'lie'} in the interval" if inside else ""
    )


def _against_plain(record: Record, name: str) -> Row:
    bar = f"EAGLE-3 ≥ {AGAINST_PLAIN:g}× faster than plain decoding on the same runtime, the best strategy's"
    best = record["ladder"]["best"]
    alone, sized = (
        [r for r in record.get(key) or [] if r.get("strategy") == best]
        for key in ("against_plain", "tree_sizes")
    )
    # of the trees set against plain decoding by themselves the first was the fastest when the sizes were measured
    sizes, *others = alone or [best_size({"tree_sizes": sized})]
    if sizes is None or not sizes["verdict"]["estimate"]:
        return bar, "not measured", None
    others = [r for r in others if r["verdict"]["estimate"]]
    verdict = verdict_from(sizes["verdict"])
    tau = f"τ {sizes['acceptance_length']:.2f}{', stated and not measured' if sizes.get('stated') else ''}"
    words = f"{_speedup(verdict)}, {sizes['total_tokens']} draft nodes, {tau}"
    doubt = _doubt(verdict.low, verdict.high, {"the bar": 1 / AGAINST_PLAIN})
    more = [f"; {r['total_tokens']} nodes: {_speedup(verdict_from(r['verdict']))}" for r in others]
    return bar, words + doubt + "".join(more), 1 / verdict.estimate >= AGAINST_PLAIN


def _speedup(verdict: Verdict) -> str:
    """Times as fast, from a ratio of times, with its interval."""
    inside = f" [{1 / verdict.high:.2f}, {1 / verdict.low:.2f}]" if verdict.low > 0 else ""
    return f"{1 / verdict.estimate:.2f}×{inside}"


def best_size(record: Record) -> dict[str, Any] | None:
    """The tree size with the least time against plain decoding's; None where none was measured."""
    judged = [row for row in record.get("tree_sizes") or [] if row["verdict"]["estimate"]]
    return min(judged, key=lambda row: row["verdict"]["estimate"]) if judged else None


def _cpu(record: Record) -> list[Row]:
    found = record["ladder"]["verdict"]
    # the tree that was chosen by its time is judged by a measurement of its own, where there is one
    anew = best_size({"tree_sizes": record.get("against_plain")})
    sizes = anew or best_size(record)
    bar, pays = "best strategy not shown to be slower than the baseline", "a tree size is shown to pay"
    if found is None:
        rows: list[Row] = [(bar, "the baseline itself is the best", True)]
    else:
        verdict = verdict_from(found)
        rows = [(bar, str(verdict), None if not verdict.pairs else verdict.low <= 1)]
    if sizes is None:
        return [*rows, (pays, "not measured", None)]
    verdict = verdict_from(sizes["verdict"])
    inside, several = _inside(verdict.low, verdict.high), len(record.get("tree_sizes") or [])
    named = f"{sizes['total_tokens']} draft nodes, {verdict.estimate:.3f}{inside} of plain decoding's time"
    if several > 1:
        named += f", {'measured anew as' if anew else 'by the same pairs'} the fastest of {several}"
    return [*rows, (pays, named, verdict.high < 1)]


def bars(record: Record) -> pd.DataFrame:
    """Each bar that was set for the record's machine and target: what was asked, what was measured, whether it holds
    ("yes", "no", "not measured"). No rows for a target without bars."""
    if not record["environment"].get("gpu"):
        rows = _cpu(record)
    else:
        known: tuple[tuple[dict[str, Any], Bar], ...] = (
            (OFFICIAL, _faithful), (FASTER, _faster), (OVER_FLOOR, _over_floor), (CYCLE_MS, _milliseconds),
            (OFFICIAL, _against_plain),
        )  # fmt: skip
        rows = [bar(record, name) for asked, bar in known if (name := of_target(record, asked))]
    told = {True: "yes", False: "no", None: "not measured"}
    return pd.DataFrame([(a, b, told[c]) for a, b, c in rows], columns=["bar", "measured", "holds"])


def acceptance(record: Record) -> float | None:
    """τ of the ladder's tree, one number for all rungs: the stated one, else the one over most prompts, where the tree was
    set against plain decoding, else that of the cycles in turn; None where nothing of it was measured."""
    found = record["ladder"]
    if found.get("stated_acceptance"):
        return float(found["stated_acceptance"])
    nodes = found.get("total_tokens", 63)  # records without it were all made with the usual tree
    rows = [
        r
        for key in ("against_plain", "tree_sizes")
        for r in record.get(key) or []
        if r["total_tokens"] == nodes
    ]
    tau = rows[0]["acceptance_length"] if rows else found.get("acceptance_length")
    return float(tau) if tau else None


def remaining(record: Record, most: int = 5) -> str:
    """Where the best strategy's time is, by its kernels under the profiler, in words."""
    found = record.get("operators")
    if not found:
        return "Where the best strategy's time goes has not been measured yet."
    if not found.get("top_kernels"):
        each = [f"`{row['name']}` {row['host_ms'] / found['cycles']:.2f} ms" for row in found["top"][:most]]
        return f"Operators of the best strategy with the most time of their own, a cycle: {', '.join(each)}."
    cycles, busy = found["cycles"], found["busy_s"]
    each = [
        f"`{short(row['name'])}` {row['device_ms'] / 1e3 / busy:.0%} ({row['calls'] / cycles:.0f} a cycle)"
        for row in found["top_kernels"][:most]
    ]
    rung = rung_of(record, record["ladder"]["best"])
    whole = rung["cycle_s"] if rung else None
    share = f" of {whole * 1e3:.2f}" if whole else ""
    gap = whole - busy / cycles if whole else 0.0
    idle = (
        f" In the other {gap * 1e3:.2f} ms it waits: between kernels, and for the copy back and the host's step between two "
        "cycles (the busy time is of a decode under the profiler, the cycle's of the ladder)."
        if gap > 0
        else ""
    )
    times = _times(found)
    kinds = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items() if ms > 0)
    least = record["ladder"]["floor"].get("parts", {}).get("cycle", {}).get("seconds")
    leaves = _leaves(times["matrix products"], least and least * 1e3)
    return (
        f"Of a cycle of the best strategy the device is busy {busy / cycles * 1e3:.2f}{share} ms, in "
        f"{found['kernels'] / cycles:.0f} kernels and copies: {kinds}.{idle}{leaves} The kernels with the most of it: "
        f"{', '.join(each)}."
    )


KINDS = {
    # first, as the library's attention has marks of products in its names too
    "attention": ("whole_kernel", "part_kernel", "join_kernel", "flash", "fmha"),
    "matrix products": ("gemm", "nvjet", "splitk", "cutlass", "gemv", "product_kernel"),
    "choosing children": ("chunk_kernel", "merge_kernel", "topk", "sort"),
}


def kind(kernel: str) -> str:
    """What a kernel does, by its name: one of `KINDS`, or "small kernels"."""
    return next((k for k, marks in KINDS.items() if any(m in kernel.lower() for m in marks)), "small kernels")


def _times(found: dict[str, Any]) -> dict[str, float]:
    """The busy time of a cycle by kinds of kernels, ms; those that the record doesn't name are small ones."""
    times = dict.fromkeys([*KINDS, "small kernels"], 0.0)
    for row in found["top_kernels"]:
        times[kind(row["name"])] += row["device_ms"] / found["cycles"]
    times["small kernels"] += found["busy_s"] / found["cycles"] * 1e3 - sum(times.values())
    return times


def _leaves(products: float, least: float | None) -> str:
    """What faster matrix products could still give: their time over the least that a cycle needs, both in ms."""
    if not least:
        return ""
    return (
        f" The products take {products / least:.2f} times the floor of {least:.2f} ms: faster ones could save at most "
        f"{max(0.0, products - least):.2f} ms, fewer or larger other kernels the rest."
    )


def lossless(record: Record) -> str:
    """Whether the rungs' tokens are plain decoding's, in words; near ties of half precision with their margin."""
    checked = [r for r in record["ladder"]["rungs"] if "against_plain" in r]
    if not checked:
        return "Whether the rungs decode the same tokens was not recorded."
    odd = [r["against_plain"] for r in checked if r["against_plain"] != "identical"]
    parted, pairs = (sum(r.get(key, 0) for r in checked) for key in ("pairs_parted", "pairs"))
    words = (
        f"Of {len(checked)} strategies held against plain decoding, {len(checked) - len(odd)} give its tokens, and in {pairs} timed "
        f"pairs the arms' tokens were identical in {pairs - parted}."
    )
    found = {*odd, *(text for r in checked for text in r.get("parted", ()))}
    ties = sorted(found, key=lambda text: (_margin(text), text))  # a set has no order to leave equal ones in
    return f"{words} The others part at a near tie of logits; the widest: {ties[-1]}." if ties else words


def _margin(difference: str) -> float:
    """The margin of a difference in words, as `agree.Difference` puts it; 0 where there is none."""
    found = re.search(r"margin (\S+), tolerance", difference)
    return float(found[1]) if found else 0.0


def short(kernel: str, most: int = 60) -> str:
    """A kernel's name without its template arguments and namespaces, cut to a readable length."""
    name = kernel.partition("<")[0].removeprefix("void ").rpartition("::")[2] or kernel
    return name if len(name) <= most else f"{name[: most - 1]}…"


def head(record: Record) -> str:
    """Target, dtype and machine in one line, and what the acceptance is where it is not measured."""
    s = record["settings"]
    stated = s.get("stated_acceptance")
    words = f"{s['target'].rpartition('/')[2]}, {s['dtype']}, {machine_key(record['environment'])}"
    return (
        words
        if stated is None
        else f"{words} (random weights: acceptance length {stated:g} is stated, not measured)"
    )
