"""One call from a target to its draft head: text, training, acceptance on the held-out prompts, record.

Every stage leaves what it did in the work folder, so that the same call started again goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from eagle_lab import ROOT
from eagle_lab.measure.acceptance import SIZES, Acceptance, acceptance
from eagle_lab.measure.records import Part, Record, made, write
from eagle_lab.models.architecture import settle_window
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.pair import DEFAULT_TARGET, Pair, load
from eagle_lab.models.prompts import prepare
from eagle_lab.models.targets import check_device, check_dtype, find_target, load_target, load_tokenizer
from eagle_lab.train.corpus import read_texts, write_texts
from eagle_lab.train.processes import join
from eagle_lab.train.text import TextSettings
from eagle_lab.train.train import Check, Step, TrainSettings, halved, save_head, train

Prompts = str | Sequence[Sequence[int]]

# decodes on a GPU from graphs; the tokens and trees are those of any other strategy
ON_GPU, ON_CPU = "doubling,runtime=cuda_graph", "doubling,product=transposed"
JUDGED_TOKENS = 128  # of a decode by which a checkpoint is chosen; a run that goes on must have the same


class DraftSettings(Part):
    """What a head was made from and how; `text` and `training` are TextSettings and TrainSettings as they were.

    texts: how many, None where that was not kept.
    """

    target: str
    texts: int | None
    answer_tokens: int
    text: dict[str, Any]
    training: dict[str, Any]
    processes: int = 1


class Seconds(Part):
    """How long the stages took: writing text, and training as its steps count it."""

    text: float
    training: float


class GrowthPoint(Part):
    """τ of a head that was trained on so much text, with its 95% interval over so many prompts where it was kept.

    `norms`: the head has EAGLE-3.1's, so that it doesn't lie on a line with those without them.
    """

    answer_tokens: int
    tau: float
    low: float | None = None
    high: float | None = None
    prompts: int | None = None
    norms: bool = False


class TrainingRecord(Record):
    """A head's training: its settings, every look at the run, and what the head gets accepted.

    history, checks: empty where they were lost with the machine, so that a card says so.
    `growth`: heads trained alike on the first part of the text, with as many passes over it.
    """

    schema_name: Literal["eagle_lab.training.v2"] = Field("eagle_lab.training.v2", alias="schema")
    settings: DraftSettings
    seconds: Seconds
    history: list[Step]
    checks: list[Check]
    chosen: int | None
    acceptance: Acceptance
    growth: list[GrowthPoint] = []


@dataclass(frozen=True)
class Made:
    """The record of a finished head; where the clock stopped the call first: None, the stage and what is left of it."""

    record: TrainingRecord | None
    stage: Literal["text", "training", "done"] = "done"
    left: int = 0


def thin(history: Sequence[Step]) -> list[Step]:
    """At most 200 entries of a history, evenly chosen, the last one kept."""
    step = max(1, -(-len(history) // 200))
    return [*history[:-1:step], history[-1]] if history else []


def make_draft(
    target: str | Path | None,
    out: str | Path,
    answer_tokens: int,
    text: TextSettings,
    training: TrainSettings,
    device: str | None = None,
    prompts: Prompts = "heldout",
    judged_on: Prompts | None = "validation",
    max_new_tokens: int = 128,
    sizes: Sequence[int] = SIZES,
    growth: Sequence[float] = (),
    texts: str | Path | None = None,
    minutes: float | None = None,
) -> Made:
    """Text, training and acceptance; the head ends in `out`/training/draft, the record in `out`/record.json.

    Args: target: None is the embedded one; answer_tokens: how many the target writes; prompts, max_new_tokens and
    sizes: how acceptance is measured; judged_on: the prompts on whose τ the checkpoint is chosen, None for the last
    checkpoint; growth: shares of the text, such as 0.25, on which a head of its own is trained, for so many fewer steps;
    texts: folder of the text, `out`/texts if None; minutes: when to stop, from the call on, with everything written.
    Under `torchrun` the processes share the work; the first returns the record. Raises ValueError as the stages do.
    """
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    processes, place = join(check_device(device))
    kind, out = check_dtype(None, place), Path(out)
    if target is not None and not Path(target).is_dir() and (ROOT / target).is_dir():
        target = ROOT / target  # a folder of the kit, wherever the caller stands
    tokenizer = load_tokenizer(find_target(target))
    for wanted in (prompts, judged_on):
        if wanted is not None:
            prepare(tokenizer, wanted)  # refused now, not after hours of training
    model = load_target(target, place, kind)
    settle_window(model)
    folder = Path(texts) if texts is not None else out / "texts"
    began = time.monotonic()
    written = write_texts(model, tokenizer, answer_tokens, text, folder, until, processes)
    if processes.rank == 0:
        _add(out / "seconds", time.monotonic() - began)
    if written < answer_tokens:
        return Made(None, "text", answer_tokens - written)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # the writer's keys and values; a pair is loaded only where memory is free
    judge = None
    if judged_on is not None and training.check_every < training.steps:  # one checkpoint leaves no choice
        judge = _Judge((target, place, kind), judged_on, JUDGED_TOKENS, out / "judged")

    def measured(draft: Path, sizes: Sequence[int]) -> Acceptance:
        pair = load(target, draft, place, kind, verbose=False)
        return acceptance(pair, prompts, max_new_tokens, sizes=sizes, strategy=strategy_on(pair))

    points = []
    for share in growth:
        part = read_texts(folder, round(answer_tokens * share))
        fewer = replace(training, steps=max(1, round(training.steps * share)))
        done = train(model, part, out / f"training-{share:g}", fewer, judge, until, processes)
        if done.left:
            return Made(None, "training", done.left)
        if processes.rank == 0:
            found = measured(done.draft, sizes[:1])
            points.append(GrowthPoint(answer_tokens=part.answer_tokens, tau=found.tau, norms=training.norms))
    whole = read_texts(folder, answer_tokens)
    result = train(model, whole, out / "training", training, judge, until, processes)
    if result.left:
        return Made(None, "training", result.left)
    if processes.rank > 0:
        return Made(None)
    record = TrainingRecord(
        **made(place.type),
        settings=DraftSettings(
            target=DEFAULT_TARGET if target is None else Path(target).name, texts=len(whole),
            answer_tokens=whole.answer_tokens, text=asdict(text), training=asdict(training), processes=processes.count,
        ),
        seconds=Seconds(text=_add(out / "seconds", 0), training=round(result.history[-1].seconds, 1)),
        history=thin(result.history), checks=result.checks, chosen=result.chosen,
        acceptance=measured(result.draft, sizes), growth=points,
    )  # fmt: skip
    write(record, out / "record.json")
    return Made(record)


def _add(path: Path, seconds: float) -> float:
    """Seconds kept in a file over all calls, this one's added."""
    total = round((float(path.read_text()) if path.exists() else 0.0) + seconds, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{total}\n")
    return total


def strategy_on(pair: Pair) -> str:
    """A fast way to decode on the pair's device, with the attention that keeps what the target asks of it."""
    fast = ON_GPU if pair.device.type == "cuda" else ON_CPU
    return fast if pair.target.config._attn_implementation == "sdpa" else f"{fast},attention=eager"


@dataclass
class _Judge:
    """τ of a head in training, by the kit's own decoder: a pair whose head takes over the trained one's weights."""

    where: tuple[str | Path | None, torch.device, torch.dtype]
    prompts: Prompts
    max_new_tokens: int
    folder: Path
    pair: Pair | None = None

    def __call__(self, head: DraftHead) -> float:
        half = halved(head)
        if self.pair is None:
            target, place, kind = self.where
            save_head(half, self.folder)
            self.pair = load(target, self.folder, place, kind, verbose=False)
        # in place: the decoder's graphs hold the weights' addresses
        self.pair.head.load_state_dict(half.state_dict())
        strategy = strategy_on(self.pair)
        return acceptance(
            self.pair, self.prompts, self.max_new_tokens, sizes=SIZES[:1], strategy=strategy, progress=False
        ).tau
