"""Trainings that differ in one setting, told apart by τ paired over prompts, and how fast processes train together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from eagle_lab.measure.acceptance import Acceptance, AcceptanceRecord, Difference, difference
from eagle_lab.measure.cluster import ENDED, TRIES, ClusterFailed, Tasks
from eagle_lab.measure.records import Part, Record, read
from eagle_lab.models.targets import check_device
from eagle_lab.runtime.checks import flat
from eagle_lab.train.make_draft import DraftSettings, Seconds, TrainingRecord, make_draft
from eagle_lab.train.text import TextSettings
from eagle_lab.train.train import TrainSettings


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
    """Trainings that differ from the reference in one setting or in the seed, on the same text for as many steps.

    missing: tries without a head, by name, and why.
    """

    schema_name: Literal["eagle_lab.tries.v1"] = Field("eagle_lab.tries.v1", alias="schema")
    reference: Try
    tries: list[Try]
    rates: list[Rate] = []
    missing: dict[str, str] = {}


class Tries(Part):
    """Trainings to make: `training` is the reference's TrainSettings, and each of `tries` names what it changes in them.

    All learn from one text (`answer_tokens`, TextSettings in `text`); options: further ones of `make_draft`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    target: str | None = None
    device: str | None = None
    answer_tokens: Annotated[int, Field(ge=1)]
    text: dict[str, Any] = {}
    training: dict[str, Any] = {}
    tries: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    options: dict[str, Any] = {}


def train_task(threads: int, options: Mapping[str, Any]) -> Iterator[str]:
    """One training, as a generator, so that a cluster can run it."""
    yield "begun"
    torch.set_num_threads(threads)
    make_draft(**options)


def run_tries(wanted: Tries, folder: Path, cluster: str | None = None) -> TriesRecord:
    """Make the trainings, each in a folder of its own below `folder`, the reference first, which writes the text for all.

    Finished ones are not made again, and others go on. With a cluster each is a task of Ray, and its nodes must share the
    folder. Raises ValueError for unknown settings, and where the reference has no head; ClusterFailed as `Tasks` does.
    """
    device, threads = check_device(wanted.device), torch.get_num_threads()
    calls = {}
    for name, changes in {"reference": {}, **wanted.tries}.items():
        told = {**wanted.training, **changes}
        for kind, given in ((TrainSettings, told), (TextSettings, wanted.text)):
            if unknown := set(given) - {field.name for field in fields(kind)}:
                raise ValueError(
                    f"try {name!r} sets {min(unknown)}, which is unknown; `train --settings` lists all."
                )
        training, text = TrainSettings(**told), TextSettings(**wanted.text)
        calls[name] = {
            "target": wanted.target, "out": folder / name, "answer_tokens": wanted.answer_tokens, "text": text,
            "training": training, "device": str(device), "texts": folder / "texts", **wanted.options,
        }  # fmt: skip
    needs = {"num_gpus": 1.0, "num_cpus": 1.0} if device.type == "cuda" else {"num_cpus": float(threads)}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        tasks = None if cluster is None else stack.enter_context(Tasks(cluster, needs))
        for names in (["reference"], list(wanted.tries)):
            left = {
                name: (threads, calls[name]) for name in names if not (folder / name / "record.json").exists()
            }
            missing |= _here(left) if tasks is None else _there(left, tasks)
            if "reference" in missing:
                raise ValueError(f"the reference has no head: {missing['reference']}")
    found = gather([folder / name for name in calls if name not in missing])
    return found.model_copy(update={"missing": missing})


def _here(calls: Mapping[str, tuple[int, dict[str, Any]]]) -> dict[str, str]:
    """Make trainings one after the other; → those that failed, and why."""
    missing = {}
    for name, call in calls.items():
        try:
            list(train_task(*call))
        except (ValueError, RuntimeError, OSError) as error:
            missing[name] = flat(error)
        else:
            if not (call[1]["out"] / "record.json").exists():
                missing[name] = "it was stopped before its end; the same command goes on."
    return missing


def _there(calls: Mapping[str, tuple[int, dict[str, Any]]], tasks: Tasks) -> dict[str, str]:
    """Make trainings as tasks; one whose node or process died goes on elsewhere; → those that failed, and why."""
    missing, tried = {}, dict.fromkeys(calls, 1)
    for name, call in calls.items():
        tasks.start(name, train_task, *call)
    for name, found in tasks.answers():
        cause = getattr(found, "cause", None)
        if found is ENDED and not (calls[name][1]["out"] / "record.json").exists():
            out = calls[name][1]["out"]
            raise ClusterFailed(f"{name} ended without a record in {out}: the nodes must share that folder.")
        if isinstance(found, Exception) and cause is None and tried[name] < TRIES:
            tried[name] += 1
            tasks.start(name, train_task, *calls[name])
        elif isinstance(found, Exception):
            missing[name] = flat(cause or type(found).__name__)
    return missing


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
    # those before the first look, compiling among them
    uncounted = sum(entry["seconds"] == 0 for entry in history)
    s = json.loads((folder / "training" / "training.json").read_text())
    return Rate(
        processes=s["processes"], batch=s["batch"], length=s["length"], steps=len(history) - uncounted,
        seconds=history[-1]["seconds"],
    )  # fmt: skip
