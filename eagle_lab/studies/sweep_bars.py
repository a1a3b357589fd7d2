"""What was asked of the mask builders, what a sweep measured, and the original investigation's three guesses answered."""

from __future__ import annotations

import pandas as pd

from eagle_lab.measure.old_records import Record
from eagle_lab.studies.sweep_summary import BASELINE, best, cell, median, ratio, samples
from eagle_lab.verdict.stats import median_interval

NODES, LARGE, BATCH = 63, 511, 32
TOLD = {True: "yes", False: "no", None: "not measured"}

Row = tuple[
    str, str, bool | None
]  # the bar, what was measured, whether it holds; None where it was not measured


def bars(record: Record) -> pd.DataFrame:
    """The bars of this record's device: what was asked, what was measured, whether it holds ("yes", "no", "not
    measured")."""
    rows = _cpu_bars(record) if record["settings"]["device"] == "cpu" else _gpu_bars(record)
    return pd.DataFrame([(a, b, TOLD[c]) for a, b, c in rows], columns=["bar", "measured", "holds"])


def _cpu_bars(record: Record) -> list[Row]:
    rows: list[Row] = []
    for size, wanted in ((NODES, 8), (1023, 30)):
        bar, top = f"best CPU builder ≥ {wanted}× faster than rebuild at {size}", best(record, size)
        r = ratio(record, top[0], size) if top else None
        if top and r:
            text = f"{top[0]}: {1 / r[1]:.1f}× [{1 / r[2]:.1f}, {1 / r[0]:.1f}]"
            rows.append((bar, text, 1 / r[1] >= wanted))
        else:
            rows.append((bar, "no time in the record", None))
    return rows


def _gpu_bars(record: Record) -> list[Row]:
    asked = (
        f"best builder inside a graph ≤ 8 µs a tree of {NODES} nodes",
        f"and ≥ 40× faster than {BASELINE} with its copy to the device",
        f"a batch of {BATCH} trees ≤ 2× the time of one",
        f"time flat within 2× from {NODES} to {LARGE} nodes",
    )
    top, base = best(record, NODES, "graph_s"), samples(record, BASELINE, NODES)
    if top is None:
        return [(bar, "no graph time in the record", None) for bar in asked]
    name, at = top
    low, _, high = median_interval(samples(record, name, NODES, 1, "graph_s"))  # type: ignore[arg-type]
    rows: list[Row] = [
        (asked[0], f"{name}: {at * 1e6:.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}]", at <= 8e-6)
    ]
    if base is None:
        rows.append((asked[1], f"{BASELINE} has no time in the record", None))
    else:
        slow = median_interval(base)
        words = f"{name}: {slow[1] / at:.0f}× [{slow[0] / high:.0f}, {slow[2] / low:.0f}], {slow[1] * 1e3:.2f} ms before"
        rows.append((asked[1], words, slow[1] / at >= 40))
    for bar, size, batch in ((asked[2], NODES, BATCH), (asked[3], LARGE, 1)):
        took = median(record, name, size, batch, "graph_s")
        if took is None:
            one = cell(record, name, size, batch)
            rows.append((bar, f"{name}: {one.get('hole') or one.get('graph_hole') or 'no graph time'}", None))
        else:
            rows.append((bar, f"{name}: {took / at:.2f}× ({took * 1e6:.1f} µs)", took / at <= 2))
    return rows


def said(record: Record, name: str, size: int) -> str:
    """How a builder compares with `rebuild` at a size, in words with the interval."""
    r = ratio(record, name, size)
    if r is None:
        return f"{name} has no number at {size} ({cell(record, name, size).get('hole')})"
    word, x = ("faster", [1 / r[2], 1 / r[1], 1 / r[0]]) if r[1] < 1 else ("slower", list(r))
    return f"{name} is {x[1]:.3g}× [{x[0]:.3g}, {x[2]:.3g}] {word} at {size}"


def decided(record: Record, name: str, sizes: list[int]) -> str:
    """Whether a builder is faster than `rebuild` at all of these sizes, one word at the start of a sentence."""
    found = [r for size in sizes if (r := ratio(record, name, size))]
    if not found:
        return "Not measured"
    if all(high < 1 for _, _, high in found):
        return "It helps"
    return "It does not help" if all(low >= 1 for low, _, _ in found) else "Undecided"


def guesses(record: Record, machine: str) -> str:
    """The original investigation's three guesses as Markdown, answered with this record's numbers."""
    sizes = [size for size in record["settings"]["sizes"] if size >= 500] or record["settings"]["sizes"][-1:]
    told = "; ".join(said(record, "incremental", size) for size in sizes)
    lines = [f"**500+ tokens, {machine}.** {decided(record, 'incremental', sizes)}: {told}."]
    small = NODES if NODES in record["settings"]["sizes"] else record["settings"]["sizes"][0]
    if record["settings"]["device"] == "cpu":
        answer = decided(record, "incremental", [small])
        lines.append(f"**CPU-only, {machine}.** {answer}: {said(record, 'incremental', small)}.")
    answer, inside = decided(record, "cuda", [small]), median(record, "cuda", small, 1, "graph_s")
    most = f" ({inside * 1e6:.1f} µs inside a graph)" if inside else ""
    lines.append(
        f"**A kernel without the clone, {machine}.** {answer} alone: {said(record, 'cuda', small)}{most}; without a kernel, "
        f"{said(record, 'incremental_inplace', small)}."
    )
    return "\n\n".join(lines)
