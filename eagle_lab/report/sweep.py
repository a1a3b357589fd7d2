"""A sweep in tables and words; the numbers are `studies.sweep_summary`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.report.page import reasons
from eagle_lab.report.words import interval, plain, render, us
from eagle_lab.studies import sweep_summary as summary
from eagle_lab.studies.sweep import BASELINE, NODES, SweepRecord, Time, alone, cant_run
from eagle_lab.verdict.summary import ceiling, verdict_of

NONE = "·"  # the mark of a cell without a number
FEW = (15, 63, 255, 1023)  # the sizes of a table that must fit a page


def _table(
    record: SweepRecord, one: Callable[[str, int], str | None], sizes: Sequence[int] | None = None
) -> pd.DataFrame:
    columns = [
        size for size in record.settings.sizes if sizes is None or size in sizes
    ] or record.settings.sizes
    rows = {name: [one(name, size) or NONE for size in columns] for name in record.settings.builders}
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def times(record: SweepRecord, what: Time = "seconds", sizes: Sequence[int] | None = None) -> pd.DataFrame:
    """Median microseconds, builders by sizes, the floor last."""

    def one(name: str, size: int) -> str | None:
        taken = record.samples(name, size, 1, what)
        return us(pd.Series(taken).median()) if taken else None

    found = _table(record, one, sizes)
    least = [summary.floor_s(record, size, 1, what) for size in found.columns]
    found.loc["floor"] = [NONE if x is None else us(x) for x in least]
    return found


def speedups(record: SweepRecord, sizes: Sequence[int] | None = None) -> pd.DataFrame:
    """Times as fast as `rebuild`, with the 95% interval of the pairs."""

    def one(name: str, size: int) -> str | None:
        r = summary.ratio(record, name, size)
        return f"{plain(1 / r[1])} [{plain(1 / r[2])},\N{NO-BREAK SPACE}{plain(1 / r[0])}]" if r else None

    return _table(record, one, sizes)


def memory(record: SweepRecord) -> pd.DataFrame:
    """Peak memory over the mask's own bytes."""

    def one(name: str, size: int) -> str | None:
        found = summary.memory(record, name, size)
        return None if found is None else f"{found:.2f}"

    return _table(record, one)


def scaling(record: SweepRecord) -> pd.DataFrame:
    """Per builder the exponent of its time from 63 nodes up, in a graph too where one was timed, and the size from which
    it is faster than `rebuild`, each with its 95% interval."""
    graph = any(cell.graph_s for cell in record.cells)
    rows = {}
    for name in record.settings.builders:
        rows[name] = {"time grows as n to the": _order(summary.growth(record, name))}
        if graph:
            rows[name]["in a graph"] = _order(summary.growth(record, name, what="graph_s"))
        rows[name][f"faster than {BASELINE} from"] = NONE if name == BASELINE else _from(record, name)
    return pd.DataFrame.from_dict(rows, orient="index")


def _order(found: summary.Interval | None) -> str:
    return f"{found[1]:z.2f} {interval(found[0], found[2], 2)}" if found else NONE


def _from(record: SweepRecord, name: str) -> str:
    found, sizes = summary.crossover(record, name), record.settings.sizes
    if found is None:
        return NONE
    if found.low == found.high == 0:
        return "every size"
    if found.low == found.high == math.inf:
        return "no size"
    ends = [
        f"below {sizes[0]}" if x == 0 else f"above {sizes[-1]}" if x == math.inf else f"{x:.0f}"
        for x in (found.low, found.size, found.high)
    ]
    return f"{ends[1]} [{ends[0]}, {ends[2]}]"


def family(builders: Sequence[str], device: str) -> str:
    """Each builder in its own words, and why it can't run on the device, as Markdown."""
    rows = [
        (
            name,
            (MASK_BUILDERS[name].__doc__ or "").strip().splitlines()[:1],
            cant_run(name, torch.device(device)),
        )
        for name in builders
    ]
    return render("sweep_family.md.j2", rows=rows)


def gaps(record: SweepRecord) -> str:
    """Why builders have no time, as Markdown."""
    return render("sweep_gaps.md.j2", gaps=summary.gaps(record))


def whole(record: SweepRecord) -> str:
    """The gain alone beside the gain in whole decodes, and the most that it could have been, as Markdown.

    Where the two strategies don't differ in the mask alone, it is the verdict with their names.
    """
    compared = record.end_to_end
    if compared is None:
        return render("sweep_whole.md.j2", compared=None)
    settings, verdict = compared.settings, verdict_of(compared)
    builder, nodes = alone(settings.baseline, settings.candidate), settings.total_tokens
    return render(
        "sweep_whole.md.j2", compared=compared, builder=builder, settings=settings, baseline=BASELINE,
        ratio=summary.ratio(record, builder, nodes) if builder else None,
        verdict=verdict, reasons=reasons(verdict), top=ceiling(compared) if builder else None,
    )  # fmt: skip


def head(record: SweepRecord) -> str:
    """Which machine a record is of, when, and in how many pairs a cell, as Markdown."""
    return render("sweep_head.md.j2", record=record)


def page(record: SweepRecord) -> str:
    """The whole sweep at a few sizes, as Markdown for a page."""
    graph = times(record, "graph_s", FEW) if any(cell.graph_s for cell in record.cells) else None
    return render(
        "sweep.md.j2", record=record, speedups=speedups(record, FEW), graph=graph, nodes=NODES,
        floor=times(record, "seconds", FEW).loc[["floor"]], whole=whole(record),
    )  # fmt: skip
