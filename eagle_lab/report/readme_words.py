"""What the README says of one record of each kind, as Markdown; `readme` puts it into its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record
from eagle_lab.measure.records import Record as Record2
from eagle_lab.report.page import markdown_table
from eagle_lab.studies import mask_decodes, optimize_bars, optimize_records, seed_claims, sweep_bars
from eagle_lab.studies import sweep_summary as sweep_report


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


def sweep_words(record: Record) -> str:
    """A sweep: gains alone and in whole decodes, the bars and the three guesses."""
    shown, gpu = sweep_report.speedups(record), bool(record["environment"].get("gpu"))
    sizes = [size for size in (15, 63, 255, 1023) if size in shown.columns] or list(shown.columns)

    def rows(table: Any) -> str:
        return markdown_table(
            [
                {"builder": f"`{name}`" if name != "floor" else name}
                | {f"{size} nodes": row[size] for size in sizes}
                for name, row in table.iterrows()
            ]
        )

    head = f"Times as fast as `rebuild` on recorded trees, alone, {machine(record)} ({sweep_report.HOLE} is not measured):"
    told = [head, rows(shown)]
    if gpu:
        told += ["Microseconds a tree inside a captured graph:", rows(sweep_report.times(record, "graph_s"))]
    told += [_bars(sweep_bars.bars(record).to_dict("records")), mask_decodes.whole_words(record)]
    return "\n\n".join([*told, sweep_bars.guesses(record, "on the GPU" if gpu else "on the CPU")])


def seed_words(record: Record) -> str:
    """A redone investigation: its verdict, and whether the mask accounts for it."""
    return seed_claims.redone_words({"": record})


def _command(name: str) -> str:
    return f"python -m eagle_lab.{name} --device cuda"


BY_TARGET = ("profile", "optimize", "seed")  # kinds with a record for each target

# of the GPU's records: kind, heading, what renders one, the command that makes it
GPU_PARTS: tuple[tuple[str, str, Callable[[Record], str], str], ...] = (
    ("optimize", "Optimizations, one at a time", ladder_words, _command("optimize_records")),
    ("sweep", "Mask construction", sweep_words, _command("sweep")),
    ("seed", "The first investigation's experiment", seed_words, _command("machine_records")),
)
