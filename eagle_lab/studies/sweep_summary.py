"""What a sweep says: ratios, floors, growth orders and crossovers, all from the record's raw samples.

Ratios are builder over `rebuild`, below 1 is faster. Crossovers: linear between sizes in log ratio against log size;
their intervals are percentiles over resampled pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import stats as scipy_stats

from eagle_lab.studies.sweep import NODES, Missing, SweepRecord, Time
from eagle_lab.verdict.stats import Interval, paired_interval

# the least call below a time; host_s waits for nothing
CALLS = {"seconds": "call_s", "graph_s": "graph_call_s"}
DRAWS = 1000  # of resampled pairs


def ratio(record: SweepRecord, builder: str, size: int, batch: int = 1) -> Interval | None:
    """Builder over baseline from the cell's own pairs: low, estimate, high; None where it has none."""
    found = record.cell(builder, size, batch)
    return paired_interval(found.baseline_s, found.seconds) if found and found.seconds else None


def floor_s(record: SweepRecord, size: int, batch: int = 1, what: Time = "seconds") -> float | None:
    """The least seconds that a mask takes here: one call (inside a graph for "graph_s") and its bytes over the
    bandwidth; None where that call was not measured."""
    call = getattr(record.floor, CALLS[what]) if what in CALLS else None
    nodes = size + 1
    return None if call is None else call + batch * (nodes * nodes + 8 * size) / record.floor.bytes_per_s


def memory(record: SweepRecord, builder: str, size: int) -> float | None:
    """Peak bytes of one call over the mask's own bytes."""
    found = record.cell(builder, size)
    return found.peak_bytes / (size + 1) ** 2 if found and found.peak_bytes is not None else None


@dataclass(frozen=True)
class Gap:
    """Why these builders have no time (in_graph: none in a graph) at these (size, batch)."""

    builders: tuple[str, ...]
    missing: Missing
    in_graph: bool
    at: tuple[tuple[int, int], ...]


def gaps(record: SweepRecord) -> list[Gap]:
    """Each reason once, with the builders that it keeps from the same cells."""
    cells: dict[tuple[str, Missing, bool], list[tuple[int, int]]] = {}
    for cell in record.cells:
        for missing, in_graph in ((cell.missing, False), (cell.graph_missing, True)):
            if missing:
                cells.setdefault((cell.builder, missing, in_graph), []).append((cell.size, cell.batch))
    found: dict[tuple[Missing, bool, tuple[tuple[int, int], ...]], list[str]] = {}
    for (builder, missing, in_graph), at in cells.items():
        found.setdefault((missing, in_graph, tuple(at)), []).append(builder)
    return [Gap(tuple(builders), *key) for key, builders in found.items()]


def growth(record: SweepRecord, builder: str, what: Time = "seconds") -> Interval | None:
    """The exponent b of t ∝ n^b over the sizes from NODES, with the 95% interval of the regression; None below three."""
    sizes = [size for size in record.settings.sizes if size >= NODES]
    known = [(s, median(taken)) for s in sizes if (taken := record.samples(builder, s, 1, what))]
    if len(known) < 3:
        return None
    line = scipy_stats.linregress(*np.log(known).T)
    half = scipy_stats.t.ppf(0.975, len(known) - 2) * line.stderr
    return line.slope - half, line.slope, line.slope + half


@dataclass(frozen=True)
class Crossover:
    """The size from which a builder stays faster than the baseline: 0 below the first size, inf above the last."""

    low: float
    size: float
    high: float


def crossover(record: SweepRecord, builder: str) -> Crossover | None:
    """From which size on the builder is faster than `rebuild`, with its interval; None below two sizes."""
    cells = [c for size in record.settings.sizes if (c := record.cell(builder, size)) and c.seconds]
    if len(cells) < 2:
        return None
    sizes = [c.size for c in cells]
    logs = [np.log(c.seconds) - np.log(c.baseline_s) for c in cells]
    rng = np.random.default_rng(0)
    drawn = [np.median(x[rng.integers(0, len(x), (DRAWS, len(x)))], axis=1) for x in logs]
    at = _crossing(sizes, np.array([np.median(x) for x in logs])[:, None])[0]
    low, high = np.quantile(_crossing(sizes, np.array(drawn)), [0.025, 0.975], method="nearest")
    return Crossover(float(low), float(at), float(high))


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
