"""The processor time that this process may use, and how much of it other programs took.

A container's cpuset, taskset and Slurm say on which cores a process may run; a cgroup's quota says for how long. Other
programs' time counts against that, not against the whole machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def read_text(path: str | Path) -> str:
    """A file's text; "" where it can't be read, as on another system."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def affinity() -> set[int]:
    """Numbers of the cores that this process may run on."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # no such call on a Mac
        return set(range(os.cpu_count() or 1))


def cgroup_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Cores' worth of time that this process's cgroups (version 1 or 2) allow it, the least of all levels; None: no limit."""
    limits = []
    for folder in _cgroup_folders("cpu", cgroups, membership):
        for level in (folder, *folder.parents):
            if not level.is_relative_to(cgroups):
                break
            quota, period = "max", "100000"
            if text := read_text(level / "cpu.max"):
                quota, period = text.split()
            elif text := read_text(level / "cpu.cfs_quota_us"):
                quota, period = text.strip(), read_text(level / "cpu.cfs_period_us").strip() or period
            if quota != "max" and int(quota) > 0:
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _cgroup_seconds(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Processor time of all processes in this one's cgroup, in seconds; None where it can't be read."""
    for folder in _cgroup_folders("cpuacct", cgroups, membership):
        if text := read_text(folder / "cpu.stat"):
            for line in text.splitlines():
                if line.startswith("usage_usec"):
                    return int(line.split()[1]) / 1e6
        if text := read_text(folder / "cpuacct.usage"):
            return int(text) / 1e9
    return None


def _cgroup_folders(controller: str, cgroups: Path, membership: Path) -> list[Path]:
    """Where this process's limits by a controller may stand: version 2's folder, then version 1's.

    A container sees its own cgroup as the root, though /proc names the place that it has outside: then it is the root's.
    """
    found = []
    for line in read_text(membership).splitlines():
        number, names, path = line.split(":", 2)
        roots = [cgroups, cgroups / "unified"] if number == "0" else [cgroups / names, cgroups / controller]
        if number == "0" or controller in names.split(","):
            for root in roots:
                inside = root / path.lstrip("/")
                found.append(inside if inside.is_dir() else root)
    return found


def usable_cores() -> float:
    """Cores' worth of time that this process may use."""
    quota = cgroup_quota()
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
    own, quota = psutil.Process().cpu_times(), cgroup_quota()
    return LoadReading(
        at=perf_counter(),
        busy=sum(_busy(times) for times in chosen),
        own=own.user + own.system + sum(map(_tree_seconds, beside)),
        group=None if quota is None else _cgroup_seconds(),
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
