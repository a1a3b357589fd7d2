"""Records of schema 1, as dicts: each kind leaves here as it becomes a model of `records.py`; then this file goes.

The run record: settings, environment, every raw sample; versioned JSON, written atomically."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eagle_lab.measure.environment import fingerprint, machine_key
from eagle_lab.measure.records import RecordError, check_folder, command_line, write_json

SCHEMA = 1

# what each part of a comparison's record must have before anything is computed from it
SETTINGS = (
    "target", "draft", "embedded", "device", "dtype", "baseline", "candidate", "prompts", "iterations", "forks",
    "max_new_tokens", "top_k", "depth", "total_tokens", "delta", "alpha", "seed",
)  # fmt: skip
SAMPLE = (
    "fork",
    "iteration",
    "prompt",
    "control",
    "baseline_s",
    "candidate_s",
    "new_tokens",
    "cycles",
    "dropped",
)
PART = ("fork", "arm", "calls_s")
CHECKED = ("random_trees", "prompt", "tokens", "baseline_against_plain", "candidate_against_plain")
MACHINE = ("cpu", "platform", "python", "versions", "commit", "dirty")

__all__ = ["RecordError", "check_folder", "command_line"]

Record = dict[str, Any]


def new(kind: str, settings: dict[str, Any], device: str = "cpu") -> Record:
    """An empty record of a kind ("comparison", "profile", …) with the machine's fingerprint."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "settings": settings,
        "environment": fingerprint(device).model_dump(),
    }


def write(record: Record, path: str | Path) -> None:
    """Replace the file by the record in one step: a reader, or a crash, sees the old one or the new one whole."""
    write_json(record, path)


def read(path: str | Path) -> Record:
    """A record from its file; RecordError says what is wrong with it."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path} is not there.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path} is not readable JSON ({error}).") from None
    if not isinstance(record, dict) or "kind" not in record or "schema" not in record:
        raise RecordError(f"{path} is JSON, but not a record of this kit (no kind or schema).")
    if record["schema"] != SCHEMA:
        raise RecordError(f"{path} has schema {record['schema']!r}; this version of the kit reads {SCHEMA}.")
    return record


def read_comparison(path: str | Path) -> Record:
    """A comparison's record, finished or not; RecordError names what keeps it from being one, and where."""
    record = read(path)
    if record["kind"] != "comparison":
        raise RecordError(f"{path} is a {record['kind']} record; only a comparison has a verdict.")
    faults = [
        *_lost(record.get("settings"), SETTINGS, "settings"),
        *_lost(record.get("correctness"), CHECKED, "correctness"),
        *_lost(record.get("environment"), MACHINE, "environment"),
    ]
    for name, keys in (("samples", SAMPLE), ("parts", PART), ("events", ("what",))):
        rows = record.get(name)
        if not isinstance(rows, list):
            faults.append(f"it has no {name}")
            continue
        faults += [fault for n, row in enumerate(rows) for fault in _lost(row, keys, f"{name}[{n}]")][:1]
    if not faults:
        times = [s[arm] for s in record["samples"] for arm in ("baseline_s", "candidate_s")]
        if not all(isinstance(x, int | float) and 0 < x < math.inf for x in times):
            faults.append("its samples hold a time that isn't a positive number")
    if faults:
        raise RecordError(f"{path} is no whole comparison: {'; '.join(faults)}.")
    return record


def _lost(found: Any, keys: tuple[str, ...], name: str) -> list[str]:
    if not isinstance(found, dict):
        return [
            f"it has no {name}" if found is None else f"its {name} is a {type(found).__name__}, not an object"
        ]
    lost = [key for key in keys if key not in found]
    return [f"its {name} lack {', '.join(lost)}"] if lost else []


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints so that pairs taken under them don't belong together, in words."""
    told = []
    if machine_key(before) != machine_key(now):
        told.append(f"{machine_key(before)}, and this is {machine_key(now)}")
    threads = [environment["cpu"]["torch_threads"] for environment in (before, now)]
    if threads[0] != threads[1]:
        told.append(f"{threads[0]} threads, and now there are {threads[1]}")
    for name, version in before["versions"].items():
        if (found := now["versions"].get(name)) != version:
            told.append(f"{name} {version}, and here is {found}")
    return told


def read_all(folder: str | Path) -> tuple[dict[Path, Record], list[str]]:
    """All records below a folder, and one sentence for each JSON file that is none."""
    found, skipped = {}, []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            found[path] = read(path)
        except RecordError as error:
            skipped.append(str(error))
    return found, skipped
