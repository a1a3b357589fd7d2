"""The sweep: every mask builder at every tree size, alone, on recorded trees, next to `rebuild` in the same seconds.

A cell of the grid is a builder, a size and a batch. Its samples are pairs: the same tree built by `rebuild` and by the
builder, in random order, so that a ratio is of one moment of the machine. On CUDA a cell also has the host's own time
(until the call returns) and the time a tree takes inside a captured graph. A cell that fails is a hole with its reason.
Each finished cell is on disk before the next begins, and a sweep that was cut off goes on with what is missing.
Run on a GPU with one command: `python -m eagle_lab.studies.sweep --device cuda`.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from eagle_lab import ROOT
from eagle_lab.decode.masks import MASK_BUILDERS, build_all, unavailable
from eagle_lab.decode.strategy import waits_for_host
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.floor import copy_bandwidth
from eagle_lab.measure.old_records import Record, RecordError, check_folder, new, read, write
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.models.pair import check_device, load
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.kernels import interpreted
from eagle_lab.studies.mask_decodes import check_arms, in_decodes, whole_words
from eagle_lab.studies.mask_graphs import graph_floor, graph_seconds
from eagle_lab.studies.recorded_trees import DEFAULT, SIZES
from eagle_lab.studies.recorded_trees import read as read_trees

BASELINE = "rebuild"
Progress = Callable[[Sequence[str]], Any]


def hole(error: BaseException | str) -> str:
    """Why a cell has no number, in one line."""
    if isinstance(error, str):
        return error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def call_floor(device: torch.device, calls: int = 200) -> float:
    """Seconds of the smallest thing that can be asked of the device: one fill of one element, then waiting for it."""
    one = torch.zeros(1, device=device)
    took = []
    for _ in range(calls):
        start = now(device)
        one.zero_()
        took.append(now(device) - start)
    return sorted(took)[calls // 2] / 1e9


@contextmanager
def quiet() -> Iterator[None]:
    """The process's standard error away: some builds of torch's profiler announce every start and stop there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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


def measure_cell(name: str, items: Sequence[Tensor], levels: int, iterations: int, seed: int) -> Record:
    """One cell: items are batches of parents int64 [B, n] on the device, taken in rotation.

    Raises whatever the builder raises, and ValueError where a mask differs from the baseline's: it is not timed then.
    """
    device = items[0].device

    def candidate(item: Tensor) -> Tensor:
        return build_all(MASK_BUILDERS[name], item, levels)

    def baseline(item: Tensor) -> Tensor:
        return build_all(MASK_BUILDERS[BASELINE], item)

    for item in items:
        if not torch.equal(candidate(item), baseline(item)):
            raise ValueError(f"{name} differs from {BASELINE}, so it is not timed")
    taken = time_in_pairs(baseline, candidate, items, iterations, seed, device, warmup=2)
    cell: Record = {"baseline_s": [a for a, _ in taken], "seconds": [b for _, b in taken]}
    cell["peak_bytes"] = peak_bytes(lambda: candidate(items[0]), device)
    if device.type == "cuda":
        cell["host_s"] = []
        for i in range(iterations):
            now(device)
            start = perf_counter_ns()
            candidate(items[i % len(items)])
            cell["host_s"].append((perf_counter_ns() - start) / 1e9)
        # a capture that fails may leave the device's state behind, for the cells that follow
        if waits_for_host(name):
            cell["graph_hole"] = "it reads values on the host, so no graph can hold it"
            return cell
        try:
            cell["graph_s"] = graph_seconds(candidate, items, iterations)
        except RuntimeError as error:
            now(device)
            cell["graph_hole"] = hole(error)
    return cell


def grid(builders: Sequence[str], sizes: Sequence[int], batches: Sequence[int], batch_size: int) -> list[str]:
    """Keys "builder/size/batch"; batches above 1 are measured at one size."""
    single = [f"{name}/{size}/1" for size in sizes for name in builders]
    return single + [f"{name}/{batch_size}/{batch}" for batch in batches if batch > 1 for name in builders]


def open_record(settings: Record, path: Path, device: torch.device) -> Record:
    """The unfinished record at `path` if it is of the same settings and machine, else a new one."""
    fresh = new("sweep", settings, str(device))
    if not path.exists():
        return fresh
    try:
        old = read(path)
    except RecordError:
        return fresh
    same = old["settings"] == settings and machine_key(old["environment"]) == machine_key(
        fresh["environment"]
    )
    return old if same and not old.get("finished") else fresh


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
    batch_size: int = 63,
    iterations: int = 30,
    trees: int = 8,
    seed: int = 0,
    trees_path: str | Path = DEFAULT,
    progress: Progress | None = None,
) -> Record:
    """Measure the grid, writing `path` after every cell; → the record.

    Args: builders: names, None for all; trees: recorded trees taken in rotation; progress: wraps the keys, tqdm's bar
    by default. Raises ValueError for unknown builders, sizes or too few iterations, before any work.
    """
    where = check_device(device)
    names = chosen(builders)
    if iterations < 6:
        raise ValueError(f"iterations is {iterations}; an interval at 95% needs at least 6.")
    recorded = {size: read_trees(size, trees_path) for size in (*sizes, batch_size)}
    path = Path(path)
    check_folder(path.parent)
    settings = {
        "target": "recorded trees", "device": where.type, "builders": names, "sizes": list(sizes),
        "batches": list(batches), "batch_size": batch_size, "iterations": iterations, "trees": trees, "seed": seed,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    record = open_record(settings, path, where)
    cells: dict[str, Record] = record.setdefault("cells", {})
    if "floor" not in record:
        record["floor"] = {"call_s": call_floor(where), "bytes_per_s": copy_bandwidth(where, repeats=4)}
        if where.type == "cuda":
            record["floor"]["graph_call_s"] = graph_floor(where)
        write(record, path)
    keys = [key for key in grid(names, sizes, batches, batch_size) if key not in cells]
    for key in (progress or (lambda todo: tqdm(todo, desc="grid", unit="cell")))(keys):
        name, size, batch = key.split("/")
        reason = unavailable(name, where)
        if reason is None and name == "triton" and interpreted():
            reason = "TRITON_INTERPRET=1: the interpreter's time says nothing about the kernel"
        if reason:
            cells[key] = {"hole": reason}
        else:
            of = recorded[int(size)]
            rows = [torch.arange(int(batch)) + i * int(batch) for i in range(trees)]
            items = [of.parents[row % len(of.parents)].to(where) for row in rows]
            try:
                cells[key] = measure_cell(name, items, of.depth + 1, iterations, seed)
            # a compiler's own kinds of error too: a named hole, and nothing is timed in its place
            except Exception as error:
                cells[key] = {"hole": hole(error)}
        write(record, path)
    record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write(record, path)
    return record


def place(device: str | torch.device, folder: str | Path = ROOT / "data" / "results") -> Path:
    """Where a machine's sweep is kept: sweep-cpu.json, sweep-cuda.json."""
    return Path(folder) / f"sweep-{torch.device(device).type}.json"


def main(
    device: str = "cpu",
    iterations: int = 60,
    pairs: int = 20,
    forks: int = 1,
    new_tokens: int = 32,
    baseline: str = "",
    candidate: str = "",
    folder: str = "",
) -> None:
    """Sweep a machine and write data/results/sweep-<device>.json; commit what it wrote.

    Args: pairs: of whole decodes, 0 for none; forks: fresh processes for them, 5 for a verdict that isn't provisional;
    new_tokens: of each decode; baseline: strategy of the decodes that the candidate is held against, `rebuild` where it
    isn't given; candidate: strategy of those decodes, the baseline with the best builder where it isn't given.
    """
    if pairs:
        check_arms(baseline or None, candidate or None, list(MASK_BUILDERS), check_device(device))
    path = place(device, folder or ROOT / "data" / "results")
    record = sweep(device, path=path, iterations=iterations)
    holes = sum("hole" in cell for cell in record["cells"].values())
    print(f"{path.name}: {len(record['cells'])} cells, {holes} of them holes")
    if pairs:
        pair = load(device=device, verbose=False)
        record["end_to_end"] = in_decodes(
            record, pair, baseline=baseline or None, candidate=candidate or None, iterations=pairs, forks=forks,
            max_new_tokens=new_tokens,
        )  # fmt: skip
        write(record, path)
        print(whole_words(record))


if __name__ == "__main__":
    typer.run(main)
