"""What a few cycles do inside torch: the busy time of the device, the top operators, a trace for Perfetto.

By `torch.profiler`, in a run of its own: it slows the host down several times over, so its host times are for
ranking operators, not for shares. Kernel times on a GPU stay what they are, so the busy time is taken from here.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eagle_lab.decode.generate import decode_stream
from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.records import RESULTS, Part, Record, kept_at, made
from eagle_lab.models import parallel
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import now, synchronise


class Operator(Part):
    """One operator over the profiled cycles: calls, and milliseconds of its own."""

    name: str
    calls: int
    host_ms: float
    device_ms: float | None


class Kernel(Part):
    """One kernel over the profiled cycles: launches, and the milliseconds that it adds to the busy time."""

    name: str
    calls: int
    device_ms: float


class Operators(Part):
    """What torch.profiler saw in so many cycles.

    operators_s: the host's time inside operators; busy_s: the device's busy time, None without one; kernels: launches;
    top: the operators with the most time of their own; top_kernels: the device's own, also those that a graph replays,
    which no operator called.
    """

    prompt: str
    cycles: int
    seconds: float
    operators_s: float
    busy_s: float | None
    kernels: int
    top: list[Operator]
    top_kernels: list[Kernel]


class OperatorsSettings(Part):
    """Whose cycles were profiled; processes: those that share the target, with a GPU each."""

    target: str
    draft: str
    dtype: str
    strategy: str
    total_tokens: int
    processes: int


class OperatorsRecord(Record):
    """The operators and kernels of a strategy's cycle, on one device or in the first of the processes that share a target."""

    schema_name: Literal["eagle_lab.operators.v1"] = Field("eagle_lab.operators.v1", alias="schema")
    settings: OperatorsSettings
    operators: Operators


def own_times(intervals: list[tuple[float, float]]) -> list[float]:
    """What each interval (start, end) adds to those that start before it, in their order and unit.

    Overlaps count once, so they sum up to the length of the union. A kernel that is launched early waits inside for the
    one before it: its own time begins where that one ends.
    """
    added, reach = [0.0] * len(intervals), float("-inf")
    for at in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        start, end = intervals[at]
        added[at] = max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return added


@contextlib.contextmanager
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


def operators(
    pair: Pair,
    prompt: Prompt,
    decoding: Decoding,
    *,
    cycles: int = 3,
    top: int = 12,
    trace: str | Path | None = None,
) -> Operators:
    """Profile `cycles` cycles of a decode as long as they need, after the prefill and two more that warm up.

    `trace`: a file for the Chrome trace (ui.perfetto.dev reads it in the browser). Raises ValueError where the answer
    ends before enough cycles were made.
    """
    cuda = pair.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    enough = replace(decoding, max_new_tokens=(cycles + 4) * (decoding.shape.depth + 2))
    found_cycles = decode_stream(pair, prompt.ids, enough, record=False)
    try:
        next(found_cycles), next(found_cycles)
        start = now(pair.device)
        with quiet(), profile(activities=activities) as found:
            for _ in range(cycles):
                next(found_cycles)
            synchronise(pair.device)
        seconds = (now(pair.device) - start) / 1e9
    except StopIteration:
        raise ValueError(
            f"the answer to prompt {prompt.id} ended before {cycles + 2} cycles; use another."
        ) from None
    on_device = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    on_device = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
    added = own_times([(e.time_range.start, e.time_range.end) for e in on_device])
    averages = [a for a in found.key_averages() if a.device_type == DeviceType.CPU]
    own = sorted(averages, key=lambda a: -(a.self_device_time_total if cuda else a.self_cpu_time_total))
    if trace is not None:
        found.export_chrome_trace(str(trace))
    return Operators(
        prompt=prompt.id,
        cycles=cycles,
        seconds=seconds,
        operators_s=sum(a.self_cpu_time_total for a in averages) / 1e6,
        busy_s=sum(added) / 1e6 if cuda else None,
        kernels=len(on_device),
        top=[
            Operator(
                name=a.key,
                calls=a.count,
                host_ms=round(a.self_cpu_time_total / 1e3, 4),
                device_ms=round(a.self_device_time_total / 1e3, 4) if cuda else None,
            )
            for a in own[:top]
        ],
        top_kernels=_kernels(zip((e.name for e in on_device), added, strict=True))[:top],
    )


def _kernels(timed: Iterable[tuple[str, float]]) -> list[Kernel]:
    """(kernel, µs) of each launch → one row a kernel, the one with the most time first."""
    sums: dict[str, list[float]] = defaultdict(list)
    for name, took in timed:
        sums[name].append(took)
    rows = [Kernel(name=n, calls=len(each), device_ms=round(sum(each) / 1e3, 4)) for n, each in sums.items()]
    return sorted(rows, key=lambda row: -row.device_ms)


def operators_of_any(pair: Pair, prompts: Sequence[Prompt], decoding: Decoding, **more: Any) -> Operators:
    """`operators` of the first of the prompts whose answer is long enough; ValueError where none is."""
    for prompt in prompts[:-1]:
        with contextlib.suppress(ValueError):  # it ended too early
            return operators(pair, prompt, decoding, **more)
    return operators(pair, prompts[-1], decoding, **more)


def operators_record(
    pair: Pair, prompts: Sequence[Prompt], decoding: Decoding, **more: Any
) -> OperatorsRecord:
    """A record of `operators_of_any`. Where processes share the target each must call it, and each has its own."""
    settings = OperatorsSettings(
        **pair.names, strategy=str(decoding.strategy), total_tokens=decoding.shape.total_tokens, processes=parallel.processes(),
    )  # fmt: skip
    found = operators_of_any(pair, prompts, decoding, **more)
    return OperatorsRecord(**made(str(pair.device)), settings=settings, operators=found)


def operators_path(record: OperatorsRecord, folder: Path = RESULTS) -> Path:
    """Where the record is kept: operators-MACHINE-TARGET.json, or operators-xN-MACHINE-TARGET.json of N processes."""
    kind = f"operators-x{record.settings.processes}" if record.settings.processes > 1 else "operators"
    return kept_at(kind, record.environment, record.settings.target, folder)
