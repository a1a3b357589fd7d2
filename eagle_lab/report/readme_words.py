"""What the README says of one record of each kind, as Markdown; `readme` puts it into its place."""

from __future__ import annotations

import re
from collections.abc import Callable

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record
from eagle_lab.measure.records import Record as Record2
from eagle_lab.report.page import markdown_table
from eagle_lab.studies import optimize_bars, optimize_records, seed_claims


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


def _bars(rows: list[dict[str, str]]) -> str:
    told = {"yes": "holds", "no": "**missed**"}
    return "\n".join(
        f"- {row['bar']}: {row['measured']} ({told.get(row['holds'], row['holds'])})" for row in rows
    )


def ladder_words(record: Record) -> str:
    """An "optimize" record: the ladder, tree sizes, batches, where the remaining time is, and the bars."""
    found = record["ladder"]
    rows = optimize_records.ladder_table(record).reset_index().to_dict("records")
    told = [
        f"{optimize_bars.head(record)}, {machine(record).rpartition(', ')[2]}: {optimize_records.ladder_sentence(found)}"
        if not record["environment"].get("gpu")
        else f"{optimize_bars.head(record)}: {optimize_records.ladder_sentence(found)}",
        markdown_table(rows),
    ]
    if record.get("tree_sizes"):
        told.append(optimize_records.sizes_sentence(record["tree_sizes"]))
    if record.get("batches"):
        told += [optimize_records.batch_sentence(record["batches"]), _batches(record)]
    told += [optimize_bars.lossless(record), optimize_bars.remaining(record)]
    return "\n\n".join([*told, _bars(optimize_bars.bars(record).to_dict("records"))]).strip()


def _batches(record: Record) -> str:
    rows = optimize_records.batch_table(record["batches"]).reset_index().astype(str)
    return markdown_table(rows.to_dict("records"))


def seed_words(record: Record) -> str:
    """A redone investigation: its verdict, and whether the mask accounts for it."""
    return seed_claims.redone_words({"": record})


def _command(name: str) -> str:
    return f"python -m eagle_lab.{name} --device cuda"


BY_TARGET = ("profile", "optimize", "seed")  # kinds with a record for each target

# of the GPU's records: kind, heading, what renders one, the command that makes it
GPU_PARTS: tuple[tuple[str, str, Callable[[Record], str], str], ...] = (
    ("optimize", "Optimizations, one at a time", ladder_words, _command("optimize_records")),
    ("seed", "The first investigation's experiment", seed_words, _command("machine_records")),
)
