"""Records of schema 1, as dicts: each kind leaves here as it becomes a model of `records.py`; then this file goes.

The run record: settings, environment, every raw sample; versioned JSON, written atomically."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eagle_lab.measure.environment import fingerprint
from eagle_lab.measure.records import RecordError, check_folder, command_line, write_json

SCHEMA = 1

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


def read_all(folder: str | Path) -> tuple[dict[Path, Record], list[str]]:
    """All records below a folder, and one sentence for each JSON file that is none."""
    found, skipped = {}, []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            found[path] = read(path)
        except RecordError as error:
            skipped.append(str(error))
    return found, skipped
