"""A trained head in tables and words: the card that it is shipped with, and what the notebook says of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import linregress, t

from eagle_lab.measure.acceptance import AcceptanceRecord
from eagle_lab.measure.records import RESULTS, read, read_all, write
from eagle_lab.models.pair import DEFAULT_TARGET
from eagle_lab.report.words import interval, render
from eagle_lab.train.make_draft import GrowthPoint, TrainingRecord
from eagle_lab.train.train import Step
from eagle_lab.train.tries import TriesRecord, changed, gains


def grown(records: Iterable[TrainingRecord]) -> list[GrowthPoint]:
    """τ of every head of the records, all on the prompts of the fewest: those without norms first, each kind by its text."""
    given = list(records)
    prompts = min((set(r.acceptance.by_prompt) for r in given), key=len, default=set())
    points = {
        (p.norms, p.answer_tokens): p
        for record in given
        for p in (*record.growth, _own_point(record, prompts))
    }
    return [points[key] for key in sorted(points)]


def alike(points: Sequence[GrowthPoint]) -> list[GrowthPoint]:
    """The heads with norms or those without, whichever are more: what more text brings is told by these."""
    kinds = [[p for p in points if p.norms is norms] for norms in (False, True)]
    return max(kinds, key=len)


def _own_point(record: TrainingRecord, prompts: Collection[str]) -> GrowthPoint:
    tokens = record.settings.answer_tokens + record.settings.training.get("start_tokens", 0)
    norms = record.settings.training.get("norms", False)
    found = record.acceptance.on(prompts) if len(prompts) > 1 else None
    if found is None:
        return GrowthPoint(answer_tokens=tokens, tau=record.acceptance.tau, norms=norms)
    return GrowthPoint(
        answer_tokens=tokens,
        tau=found.value,
        low=found.low,
        high=found.high,
        prompts=found.prompts,
        norms=norms,
    )


def per_fourfold(points: Sequence[GrowthPoint]) -> tuple[float, float, float] | None:
    """What four times the text brought in τ: the slope of a line through the heads of one kind (`alike`), with its 95%
    interval by Student's t; None for fewer than three."""
    points = alike(points)
    if len(points) < 3:
        return None
    fit = linregress([math.log(p.answer_tokens, 4) for p in points], [p.tau for p in points])
    half = float(t.ppf(0.975, len(points) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def trainings(folder: Path = RESULTS, target: str = DEFAULT_TARGET) -> dict[Path, TrainingRecord]:
    """A folder's trainings for a target, the one with the least text first; the last of those committed made the kit's
    head."""
    found = {p: r for p, r in read_all(folder, TrainingRecord)[0].items() if r.settings.target == target}
    return dict(sorted(found.items(), key=lambda item: item[1].settings.answer_tokens))


def tries(folder: Path = RESULTS) -> TriesRecord:
    """The newest record of trainings that differ in one setting; ValueError where the folder has none."""
    found = read_all(folder, TriesRecord)[0].values()
    if not found:
        raise ValueError(f"{folder} has no record of tries; `record tries` makes one of finished trainings.")
    return max(found, key=lambda record: record.created)


def card(record: TrainingRecord, name: str, others: Sequence[TrainingRecord] = ()) -> str:
    """The card of the head in data/`name`: how it was made, where, how long it took, and what was measured.

    others: trainings of the same target on other amounts of text, for how τ grew.
    """
    points = grown([record, *others])
    return render(
        "card.md.j2",
        record=record,
        name=name,
        others=others,
        growth=points,
        points=alike(points),
        slope=per_fourfold(points),
    )


def ship(out: Path, folder: Path, place: Path) -> None:
    """Copy the finished head of `make_draft` and its card to `folder`, and its record to `place`.

    The card tells of the other trainings beside `place` too. A record at `place` of a training on another amount of text
    is kept, its millions of answer tokens added to its name. Raises RecordError where `out` holds no finished training.
    """
    record = read(out / "record.json", TrainingRecord)
    if place.exists():
        tokens = read(place, TrainingRecord).settings.answer_tokens
        if tokens != record.settings.answer_tokens:
            place.rename(place.with_name(f"{place.stem}-{tokens / 1e6:.0f}m.json"))
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((out / "training" / "draft").iterdir()):
        shutil.copyfile(file, folder / file.name)
    others = [
        other for path, other in trainings(place.parent, record.settings.target).items() if path != place
    ]
    (folder / "README.md").write_text(card(record, folder.name, others), encoding="utf-8")
    write(record, place)


def measured_with(draft: str, folder: Path = RESULTS) -> list[Path]:
    """The records of a folder that were measured with the head of that name, trainings aside."""
    settings = {
        path: json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        for path in sorted(folder.glob("*.json"))
    }
    return [path for path, known in settings.items() if Path(known.get("draft") or "").name == draft]


def shipped_words(records: Sequence[Path], everything: bool) -> str:
    """What follows a head that was shipped, and what does not yet; `everything`: the trees and pages were made too."""
    return render("shipped.j2", records=records, everything=everything).rstrip()


def text_words(record: TrainingRecord) -> str:
    """What the head was trained on, in one paragraph."""
    return render("training_text.md.j2", record=record)


def training_words(history: Sequence[Step]) -> str:
    """How the loss and the accuracy moved, in one paragraph: means over the first and the last twentieth."""
    few = max(1, len(history) // 20)
    first, last = history[:few], history[-few:]
    return render(
        "training_course.md.j2",
        loss=[fmean(entry.loss for entry in part) for part in (first, last)],
        drafted=[fmean(entry.accuracy[0] for entry in part) for part in (first, last)],
        deepest=fmean(entry.accuracy[-1] for entry in last),
        last=history[-1],
    )


def acceptance_words(record: TrainingRecord) -> str:
    """τ and what it means, in one paragraph."""
    return render("training_tau.md.j2", found=record.acceptance)


def accepted_words(record: AcceptanceRecord) -> str:
    """What was measured of a head, and of the one beside it, in lines for a terminal."""
    return render("acceptance.j2", record=record).rstrip()


def acceptance_rows(record: TrainingRecord) -> list[dict[str, Any]]:
    """One row for each size of tree: draft nodes and τ."""
    return [{"draft nodes": n, "τ": round(v, 2)} for n, v in record.acceptance.by_tree_size.items()]


def growth_rows(points: Sequence[GrowthPoint]) -> list[dict[str, str]]:
    """One row for each head: the text that it was trained on, its τ with the interval over prompts, and its norms."""
    return [
        {
            "answer tokens": f"{p.answer_tokens:,}",
            "τ": f"{p.tau:.2f}"
            if p.low is None or p.high is None
            else f"{p.tau:.2f} {interval(p.low, p.high, 2)}",
            "norms": "yes" if p.norms else "no",
        }
        for p in points
    ]


def growth_words(points: Sequence[GrowthPoint]) -> str:
    """What more text brought, from the last two heads of one kind."""
    return render("training_growth.md.j2", points=alike(points), slope=per_fourfold(points))


def tries_words(record: TriesRecord) -> str:
    """A try a row: what it changed, τ and its gain over the reference, paired by prompt, and what is kept of it."""
    rows = [(changed(one, record.reference), one, *gains(one, record.reference)) for one in record.tries]
    return render("tries.md.j2", record=record, rows=rows, own=_apart(record))


def _apart(record: TriesRecord) -> dict[str, Any]:
    """The reference's values of every setting that some try changes."""
    s = record.reference.settings
    names = {name for one in record.tries for name in changed(one, record.reference)}
    return {name: value for name, value in {**s.text, **s.training}.items() if name in names}
