"""The processor time that this process may use, and how much of it other programs took.

A container's cpuset, taskset and Slurm say on which cores a process may run; a cgroup's quota says for how long. Other
programs' time counts against that, not against the whole machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import psutil

from eagle_lab.runtime import cgroups


def affinity() -> set[int]:
    """Numbers of the cores that this process may run on."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # no such call on a Mac
        return set(range(os.cpu_count() or 1))


def usable_cores() -> float:
    """Cores' worth of time that this process may use."""
    quota = cgroups.quota()
    return len(affinity()) if quota is None else min(quota, len(affinity()))


@dataclass(frozen=True)
class LoadReading:
    """Processor time so far, in seconds: of the cores that this process may run on when busy, of this process, and of
    its cgroup (None where there is no quota)."""

    at: float
    busy: float
    own: float
    group: float | None
    cores: int
    usable: float


def read_load(beside: Iterable[int] = ()) -> LoadReading:
    """A reading to give to `foreign_load` later. beside: processes that aren't foreign, with what they have started."""
    mine, every = affinity(), psutil.cpu_times(percpu=True)
    chosen = [times for core, times in enumerate(every) if core in mine] or every
    own, quota = psutil.Process().cpu_times(), cgroups.quota()
    return LoadReading(
        at=perf_counter(),
        busy=sum(_busy(times) for times in chosen),
        own=own.user + own.system + sum(map(_tree_seconds, beside)),
        group=None if quota is None else cgroups.seconds(),
        cores=len(mine),
        usable=usable_cores(),
    )


def _tree_seconds(process: int) -> float:
    """CPU seconds of a process and of what it has started; 0 for one that has ended."""
    try:
        root = psutil.Process(process)
        each = [one.cpu_times() for one in (root, *root.children(recursive=True))]
    except psutil.Error:
        return 0.0
    return sum(times.user + times.system for times in each)


def _busy(times: Any) -> float:
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest time is already inside user time
    return sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0) - idle


def foreign_load(before: LoadReading, after: LoadReading) -> float:
    """Share of this process's cores that other programs took between two readings, 0 to 1.

    Time stolen by a hypervisor counts. Under a quota it is what was missing of the quota: because the cores were busy,
    or because others of the same cgroup used it.
    """
    wall = after.at - before.at
    available = wall * before.usable
    if available <= 0:
        return 0.0
    own = after.own - before.own
    free = wall * before.cores - (after.busy - before.busy - own)
    taken = available - free
    if before.group is not None and after.group is not None:
        taken = max(taken, after.group - before.group - own)
    return min(1.0, max(0.0, taken / available))
