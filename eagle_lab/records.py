"""The run record: settings, environment, every raw sample; versioned JSON, written atomically."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eagle_lab.environment import fingerprint

SCHEMA = 1

Record = dict[str, Any]


class RecordError(ValueError):
    """A file that is not a readable record of this kit; the message says why."""


def new(kind: str, settings: dict[str, Any], device: str = "cpu") -> Record:
    """An empty record of a kind ("comparison", "profile", …) with the machine's fingerprint."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "settings": settings,
        "environment": fingerprint(device),
    }


def command_line() -> str:
    """How this process was started, without folders: a record must not tell where on a disk it was made."""
    return " ".join([Path(sys.argv[0]).name, *[Path(a).name if os.sep in a else a for a in sys.argv[1:]]])


def check_folder(folder: str | Path) -> Path:
    """Make a results folder and prove that it can be written; ValueError says why not."""
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"results folder {folder} cannot be written ({error.strerror}); name another results_dir."
        ) from None
    return folder


def write(record: Record, path: str | Path) -> None:
    """Replace the file by the record in one step: a reader, or a crash, sees the old one or the new one whole."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
