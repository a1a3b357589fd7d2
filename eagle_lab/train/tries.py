"""Trainings that differ in one setting, told apart by τ paired over prompts, and how fast processes train together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from eagle_lab.measure.acceptance import Acceptance, AcceptanceRecord, Difference, difference
from eagle_lab.measure.records import Part, Record, read
from eagle_lab.train.make_draft import DraftSettings, Seconds, TrainingRecord


class Try(Part):
    """One training: its settings, how long it took, and what its head gets accepted; `sampled`, at a temperature."""

    settings: DraftSettings
    seconds: Seconds
    acceptance: Acceptance
    sampled: Acceptance | None = None


class Rate(Part):
    """How long so many processes, each with a device of its own, took for so many steps, compiling left out."""

    processes: int
    batch: int
    length: int
    steps: int
    seconds: float

    @property
    def rows(self) -> float:
        """Packed rows a second, all processes together."""
        return self.batch * self.steps / self.seconds


class TriesRecord(Record):
    """Trainings that differ from the reference in one setting or in the seed, on the same text for as many steps."""

    schema_name: Literal["eagle_lab.tries.v1"] = Field("eagle_lab.tries.v1", alias="schema")
    reference: Try
    tries: list[Try]
    rates: list[Rate] = []


def changed(one: Try, reference: Try) -> dict[str, Any]:
    """The settings of text and training in which a try differs from the reference."""
    mine, theirs = ({**t.settings.text, **t.settings.training} for t in (one, reference))
    return {name: mine[name] for name in mine if mine[name] != theirs.get(name)}


def gains(one: Try, reference: Try) -> tuple[Difference, Difference | None]:
    """τ of a try less the reference's, paired by prompt: greedy, and sampled where both were measured so."""
    greedy = difference(one.acceptance, reference.acceptance)
    both = one.sampled is not None and reference.sampled is not None
    return greedy, difference(one.sampled, reference.sampled) if both else None  # type: ignore[arg-type]


def gather(folders: Sequence[Path], rates: Sequence[Path] = ()) -> TriesRecord:
    """One record of finished trainings, the reference's folder first, and of how fast other folders' runs went.

    A folder's `sampled.json`, where there is one, is what `acceptance` measured at a temperature. Raises RecordError where
    a folder has no finished training, ValueError where none is given.
    """
    if not folders:
        raise ValueError("no training is given; name their work folders, the reference first.")
    first = read(folders[0] / "record.json", TrainingRecord)
    tries = [_try(folder) for folder in folders]
    return TriesRecord(
        **first.model_dump(include={"created", "command", "environment"}),
        reference=tries[0],
        tries=tries[1:],
        rates=[_rate(folder) for folder in rates],
    )


def _try(folder: Path) -> Try:
    record, sampled = read(folder / "record.json", TrainingRecord), folder / "sampled.json"
    return Try(
        settings=record.settings, seconds=record.seconds, acceptance=record.acceptance,
        sampled=read(sampled, AcceptanceRecord).acceptance if sampled.exists() else None,
    )  # fmt: skip


def _rate(folder: Path) -> Rate:
    history = torch.load(folder / "training" / "state.pt", map_location="cpu", weights_only=True)["history"]
    uncounted = sum(
        entry["seconds"] == 0 for entry in history
    )  # those before the first look, compiling among them
    s = json.loads((folder / "training" / "training.json").read_text())
    return Rate(
        processes=s["processes"], batch=s["batch"], length=s["length"], steps=len(history) - uncounted,
        seconds=history[-1]["seconds"],
    )  # fmt: skip
