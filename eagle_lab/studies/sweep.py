"""The sweep: every mask builder at every tree size, alone, on recorded trees, next to `rebuild` in the same seconds.

A cell is a builder, a size and a batch. Its samples are pairs: `rebuild` and the builder make the mask of the same tree,
in random order, so a ratio is of one moment of the machine. On CUDA a cell also has the host's own time (until the call
returns) and the time a tree takes inside a captured graph. A cell that fails says why. Each finished cell is on disk
before the next begins, and a sweep that was cut off goes on with the cells that are not there.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eagle_lab.decode.masks import MASK_BUILDERS, build_all
from eagle_lab.decode.strategy import check, parse, unavailable, waits_for_host
from eagle_lab.measure.environment import fingerprint, machine_key
from eagle_lab.measure.floor import copy_bandwidth
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.measure.recorded_trees import DEFAULT, SIZES
from eagle_lab.measure.recorded_trees import read as read_trees
from eagle_lab.measure.records import RESULTS, Part, Record, RecordError, check_folder, made, read, write
from eagle_lab.models.pair import Pair, check_device, load
from eagle_lab.runtime import graphs
from eagle_lab.runtime.checks import one_line
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.kernels import interpreted
from eagle_lab.runtime.progress import progress as bar_of
from eagle_lab.studies.operators import quiet
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.record import ComparisonRecord

BASELINE = "rebuild"
NODES = 63  # draft nodes of the usual tree
GRAPH_BUILDS = 16  # trees built in one captured graph, so that starting the graph is not what is measured

# until the mask is ready, until the call returns, inside a graph
Time = Literal["seconds", "host_s", "graph_s"]


class Missing(Part):
    """Why a time is not there: the builder can't run on the device, or only in an interpreter; its mask is wrong; it
    raised; or it reads values on the host, which no graph can hold. error: what was said, one line."""

    reason: Literal["unavailable", "interpreted", "wrong", "failed", "host_loop"]
    error: str | None = None


class Cell(Part):
    """A builder at a size and a batch: seconds a sample, `baseline_s` and `seconds` in pairs, peak bytes of one call."""

    builder: str
    size: int
    batch: int
    baseline_s: list[float] = []
    seconds: list[float] = []
    host_s: list[float] = []
    graph_s: list[float] = []
    peak_bytes: int | None = None
    missing: Missing | None = None
    graph_missing: Missing | None = None


class Floor(Part):
    """The machine's least: seconds of the smallest call, and of the smallest kernel in a graph; bytes a second."""

    call_s: float
    bytes_per_s: float
    graph_call_s: float | None = None


class SweepSettings(Part):
    """What was asked for. batches above 1 are measured at `batch_size` alone; trees: recorded trees in rotation."""

    device: str
    builders: list[str]
    sizes: list[int]
    batches: list[int]
    batch_size: int
    iterations: int
    trees: int
    seed: int
    threads: int


class SweepRecord(Record):
    """A sweep; `end_to_end` is a comparison of whole decodes, `finished` None while cells are to come."""

    schema_name: Literal["eagle_lab.sweep.v2"] = Field("eagle_lab.sweep.v2", alias="schema")
    settings: SweepSettings
    floor: Floor
    cells: list[Cell] = []
    end_to_end: ComparisonRecord | None = None
    finished: datetime | None = None

    def cell(self, builder: str, size: int, batch: int = 1) -> Cell | None:
        """A cell, None where the sweep has not come to it."""
        wanted = builder, size, batch
        return next((c for c in self.cells if (c.builder, c.size, c.batch) == wanted), None)

    def samples(self, builder: str, size: int, batch: int = 1, what: Time = "seconds") -> list[float]:
        """Seconds of a cell, none where it has no such time."""
        found = self.cell(builder, size, batch)
        return getattr(found, what) if found else []

    def fastest(self, size: int, among: Sequence[str]) -> str | None:
        """The builder of `among` with the least median seconds at a size; None without any."""
        known = [(median(taken), name) for name in among if (taken := self.samples(name, size))]
        return min(known)[1] if known else None


def call_floor(device: torch.device) -> float:
    """Seconds of the smallest thing that can be asked of the device: one fill of one element, then waiting for it."""
    one = torch.zeros(1, device=device)
    took = []
    for _ in range(200):
        start = now(device)
        one.zero_()
        took.append(now(device) - start)
    return median(took) / 1e9


def captured(
    build: Callable[[Tensor], Tensor], items: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """One graph that calls `build` on each item, parents [B, n], and the masks that each replay writes anew.

    Raises CaptureError for what no graph can hold.
    """

    def builds() -> list[Tensor]:
        return [build(item) for item in items]

    return graphs.record(builds, builds, items[0].device)


def replays(graph: torch.cuda.CUDAGraph, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each replay of a graph, by events around it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(repeats):
        first.record()
        graph.replay()
        last.record()
        now(device)
        found.append(first.elapsed_time(last) / 1e3)
    return found


def graph_seconds(build: Callable[[Tensor], Tensor], items: Sequence[Tensor], repeats: int) -> list[float]:
    """Seconds a build inside a graph of GRAPH_BUILDS builds of different trees, one number a replay.

    Args: items: parents int64 [n] or [B, n]. Raises RuntimeError where a replayed mask is wrong.
    """
    chosen = [items[i % len(items)].clone() for i in range(GRAPH_BUILDS)]
    graph, masks = captured(build, chosen)
    graph.replay()
    for item, mask in zip(chosen, masks, strict=True):
        if not torch.equal(mask, build_all(MASK_BUILDERS[BASELINE], item)):
            raise RuntimeError("the captured graph's mask differs from rebuild's")
    return [seconds / GRAPH_BUILDS for seconds in replays(graph, repeats, items[0].device)]


def graph_floor(device: torch.device) -> float:
    """Seconds of the smallest kernel inside a graph: one addition, GRAPH_BUILDS times a graph."""
    graph, _ = captured(lambda one: one.add_(1), [torch.zeros(1, device=device) for _ in range(GRAPH_BUILDS)])
    graph.replay()
    return median(replays(graph, 50, device)) / GRAPH_BUILDS


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory of one call beyond what was held before it; on the CPU torch's peak and Python's are added."""
    run()
    if device.type == "cuda":
        now(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    tracemalloc.start()
    try:
        run()
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        kept = run()
    del kept
    held = top = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top + python


def measure_cell(name: str, items: Sequence[Tensor], levels: int, iterations: int, seed: int) -> Cell:
    """One cell: items are batches of parents int64 [B, n] on the device, taken in rotation; `levels` bounds their depth.

    A builder whose mask differs from the baseline's is not timed. Raises whatever the builder raises.
    """
    device, (batch, size) = items[0].device, items[0].shape

    def candidate(item: Tensor) -> Tensor:
        return build_all(MASK_BUILDERS[name], item, levels)

    def baseline(item: Tensor) -> Tensor:
        return build_all(MASK_BUILDERS[BASELINE], item)

    if not all(torch.equal(candidate(item), baseline(item)) for item in items):
        return Cell(builder=name, size=size, batch=batch, missing=Missing(reason="wrong"))
    taken = time_in_pairs(baseline, candidate, items, iterations, seed, device, warmup=2)
    found: dict[str, Any] = {"baseline_s": [a for a, _ in taken], "seconds": [b for _, b in taken]}
    found["peak_bytes"] = peak_bytes(lambda: candidate(items[0]), device)
    if device.type == "cuda":
        found["host_s"] = []
        for i in range(iterations):
            now(device)
            start = perf_counter_ns()
            candidate(items[i % len(items)])
            found["host_s"].append((perf_counter_ns() - start) / 1e9)
        # a capture that fails may leave the device's state behind, for the cells that follow
        if waits_for_host(name):
            found["graph_missing"] = Missing(reason="host_loop")
        else:
            try:
                found["graph_s"] = graph_seconds(candidate, items, iterations)
            except RuntimeError as error:
                now(device)
                found["graph_missing"] = Missing(reason="failed", error=one_line(error))
    return Cell(builder=name, size=size, batch=batch, **found)


def grid(settings: SweepSettings) -> list[tuple[str, int, int]]:
    """(builder, size, batch) of all cells."""
    single = [(name, size, 1) for size in settings.sizes for name in settings.builders]
    more = [batch for batch in settings.batches if batch > 1]
    return single + [(name, settings.batch_size, batch) for batch in more for name in settings.builders]


def open_record(settings: SweepSettings, path: Path, device: torch.device) -> SweepRecord | None:
    """The unfinished record at `path` where it is of the same settings and machine, else None."""
    try:
        old = read(path, SweepRecord)
    except RecordError:
        return None
    here = machine_key(fingerprint(device))
    same = old.settings == settings and machine_key(old.environment) == here
    return old if same and not old.finished else None


def chosen(builders: str | Sequence[str] | None) -> list[str]:
    """The builders' names, given in a sequence or separated by commas, all for None; ValueError for an unknown one."""
    given = builders.split(",") if isinstance(builders, str) else builders
    names = list(MASK_BUILDERS) if given is None else [name.strip() for name in given]
    unknown = [name for name in names if name not in MASK_BUILDERS]
    if unknown:
        raise ValueError(f"mask builder {unknown[0]!r} is unknown; known: {', '.join(MASK_BUILDERS)}.")
    return names


def sweep(
    device: str | torch.device = "cpu",
    *,
    path: str | Path,
    builders: Sequence[str] | None = None,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = (1, 32),
    batch_size: int = NODES,
    iterations: int = 30,
    trees: int = 8,
    seed: int = 0,
    trees_path: str | Path = DEFAULT,
    progress: bool = True,
) -> SweepRecord:
    """Measure the grid, writing `path` after every cell; → the record.

    Args: builders: names, None for all; trees: recorded trees taken in rotation; progress: show a bar.
    Raises ValueError for unknown builders, sizes or too few iterations, before any work.
    """
    where = check_device(device)
    names = chosen(builders)
    if iterations < 6:
        raise ValueError(f"iterations is {iterations}; an interval at 95% needs at least 6.")
    recorded = {size: read_trees(size, trees_path) for size in (*sizes, batch_size)}
    path = Path(path)
    check_folder(path.parent)
    settings = SweepSettings(
        device=where.type, builders=names, sizes=list(sizes), batches=list(batches), batch_size=batch_size,
        iterations=iterations, trees=trees, seed=seed, threads=torch.get_num_threads(),
    )  # fmt: skip
    record = open_record(settings, path, where)
    if record is None:
        floor = Floor(
            call_s=call_floor(where),
            bytes_per_s=copy_bandwidth(where, repeats=4),
            graph_call_s=graph_floor(where) if where.type == "cuda" else None,
        )
        record = SweepRecord(**made(str(where)), settings=settings, floor=floor)
        write(record, path)
    keys = [key for key in grid(settings) if record.cell(*key) is None]
    with bar_of(len(keys), "cell", "grid", shown=progress) as bar:
        for name, size, batch in keys:
            of = recorded[size]
            rows = [torch.arange(batch) + i * batch for i in range(trees)]
            items = [of.parents[row % len(of.parents)].to(where) for row in rows]
            missing = cant_run(name, where)
            try:
                cell = None if missing else measure_cell(name, items, of.depth + 1, iterations, seed)
            # a compiler's own kinds of error too: the cell names them, and nothing is timed in its place
            except Exception as error:
                cell, missing = None, Missing(reason="failed", error=one_line(error))
            record.cells.append(cell or Cell(builder=name, size=size, batch=batch, missing=missing))
            write(record, path)
            bar.update()
    record.finished = datetime.now(UTC).replace(microsecond=0)
    write(record, path)
    return record


def cant_run(name: str, device: torch.device) -> Missing | None:
    """Why a builder can't be timed on a device, None where it can."""
    said = unavailable("mask", name, device)
    if said:
        return Missing(reason="unavailable", error=said)
    # an interpreter's time says nothing about the kernel
    return Missing(reason="interpreted") if name == "triton" and interpreted() else None


def sweep_path(device: str | torch.device, folder: str | Path = RESULTS) -> Path:
    """Where a machine's sweep is kept: sweep-cpu.json, sweep-cuda.json."""
    return Path(folder) / f"sweep-{torch.device(device).type}.json"


def alone(baseline: str, candidate: str) -> str | None:
    """The builder whose gain alone may stand beside the candidate's gain in whole decodes.

    None where the strategies differ in more than the mask, or the baseline's mask isn't the sweep's baseline.
    """
    one, other = parse(baseline), parse(candidate)
    return other.mask if one.mask == BASELINE and replace(one, mask=other.mask) == other else None


def candidates(
    baseline: str, candidate: str | None, builders: Sequence[str], device: torch.device | str
) -> list[str]:
    """What whole decodes may hold against the baseline: the candidate, or, where it is None, the baseline with each of
    the builders that goes with it on the device.

    Raises ValueError for strategies that can't run, and where no builder can; so it is called before a sweep too.
    """
    plan, found = check(baseline, device), []
    if candidate:
        check(candidate, device)
        return [candidate]
    for name in builders:
        with suppress(ValueError):
            found.append(str(check(replace(plan, mask=name), device)).removeprefix("mask="))
    if not found:
        raise ValueError(
            f"none of {', '.join(builders)} can build the mask of {baseline} on {device}; name a candidate."
        )
    return found


def best_candidate(record: SweepRecord, baseline: str, nodes: int, device: torch.device | str) -> str:
    """The baseline with the sweep's fastest builder that goes with it, at the swept size nearest to `nodes`.

    Raises ValueError where the sweep has no number.
    """
    size = min(record.settings.sizes, key=lambda n: abs(n - nodes))
    known = {parse(name).mask: name for name in candidates(baseline, None, record.settings.builders, device)}
    top = record.fastest(size, list(known))
    if top is None:
        raise ValueError(
            f"the sweep has no builder with a time at {size} nodes that goes with {baseline} on {device}."
        )
    return known[top]


def in_decodes(
    record: SweepRecord,
    pair: Pair,
    *,
    baseline: str = BASELINE,
    candidate: str | None = None,
    nodes: int = NODES,
    **options: Any,
) -> ComparisonRecord:
    """Two strategies in whole decodes on the sweep's device; → the comparison's record.

    Args: candidate: None for the baseline with the sweep's fastest builder; options: `compare`'s. Raises ValueError
    where the sweep has no number.
    """
    other = candidate or best_candidate(record, baseline, nodes, pair.device)
    return compare(pair, baseline=baseline, candidate=other, total_tokens=nodes, **options).record


def record_machine(
    device: str,
    *,
    iterations: int = 60,
    decodes: int = 20,
    forks: int = 1,
    max_new_tokens: int = 32,
    baseline: str = BASELINE,
    candidate: str | None = None,
    folder: str | Path = RESULTS,
) -> tuple[SweepRecord, Path]:
    """Sweep a machine with its default pair, and write sweep-<device>.json; → the record and its file.

    Args: iterations: pairs in a cell; decodes: pairs of whole decodes, 0 for none; forks: fresh processes for them;
    baseline, candidate: as for `in_decodes`. Raises ValueError for strategies that can't run, before any work.
    """
    if decodes:
        candidates(baseline, candidate, list(MASK_BUILDERS), check_device(device))
    path = sweep_path(device, folder)
    record = sweep(device, path=path, iterations=iterations)
    if decodes:
        record.end_to_end = in_decodes(
            record, load(device=device), baseline=baseline, candidate=candidate, iterations=decodes, forks=forks,
            max_new_tokens=max_new_tokens, progress=False,
        )  # fmt: skip
        write(record, path)
    return record, path
