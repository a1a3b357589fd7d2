"""What Linux's cgroups (version 1 or 2) allow this process: cores' worth of time, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def read_text(path: str | Path) -> str:
    """A file's text; "" where it can't be read, as on another system."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Cores' worth of time that this process may use, the least of all levels; None: no limit."""
    limits = []
    for level in _levels("cpu", cgroups, membership):
        share, period = "max", "100000"
        if text := read_text(level / "cpu.max"):
            share, period = text.split()
        elif text := read_text(level / "cpu.cfs_quota_us"):
            share, period = text.strip(), read_text(level / "cpu.cfs_period_us").strip() or period
        if share != "max" and int(share) > 0:
            limits.append(int(share) / int(period))
    return min(limits, default=None)


def seconds(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Processor time of all processes in this one's cgroup, in seconds; None where it can't be read."""
    for folder in _folders("cpuacct", cgroups, membership):
        if used := _rows(folder / "cpu.stat").get("usage_usec"):
            return used / 1e6
        if text := read_text(folder / "cpuacct.usage"):
            return int(text) / 1e9
    return None


def memory_left(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory that this process may still take, the least of all levels; None: no limit.

    Pages of files that the kernel drops when memory is needed count as free.
    """
    left = []
    for level in _levels("memory", cgroups, membership):
        rows = _rows(level / "memory.stat")
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = read_text(level / limit).strip(), read_text(level / used).strip()
            if most.isdigit() and now.isdigit():
                left.append(max(0, int(most) - int(now) + rows.get(cached, 0)))
    return min(left, default=None)


def _rows(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, read_text(path).splitlines())}


def _levels(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of `_folders` and those above them, up to the root: each level's limit binds."""
    for folder in _folders(controller, cgroups, membership):
        for level in (folder, *folder.parents):
            if not level.is_relative_to(cgroups):
                break
            yield level


def _folders(controller: str, cgroups: Path, membership: Path) -> list[Path]:
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
