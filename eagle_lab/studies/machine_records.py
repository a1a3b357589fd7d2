"""The first investigation's records: found in data/results, and its experiment redone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from eagle_lab.measure.environment import Environment
from eagle_lab.measure.old_records import Record, new, read, write
from eagle_lab.measure.records import RESULTS, check_folder, machine_slug, read_all, target_slug
from eagle_lab.models.pair import Pair, load
from eagle_lab.studies.profile import get_prompts, stated_acceptance
from eagle_lab.studies.record import targets
from eagle_lab.studies.seed_masks import BUILDERS, SIZES, time_masks
from eagle_lab.studies.sweep import SweepRecord
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.old_form import comparison
from eagle_lab.verdict.summary import verdict_of


def _slug(environment: dict[str, Any]) -> str:
    known = {key: value for key, value in environment.items() if key in Environment.model_fields}
    return machine_slug(Environment.model_validate(known))


def place(kind: str, record: Record, folder: Path = RESULTS) -> Path:
    """Where a record is kept: <kind>-<machine>-<target>.json."""
    return folder / f"{kind}-{_slug(record['environment'])}-{target_slug(record['settings']['target'])}.json"


def committed(kind: str, folder: Path = RESULTS) -> tuple[dict[str, Record], list[str]]:
    """The records of a kind that are there, by machine and target, and a sentence for each expected one that isn't."""
    found = {path.stem.removeprefix(f"{kind}-"): read(path) for path in sorted(folder.glob(f"{kind}-*.json"))}
    expected = [("CPU", "smollm2-135m-instruct"), ("GPU", "smollm2-135m-instruct"), ("GPU", "llama-3.1-8b")]
    told = []
    for machine, target in expected:
        here = [r for r in found.values() if target_slug(r["settings"]["target"]) == target]
        on = [r for r in here if (_slug(r["environment"]) == "cpu") == (machine == "CPU")]
        if not on:
            told.append(f"No {kind} record of {target} on a {machine} is in data/results yet.")
    return found, told


def sweeps(folder: Path = RESULTS) -> dict[str, SweepRecord]:
    """The committed sweeps of the mask builders, by file name."""
    return {path.stem: record for path, record in read_all(folder, SweepRecord)[0].items()}


def redo_seed(
    pair: Pair, *, iterations: int = 20, max_new_tokens: int = 50, forks: int | None = None
) -> Record:
    """The first investigation's experiment by this kit: `rebuild` against `incremental`, and every builder alone.

    A shape's random weights accept next to nothing, so there a decode has as many cycles as `max_new_tokens` take at
    the stated acceptance; the settings say so.
    """
    stated = stated_acceptance(pair)
    done = compare(
        pair,
        baseline="rebuild",
        candidate="incremental",
        prompts=get_prompts(pair, iterations),
        iterations=iterations,
        max_new_tokens=max_new_tokens if stated is None else math.ceil(max_new_tokens / stated),
        forks=forks,
    )
    more = {"stated_acceptance": stated, "tokens_reckoned_with": max_new_tokens}
    record = new("seed", done.record.settings.model_dump(mode="json") | more, str(pair.device))
    record["comparison"] = done.record.model_dump(mode="json")
    record["masks"] = time_masks(pair.device, BUILDERS, SIZES)
    return record


def main(
    device: str, target: str, draft: str | None, tokens: int, iterations: int, forks: int, folder: Path
) -> None:
    """Redo the experiment with each target of this machine and write it to `folder`."""
    check_folder(folder)
    for name in targets(target):
        pair = load(name or None, draft or None, device=device)
        record = redo_seed(pair, iterations=iterations, max_new_tokens=tokens, forks=forks)
        print(verdict_of(comparison(record["comparison"])))
        write(record, place("seed", record, folder))
