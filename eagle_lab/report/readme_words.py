"""What the README says of one record of each kind, as Markdown; `readme` puts it into its place."""

from __future__ import annotations

import re

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record
from eagle_lab.measure.records import Record as Record2


def source(name: str, record: Record) -> str:
    """Where a record lies, and the command that made it, as one runs it from the project's root."""
    program, _, options = str(record["command"]).partition(" ")
    if program.endswith(".py") and not program.startswith("__main__"):
        program = f"python -m eagle_lab.{program.removesuffix('.py')}"
    command = re.sub(r" --(?:results-dir|folder|out) \S+", "", f"{program} {options}".strip())
    return f"[The record](data/results/{name}.json), made by `{command}`."


def missing(command: str, gpu: bool = False) -> str:
    """What stands where a record isn't there."""
    why = "Not measured yet. On a machine with a GPU run" if gpu else "Not measured yet. Run"
    return f"{why}:\n\n```sh\n{command}\n```"


def machine(record: Record | Record2) -> str:
    """The machine that a record is from, with the threads where it is a CPU."""
    if isinstance(record, Record2):
        gpu, threads = record.environment.gpu, record.environment.cpu.torch_threads
        key = machine_key(record.environment)
        return key if gpu else f"{key}, {threads} thread{'s' * (threads != 1)}"
    e = record["environment"]
    threads = e["cpu"]["torch_threads"]
    return machine_key(e) if e.get("gpu") else f"{machine_key(e)}, {threads} thread{'s' * (threads != 1)}"
