"""The ladder of optimizations, tree sizes, batches and long contexts in tables and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from statistics import median
from typing import Any

from eagle_lab.report.words import percent, plain, ratio, render, table
from eagle_lab.studies import scaling as study
from eagle_lab.studies.ladder import (
    Ladder,
    Prepared,
    Rung,
    Skip,
    TreeSize,
    changed,
    fastest_tree,
    gain_shares,
    ratios,
)
from eagle_lab.studies.operators import Operators, OperatorsRecord
from eagle_lab.studies.record import OptimizeRecord
from eagle_lab.studies.scaling import Batch, ContextsRecord, Turns
from eagle_lab.verdict.stats import Verdict, paired_interval

# kinds of kernels by marks in their names; first attention, as the library's has marks of products in its names too
KINDS = {
    "attention": ("whole_kernel", "part_kernel", "join_kernel", "flash", "fmha"),
    "matrix products": ("gemm", "nvjet", "splitk", "cutlass", "gemv", "product_kernel", "stream_kernel"),
    "choosing children": ("chunk_kernel", "merge_kernel", "topk", "sort"),
    "sums over GPUs": ("nccl",),
}


def title(record: OptimizeRecord | ContextsRecord) -> str:
    """Target, dtype and machine in one line, and what the acceptance is where it is not measured."""
    return render("ladder_title.j2", settings=record.settings, environment=record.environment)


def ladder(found: Ladder) -> str:
    """What the ladder says of the best strategy against the first, in words."""
    return render(
        "ladder.md.j2",
        found=found,
        first=found.rungs[0].strategy,
        chain=math.prod(ratios(found).values()),
    )


def skipped(found: Ladder) -> str:
    """The rungs that were not measured, and why, as a list; empty where all were."""
    return render("ladder_skipped.md.j2", found=found, Skip=Skip)


def ladder_table(found: Ladder) -> str:
    """One row a rung: change (strategy below it), time over that of the rung below, verdict, cycle, times the floor."""
    return table(
        [
            {
                "change": f"{rung.change}<br><sub>{_what(rung)}</sub>",
                "time / rung below": ratio(rung.verdict.interval) if rung.verdict else "–",
                "verdict": decision(rung.verdict) if rung.verdict else "–" if number else "start",
                "cycle ms" if found.in_turn else "cycle ms (alone)": plain((rung.cycle_s or math.nan) * 1e3),
                "× floor": plain(rung.cycle_s / found.floor_s) if rung.cycle_s and found.floor_s else "–",
            }
            for number, rung in enumerate(found.rungs)
        ]
    )


def _what(rung: Rung) -> str:
    """The strategy; where a rung between failed, also on what axes it differs from the one below."""
    axes = changed(rung)
    return f"`{rung.strategy}`" + (f" (differs in {' and '.join(axes)})" if len(axes) > 1 else "")


def details_table(record: OptimizeRecord) -> str:
    """One row a rung: its share of the gain, tokens a second at one τ for all, what preparing it took."""
    found, tau = record.ladder, record.acceptance_length
    assert found is not None
    gained = found.verdict is None or found.verdict.high < 1  # else there is no gain to share
    at = f" at τ {tau:.2f}{', stated' if found.stated_acceptance else ''}" if tau else ""
    shared: set[tuple[float, int]] = set()
    return table(
        [
            {
                "change": rung.change,
                "share of the gain": percent(share, 0) if gained and share is not None else "–",
                f"tokens/s{at}": plain(tau / rung.cycle_s) if tau and rung.cycle_s else "–",
                "prepared": _prepared(rung.prepared, shared),
            }
            for rung, share in zip(found.rungs, gain_shares(found), strict=True)
        ]
    )


def prepared(sessions: Sequence[Prepared], shared: set[tuple[float, int]]) -> tuple[float, int]:
    """Seconds and bytes that preparing a rung took beside what earlier rungs had prepared.

    `shared` holds the captured prefills of earlier rungs, by seconds and bytes, and takes those of this one.
    """
    seconds = sum(s.seconds for s in sessions)
    kept = sum(s.bytes + s.cache_bytes for s in sessions)
    for reading in dict.fromkeys(r for s in sessions for r in s.readings):
        if reading not in shared:
            shared.add(reading)
            seconds, kept = seconds + reading[0], kept + reading[1]
    return seconds, kept


def _prepared(sessions: Sequence[Prepared], shared: set[tuple[float, int]]) -> str:
    if not sessions:
        return "–"
    seconds, kept = prepared(sessions, shared)
    return f"{seconds:.1f} s, {kept / 2**20:.0f} MiB"


def decision(verdict: Verdict) -> str:
    """The decision, and whether it is provisional."""
    return f"{verdict.decision.replace('_', ' ')}{' (provisional)' * verdict.provisional}"


def lossless(found: Ladder) -> str:
    """Whether the rungs' tokens are plain decoding's, in words; the widest near tie with its margin."""
    ties = [tie for rung in found.rungs if rung.checked for tie in (*rung.ties, rung.plain)]
    return render("lossless.md.j2", found=found, widest=study.widest(ties))


def sizes(found: Sequence[TreeSize]) -> str:
    """Which tree size pays against plain decoding on this machine, if any was shown to, in words."""
    return render("tree_sizes.md.j2", best=fastest_tree(found), count=len(found))


def best_against_plain(record: OptimizeRecord) -> str:
    """How many times as fast as plain decoding the best strategy is, by tree; empty where it was not measured."""
    return render("best_against_plain.md.j2", rows=record.against_plain, several=len(record.tree_sizes))


def batch_table(found: Sequence[Batch]) -> str:
    """One row a batch size: its tree where they differ, tokens a second, seconds of a decode, time over plain decoding's,
    τ, rows as alone."""
    several = len({row.total_tokens for row in found}) > 1
    return table(
        [
            {
                "batch": str(row.batch),
                **({"draft nodes": str(row.total_tokens)} if several else {}),
                "EAGLE-3 tokens/s": plain(row.eagle_rate),
                "plain tokens/s": plain(row.plain_rate),
                "EAGLE-3 s": plain(row.eagle_decode_s),
                "plain s": plain(row.plain_decode_s),
                "time / plain's": ratio(row.ratio),
                "τ": f"{row.acceptance_length:.2f}{' (stated)' * row.stated}",
                "as alone": f"{row.batch - row.rows_parted} of {row.batch}",
            }
            for row in found
        ]
    )


def batches(found: Sequence[Batch], trees: Sequence[TreeSize] = ()) -> str:
    """From which batch size on speculative decoding was not measured to be faster, in words.

    trees: what was measured with the same prompts; the tree of a batch of one is held against it.
    """
    return render("batches.md.j2", rows=found, study=study, same=same_tree(found, trees))


def contexts_table(record: ContextsRecord) -> str:
    """One row a prefix: cycle and plain step with their quartiles, over their floors, how many times as fast as plain."""
    rows = []
    for row in record.contexts:
        cells = {"prefix": f"{row.prefix:,}"}
        for name, floor, turns, least in (
            ("cycle ms", "its floor", row.eagle, row.floor_s),
            ("plain step ms", "step's floor", row.plain, row.plain_floor_s),
        ):
            cells |= {
                name: _quartiles(turns),
                floor: plain(least * 1e3) if least else "–",
                f"× {floor}": plain(turns.median / least) if least else "–",
            }
        cells |= {
            "× plain's speed": plain(record.speed(row)),
            "prefill + cycle s": plain(median(row.eagle.first_s)),
        }
        rows.append(cells)
    return table(rows)


def _quartiles(turns: Turns) -> str:
    low, middle, high = turns.quartiles
    return f"{plain(middle * 1e3)} ({plain(low * 1e3)}–{plain(high * 1e3)})"


def contexts(record: ContextsRecord) -> str:
    """One record as a part of a page: what a long prefix costs, in words and as a table."""
    said = render(
        "contexts.md.j2",
        title=title(record),
        record=record,
        widest=study.widest([c.tie for c in record.contexts]),
    )
    return f"{said.strip()}\n\n{contexts_table(record)}"


def same_tree(found: Sequence[Batch], trees: Sequence[TreeSize]) -> dict[str, Any] | None:
    """A batch of one, the same tree and strategy alone, and that over the first pairs only, whose prompts the batch had;
    None where either was not measured."""
    one = next((row for row in found if row.batch == 1), None)
    if one is None:
        return None
    shape = (one.strategy, one.top_k, one.depth, one.total_tokens)
    tree = next((t for t in trees if (t.strategy, t.top_k, t.depth, t.total_tokens) == shape), None)
    if tree is None or tree.verdict.pairs <= one.pairs:
        return None
    # the processes' shares follow each other
    plain, eagle = zip(*islice(chain(*tree.seconds), one.pairs), strict=True)
    return {"one": one, "tree": tree, "first": paired_interval(plain, eagle)}


def kind(kernel: str) -> str:
    """What a kernel does, by its name: one of `KINDS`, or "small kernels"."""
    return next((k for k, marks in KINDS.items() if any(m in kernel.lower() for m in marks)), "small kernels")


def short(kernel: str) -> str:
    """A kernel's name without its template arguments and namespaces, cut to a readable length."""
    name = kernel.partition("<")[0].removeprefix("void ").rpartition("::")[2] or kernel
    return name if len(name) <= 60 else f"{name[:59]}…"


def busy_by_kind(found: Operators) -> dict[str, float]:
    """Busy milliseconds of a cycle on a GPU by kinds of kernels; unnamed ones are small."""
    assert found.busy_s is not None
    times = dict.fromkeys([*KINDS, "small kernels"], 0.0)
    for row in found.top_kernels:
        times[kind(row.name)] += row.device_ms / found.cycles
    times["small kernels"] += found.busy_s / found.cycles * 1e3 - sum(times.values())
    return times


def remaining(record: OptimizeRecord) -> str:
    """Where the best strategy's time is, by its kernels under the profiler, in words."""
    found = record.ladder
    rung = found.rung(found.best) if found else None
    cycle, floor = rung.cycle_s if rung else None, found.floor_s if found else None
    return operators(record.operators, cycle, floor)


def operators(
    found: Operators | None,
    cycle: float | None = None,
    floor: float | None = None,
    whose: str = "the best strategy",
) -> str:
    """A cycle's kernels under the profiler, in words; cycle and floor: seconds, where they are known."""
    timed = found is not None and found.busy_s is not None and bool(found.top_kernels)
    times = busy_by_kind(found) if timed and found else None
    told = {"operators": found, "times": times, "cycle": cycle, "floor": floor, "whose": whose}
    return render("remaining.md.j2", most=5, short=short, **told)


def kernels(record: OperatorsRecord) -> str:
    """One record of a cycle's kernels as a part of a page."""
    told = operators(record.operators, whose="this strategy")
    return render("kernels.md.j2", settings=record.settings, environment=record.environment, told=told)


def section(record: OptimizeRecord) -> str:
    """One record as a part of a page: ladder, what is left of the time, tree sizes, batches."""
    parts = [f"{title(record)}."]
    if record.ladder:
        parts += [ladder(record.ladder), ladder_table(record.ladder), skipped(record.ladder)]
        parts += [details_table(record), lossless(record.ladder), remaining(record)]
    if record.tree_sizes:
        parts += [sizes(record.tree_sizes), best_against_plain(record)]
    if record.batches:
        parts += [batches(record.batches, record.tree_sizes), batch_table(record.batches)]
    return "\n\n".join(part.strip() for part in parts if part.strip())
