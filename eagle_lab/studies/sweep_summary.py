"""What a sweep says: tables, floors, growth orders and crossover points; its bars are in `sweep_bars`.

All of it follows from the record's raw samples. Ratios are builder over `rebuild`, below 1 is faster.
Crossovers: linear between sizes in log ratio against log size; their intervals are percentiles over resampled pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record, read
from eagle_lab.verdict.stats import Interval, Verdict, paired_interval

BASELINE = "rebuild"
HOLE = "·"  # the mark of a cell without a number


def cell(record: Record, name: str, size: int, batch: int = 1) -> Record:
    """A cell, with a hole's reason where the sweep has not come to it."""
    return record["cells"].get(f"{name}/{size}/{batch}", {"hole": "not measured yet"})


def samples(record: Record, name: str, size: int, batch: int = 1, what: str = "seconds") -> np.ndarray | None:
    """Seconds [n] of a cell, None where it is a hole."""
    found = cell(record, name, size, batch).get(what)
    return np.asarray(found) if found else None


def median(record: Record, name: str, size: int, batch: int = 1, what: str = "seconds") -> float | None:
    """Median seconds of a cell, None for a hole."""
    found = samples(record, name, size, batch, what)
    return None if found is None else float(np.median(found))


def ratio(record: Record, name: str, size: int, batch: int = 1) -> Interval | None:
    """Builder over baseline from the cell's own pairs: low, estimate, high; None for a hole."""
    found = cell(record, name, size, batch)
    return None if "hole" in found else paired_interval(found["baseline_s"], found["seconds"])


def floor_s(record: Record, size: int, batch: int = 1, what: str = "seconds") -> float | None:
    """The least that a mask takes here: one call, and its bytes over the measured bandwidth; for "graph_s" the call is
    the smallest kernel inside a graph. None where that was not measured, as for "host_s", which waits for nothing."""
    floor, nodes = record["floor"], size + 1
    call = floor.get({"seconds": "call_s", "graph_s": "graph_call_s"}.get(what, ""))
    return None if call is None else call + batch * (nodes * nodes + 8 * size) / floor["bytes_per_s"]


def times(record: Record, what: str = "seconds") -> pd.DataFrame:
    """Median microseconds, builders by sizes, the floor last; a hole is marked."""
    rows = {}
    for name in record["settings"]["builders"]:
        values = [median(record, name, size, 1, what) for size in record["settings"]["sizes"]]
        rows[name] = [HOLE if v is None else f"{v * 1e6:.3g}" for v in values]
    least = [floor_s(record, size, 1, what) for size in record["settings"]["sizes"]]
    rows["floor"] = [HOLE if x is None else f"{x * 1e6:.3g}" for x in least]
    return pd.DataFrame.from_dict(rows, orient="index", columns=record["settings"]["sizes"])


def speedups(record: Record) -> pd.DataFrame:
    """Times faster than `rebuild`, with the 95% interval of the pairs; a hole is marked."""
    rows = {}
    for name in record["settings"]["builders"]:
        found = [ratio(record, name, size) for size in record["settings"]["sizes"]]
        rows[name] = [
            HOLE if r is None else f"{1 / r[1]:.3g} [{1 / r[2]:.3g}, {1 / r[0]:.3g}]" for r in found
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=record["settings"]["sizes"])


def memory(record: Record) -> pd.DataFrame:
    """Peak memory over the mask's own bytes, builders by sizes."""
    rows = {}
    for name in record["settings"]["builders"]:
        found = [cell(record, name, size).get("peak_bytes") for size in record["settings"]["sizes"]]
        own = [(size + 1) ** 2 for size in record["settings"]["sizes"]]
        rows[name] = [HOLE if b is None else f"{b / o:.2f}" for b, o in zip(found, own, strict=True)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=record["settings"]["sizes"])


def holes(record: Record) -> list[str]:
    """One sentence for each builder and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, one in record["cells"].items():
        name, size, batch = key.split("/")
        where = size if batch == "1" else f"{size}×{batch}"
        for part in ("hole", "graph_hole"):
            if part in one:
                found.setdefault((name, one[part]), []).append(where)
    return [f"{name} at {', '.join(at)}: {why}." for (name, why), at in found.items()]


def growth(record: Record, name: str, smallest: int = 63, what: str = "seconds") -> Interval | None:
    """The exponent b of t ∝ n^b over the sizes from `smallest`, with the 95% interval of the regression; None below
    three sizes."""
    points = [(s, median(record, name, s, 1, what)) for s in record["settings"]["sizes"] if s >= smallest]
    known = [(math.log(size), math.log(value)) for size, value in points if value]
    if len(known) < 3:
        return None
    line = scipy_stats.linregress(*zip(*known, strict=True))
    half = scipy_stats.t.ppf(0.975, len(known) - 2) * line.stderr
    return line.slope - half, line.slope, line.slope + half


@dataclass(frozen=True)
class Crossover:
    """Where a builder becomes faster than the baseline: a size with its interval, or why there is none."""

    name: str
    size: float | None
    low: float | None
    high: float | None
    says: str


def crossover(record: Record, name: str, draws: int = 1000, seed: int = 0) -> Crossover | None:
    """The smallest size from which the builder stays faster than `rebuild`; None where fewer than two sizes are known."""
    sizes = [size for size in record["settings"]["sizes"] if ratio(record, name, size)]
    if len(sizes) < 2:
        return None
    logs = [np.log(samples(record, name, s)) - np.log(cell(record, name, s)["baseline_s"]) for s in sizes]  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    drawn = [np.median(x[rng.integers(0, len(x), (draws, len(x)))], axis=1) for x in logs]
    at = _crossing(sizes, np.array([np.median(x) for x in logs])[:, None])[0]
    low, high = np.quantile(_crossing(sizes, np.array(drawn)), [0.025, 0.975], method="nearest")
    first, last = sizes[0], sizes[-1]
    if low == high == 0:
        return Crossover(name, None, None, None, f"faster at every size from {first} to {last}")
    if low == high == math.inf:
        return Crossover(name, None, None, None, f"faster at no size up to {last}")
    ends = [
        f"below {first}" if x == 0 else f"above {last}" if x == math.inf else f"{x:.0f}"
        for x in (low, at, high)
    ]
    return Crossover(
        name, float(at), float(low), float(high), f"faster from {ends[1]} [{ends[0]}, {ends[2]}]"
    )


def _crossing(sizes: list[int], ratios: np.ndarray) -> np.ndarray:
    """Per column of log ratios [sizes, draws]: the last crossing below 0; 0 where all are below, inf where the last
    is not."""
    x = np.log(sizes)
    found = np.zeros(ratios.shape[1])
    for i in range(len(sizes) - 1):
        above, below = ratios[i], ratios[i + 1]
        down = (above >= 0) & (below < 0)
        share = np.divide(above, above - below, out=np.zeros_like(above), where=down)
        found = np.where(down, np.exp(x[i] + share * (x[i + 1] - x[i])), found)
    return np.where(ratios[-1] >= 0, math.inf, found)


def best(
    record: Record, size: int, what: str = "seconds", among: Sequence[str] | None = None
) -> tuple[str, float] | None:
    """The fastest builder at a size (of those in `among`) and its median seconds; None where there is no number."""
    names = record["settings"]["builders"] if among is None else among
    known = [(median(record, n, size, 1, what), n) for n in names]
    found = [(t, n) for t, n in known if t is not None]
    return (min(found)[1], min(found)[0]) if found else None


def beside(record: Record, name: str | None, size: int, verdict: Verdict, who: str = "") -> str:
    """The isolated ratio and the whole decode's, in one sentence for each, as Markdown.

    Args: name: the builder, None where no time of a mask alone can stand beside the verdict; who: what was decoded.
    """
    first = ""
    if name is not None:
        alone = ratio(record, name, size)
        first = f"`{name}` has no isolated time at {size} nodes. "
        if alone:
            times = f"{1 / alone[1]:.1f}× [{1 / alone[2]:.1f}, {1 / alone[0]:.1f}]"
            first = f"Alone, `{name}` builds a mask of {size} nodes {times} as fast as `rebuild`. "
    whole = f"{first}In whole decodes{who}"
    if verdict.pairs == 0:
        return f"{whole}: {verdict.decision.value}, as no pair was left. {', '.join(r.why for r in verdict.reasons)}."
    return f"{whole}: {verdict}."


def headline(record: Record) -> str:
    """Which machine a record is of, when, and in how many pairs a cell, as Markdown."""
    environment, settings = record["environment"], record["settings"]
    return (
        f"**{machine_key(environment)}**, {record['created'][:10]}, {settings['iterations']} pairs a cell, "
        f"{settings['trees']} trees in rotation."
    )


def committed(path: Path) -> Record | None:
    """A committed sweep, None where there is none; RecordError where the file is no record."""
    return read(path) if path.exists() else None


def growth_words(record: Record, what: str = "seconds") -> str:
    """The growth order of each builder from 63 nodes up, a Markdown list; inside a graph with what="graph_s"."""
    names = record["settings"]["builders"]
    known = [(name, b) for name in names if (b := growth(record, name, what=what))]
    return (
        "\n".join(f"- `{name}`: n^{b[1]:z.2f} [{b[0]:z.2f}, {b[2]:z.2f}]" for name, b in known)
        or "Not measured yet."
    )


def crossover_words(record: Record) -> str:
    """From which size on each builder is faster than `rebuild`, a Markdown list."""
    names = [name for name in record["settings"]["builders"] if name != BASELINE]
    known = [found for name in names if (found := crossover(record, name))]
    return "\n".join(f"- `{found.name}`: {found.says}" for found in known) or "Not measured yet."
