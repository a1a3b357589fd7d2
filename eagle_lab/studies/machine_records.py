"""All that this issue of the kit wants from one machine: full profiles with what-ifs, and the first investigation redone.

`python -m eagle_lab.studies.machine_records --device cuda` makes every record of a GPU in one go, for SmolLM2 and for the
shape of Llama-3.1-8B, and writes them below data/results/; commit what it wrote. The notebooks read them from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from eagle_lab import ROOT
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record, check_folder, new, read, write
from eagle_lab.measure.records import read_all
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt, load_prompts, prepare
from eagle_lab.studies.breakdown import closes, title
from eagle_lab.studies.operators import operators_of_any
from eagle_lab.studies.profile import check_acceptance, profile, profile_prompts
from eagle_lab.studies.seed_masks import BUILDERS, SIZES, time_masks
from eagle_lab.studies.sweep import SweepRecord
from eagle_lab.studies.whatif import check_whatif, sentence, whatif
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.old_form import comparison
from eagle_lab.verdict.summary import verdict_of

RESULTS = ROOT / "data" / "results"
STATED = "stated 3.0"
GPU_TARGETS = ("", "shape:llama-3.1-8b")  # "" is the embedded default
WHATIFS = (("tree_mask", "host"), ("draft", "host"), ("target", "host"))
DEVICE_WHATIFS = (("draft", "device"), ("target", "device"))


def machine_slug(environment: dict[str, Any]) -> str:
    """A short name of the machine for file names: "cpu", or the GPU's model such as "h100"."""
    gpu = environment.get("gpu")
    if not gpu:
        return "cpu"
    words = re.sub(r"[^a-z0-9]+", "-", machine_key(environment).lower()).strip("-").split("-")
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), words[-1])


def target_slug(name: str) -> str:
    """A short name of a target for file names: its last part, in lower case."""
    return re.sub(r"[^a-z0-9.]+", "-", name.removeprefix("shape:").rpartition("/")[2].lower()).strip("-")


def place(kind: str, record: Record, folder: Path = RESULTS) -> Path:
    """Where a record of a kind ("profile", "seed") is kept: <kind>-<machine>-<target>.json."""
    slugs = machine_slug(record["environment"]), target_slug(record["settings"]["target"])
    return folder / f"{kind}-{slugs[0]}-{slugs[1]}.json"


def committed(kind: str, folder: Path = RESULTS) -> tuple[dict[str, Record], list[str]]:
    """The records of a kind that are there, by machine and target, and a sentence for each expected one that isn't."""
    found = {path.stem.removeprefix(f"{kind}-"): read(path) for path in sorted(folder.glob(f"{kind}-*.json"))}
    expected = [("CPU", "smollm2-135m-instruct"), ("GPU", "smollm2-135m-instruct"), ("GPU", "llama-3.1-8b")]
    told = []
    for machine, target in expected:
        here = [r for r in found.values() if target_slug(r["settings"]["target"]) == target]
        on = [r for r in here if (machine_slug(r["environment"]) == "cpu") == (machine == "CPU")]
        if not on:
            told.append(f"No {kind} record of {target} on a {machine} is in data/results yet.")
    return found, told


def sweeps(folder: Path = RESULTS) -> dict[str, SweepRecord]:
    """The committed sweeps of the mask builders, by file name."""
    return {path.stem: record for path, record in read_all(folder, SweepRecord)[0].items()}


def stated_acceptance(pair: Pair, acceptance: str | None = None) -> float | None:
    """The tokens a cycle that are stated, None where the acceptance is to be measured.

    `acceptance`: "measured" or "stated 3.0"; None: measured, and STATED for a shape, whose weights are random. ValueError
    for anything else, and for a shape's acceptance "measured".
    """
    shaped = pair.target_name.startswith("shape:")
    return check_acceptance(pair, acceptance or (STATED if shaped else "measured"))


def get_prompts(pair: Pair, count: int, selection: str = "heldout") -> list[Prompt]:
    """`count` prompts of a selection with ids; random ids where the pair has no tokenizer."""
    chosen = load_prompts(selection)[:count]
    return prepare(pair.tokenizer, chosen) if pair.tokenizer is not None else profile_prompts(pair, chosen)


def full_profile(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    whatifs: Sequence[tuple[str | None, str]] = (),
    iterations: int = 8,
    whatif_tokens: int = 12,
    delay_ms: float = 0.0,
    trace: str | Path | None = None,
    **settings: Any,
) -> Record:
    """A profile, what the operators say, and a what-if for each (stage, where); settings as for `profile`.

    A stage that is None is chosen (see `whatif.check_whatif`). Raises ValueError for a what-if that the strategy or the
    device can't have, before anything is measured.
    """
    strategy = settings.get("strategy", "rebuild")
    asked = [
        (check_whatif(pair, strategy, stage, where, iterations, delay_ms), where) for stage, where in whatifs
    ]
    record = profile(pair, prompts, **settings)
    options = {k: record["settings"][k] for k in ("strategy", "top_k", "depth", "total_tokens")}
    ready = profile_prompts(pair, prompts, seed=record["settings"]["seed"])
    record["operators"] = operators_of_any(pair, ready, options, trace=trace)
    record["whatif"] = [
        whatif(
            pair, ready, record, stage=stage, where=where, delay_ms=delay_ms, iterations=iterations,
            max_new_tokens=whatif_tokens, seed=record["settings"]["seed"],
        )
        for stage, where in asked
    ]  # fmt: skip
    return record


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


app = typer.Typer(add_completion=False)


@app.command()
def main(
    device: str = "cuda",
    target: str = typer.Option("all", help="all, default, or a target such as shape:llama-3.1-8b"),
    draft: str = typer.Option("", help="a draft head's folder; empty is the one that belongs to the target"),
    max_new_tokens: int = 50,
    profiles: bool = True,
    seeds: bool = True,
    iterations: int = typer.Option(20, help="pairs of the redone investigation"),
    forks: int = typer.Option(5, help="fresh processes to spread them over"),
    results_dir: Path = RESULTS,
) -> None:
    """Make the records of this machine and write them to data/results/."""
    check_folder(results_dir)
    for name in {"all": GPU_TARGETS, "default": ("",)}.get(target, (target,)):
        pair = load(name or None, draft or None, device=device)
        if profiles:
            _save("profile", _profile(pair, max_new_tokens), results_dir)
        if seeds:
            record = redo_seed(pair, iterations=iterations, max_new_tokens=max_new_tokens, forks=forks)
            print(verdict_of(comparison(record["comparison"])))
            _save("seed", record, results_dir)
        del pair


def _profile(pair: Pair, max_new_tokens: int) -> Record:
    # a CPU's cycle is ten times a GPU's, so it gets fewer of them: about three minutes in all. With random weights
    # nearly every token is a cycle of its own, so fewer decodes hold as many cycles.
    quick, shaped = pair.device.type == "cuda", pair.target_name.startswith("shape:")
    record = full_profile(
        pair,
        get_prompts(pair, 4 if quick and not shaped else 3),
        whatifs=(*WHATIFS, *DEVICE_WHATIFS) if quick else WHATIFS,
        iterations=8,
        whatif_tokens=(8 if shaped else 16) if quick else 12,
        max_new_tokens=max_new_tokens,
        acceptance=STATED if shaped else "measured",
        repeats=2 if quick and not shaped else 1,
    )
    print(f"{title(record)}\n{closes(record)[3]}")
    print("\n".join(sentence(record, found) for found in record["whatif"]))
    return record


def _save(kind: str, record: Record, folder: Path) -> None:
    path = place(kind, record, folder)
    write(record, path)
    print(f"written: {path.name}")


if __name__ == "__main__":
    app()
