"""The generated blocks of README.md and docs/: nothing measured is typed in by hand.

A block between `<!-- generated: NAME -->` and `<!-- end -->` is what `BLOCKS[NAME]` renders from the records, the
notebooks and the code; where a record is missing, it says so with the command that makes it. `python -m eagle_lab docs`
renders all, `--check` fails where one is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from eagle_lab import ROOT
from eagle_lab.decode.strategy import AXES as CHOICES
from eagle_lab.measure import records
from eagle_lab.measure.old_records import Record, read_all
from eagle_lab.measure.records import committed, target_slug
from eagle_lab.models.pair import DEFAULT_TARGET
from eagle_lab.report import ladder, profile, seed, sweep
from eagle_lab.report.page import change_text, consistency_words, markdown_table, sentence, table_rows
from eagle_lab.report.readme_words import (
    machine,
    missing,
    source,
)
from eagle_lab.report.training import grown, trainings
from eagle_lab.report.words import render as filled
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.record import OptimizeRecord
from eagle_lab.studies.seed import SeedRecord, published
from eagle_lab.studies.sweep import SweepRecord
from eagle_lab.verdict import calibration, simulate
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.summary import ceiling, consistency_of, table, verdict_of

EXAMPLE = "compare-cpu-rebuild-vs-incremental"
GPU_COMMANDS = "\n".join(
    f"python -m eagle_lab record {name} --device cuda" for name in ("profile", "ladder", "sweep")
)
DEFAULT = "default"  # how the commands name the embedded target

Found = Mapping[str, Record]  # by file name without its ending
Block = Callable[[Found, Path], str]

PAGES = ("README.md", "docs/guide.md", "docs/strategies.md", "docs/results.md")
_BLOCK = re.compile(
    r"(?P<head><!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.S
)


class ReadmeError(ValueError):
    """A page whose blocks can't be rendered; the message says which."""


def minutes(record: ComparisonRecord) -> str | None:
    """How long a comparison took, from its record's two stamps; None where it did not finish."""
    if record.finished is None:
        return None
    seconds = (record.finished - record.created).total_seconds()
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def _with_source(found: Found, words: Callable[[Record], str], gpu: bool) -> list[str]:
    """Each record of that kind of machine in words, with where it lies and the command that made it."""
    chosen = {name: r for name, r in found.items() if bool(r["environment"].get("gpu")) == gpu}
    return [f"{words(r)}\n\n{source(name, r)}" for name, r in chosen.items()]


def _compared(root: Path) -> dict[str, ComparisonRecord]:
    found = records.read_all(root / "data" / "results", ComparisonRecord)[0]
    return {path.stem: record for path, record in found.items()}


def _of_kind(found: Found, kind: str) -> dict[str, Record]:
    return {name: record for name, record in found.items() if record["kind"] == kind}


def picture_block(found: Found, root: Path) -> str:
    """The one real result: its chart, its verdict line, and links to its report and record."""
    record = _compared(root).get(EXAMPLE)
    if record is None:
        return missing("make compare")
    took = minutes(record)
    links = [
        f"[its {word}](data/results/{EXAMPLE}.{end})"
        for word, end in (("report", "md"), ("record", "json"))
        if (root / "data" / "results" / f"{EXAMPLE}.{end}").exists()
    ]
    drawn = (root / "data" / "results" / f"{EXAMPLE}.svg").exists()
    chart = [
        f"![Candidate over baseline, pair by pair, with the verdict's interval](data/results/{EXAMPLE}.svg)"
    ]
    words = f"**{sentence(record)}.** {machine(record)}{f', {took}' if took else ''}; {' and '.join(links)}."
    return "\n\n".join([*(chart if drawn else []), words])


def compare_block(found: Found, root: Path) -> str:
    """The example's table, ceiling, consistency check and command."""
    record = _compared(root).get(EXAMPLE)
    if record is None:
        return missing("make compare")
    top, consistent, s = ceiling(record), consistency_of(record), record.settings
    parts = [
        f"`{s.candidate}` against `{s.baseline}`, {s.target}, {s.dtype}, {machine(record)}:",
        markdown_table(table_rows(table(record))),
    ]
    if top:
        parts.append(
            f"The mask takes {top.share:.2%} of a decode, so the best builder that could be would bring "
            f"{top.gain:.2%}. {consistency_words(consistent) if consistent else ''}".strip()
        )
    return "\n\n".join([*parts, f"```sh\n{record.command}\n```"])


def verdicts_block(found: Found, root: Path) -> str:
    """Every comparison under data/results/, a row each."""
    rows = [
        {
            "target": record.settings.target,
            "candidate against baseline": f"`{record.settings.candidate}` against `{record.settings.baseline}`",
            "machine": machine(record),
            "verdict": f"{verdict_of(record).decision} {change_text(_ratio(record))}",
            "record": f"[{name}](data/results/{name}.json)",
        }
        for name, record in _compared(root).items()
    ]
    return markdown_table(rows) if rows else missing("make compare")


def _ratio(record: ComparisonRecord) -> tuple[float, float, float]:
    verdict = verdict_of(record)
    return verdict.low, verdict.estimate, verdict.high


def seed_block(found: Found, root: Path) -> str:
    """The claims of the investigation that the kit grew out of, and its experiment done again."""
    folder = root / "data" / "results"
    seeds = committed(SeedRecord, folder)
    return "\n\n".join([seed.claims(published(), seeds, folder), seed.redone(seeds)])


@lru_cache(maxsize=1)
def _simulated() -> str:
    keys = ("coverage", "false_verdicts", "power_2")
    ours = (calibration.ONE_FORK.name, calibration.FIVE_FORKS.name)
    rows = [
        {"design and analysis": f"**{row['design']}**" if row["design"] in ours else row["design"]}
        | {calibration.METRICS[k]: calibration.percent(row[k]) for k in keys}
        for row in simulate.tabulate()
    ]
    return markdown_table(rows)


def simulated_block(found: Found, root: Path) -> str:
    """How often each design errs, simulated anew at the default seed: a few seconds."""
    return _simulated()


def _typed(root: Path, gpu: bool, kind: type[records.R], section: Callable[[records.R], str]) -> list[str]:
    """Each record of a kind and of that kind of machine in words, with where it lies and the command that made it."""
    return [
        f"{section(r)}\n\n[The record](data/results/{r.kind}-{name}.json), made by `{r.command}`."
        for name, r in committed(kind, root / "data" / "results").items()
        if bool(r.environment.gpu) == gpu
    ]


def profile_block(found: Found, root: Path) -> str:
    """Where a cycle's time goes on a CPU."""
    told = _typed(root, False, ProfileRecord, profile.section)
    return "\n\n".join(told) or missing("papermill notebooks/profile.ipynb out.ipynb")


def draft_block(found: Found, root: Path) -> str:
    """What the shipped head gets accepted, overall, by category and by size of the tree, and how that grew with text."""
    trained = trainings(root / "data" / "results")
    if not trained:
        return missing("python -m eagle_lab train")
    *_, (path, record) = trained.items()
    names = [place.stem for place in trained]
    return filled(
        "readme_draft.md.j2", record=record, name=path.stem, names=names, growth=grown(trained.values())
    ).strip()


def optimize_block(found: Found, root: Path) -> str:
    """The ladder of optimizations on a CPU."""
    told = _typed(root, False, OptimizeRecord, ladder.section)
    return "\n\n".join(told) or missing("python -m eagle_lab record ladder --device cpu --target default")


def sweep_block(found: Found, root: Path) -> str:
    """Every mask builder against `rebuild` by size of the tree, on a CPU."""
    return "\n\n".join(_typed(root, False, SweepRecord, sweep.page)) or missing(
        "python -m eagle_lab record sweep --device cpu"
    )


def gpu_block(found: Found, root: Path) -> str:
    """Whatever was measured on a GPU, and the command for what wasn't."""
    parts: tuple[tuple[str, type, Callable, str], ...] = (
        ("Where a cycle's time goes", ProfileRecord, profile.section, "profile"),
        ("Optimizations, one at a time", OptimizeRecord, ladder.section, "ladder"),
        ("Mask construction", SweepRecord, sweep.page, "sweep"),
    )
    told = []
    for heading, kind, words, name in parts:
        command = f"python -m eagle_lab record {name} --device cuda"
        told += [f"#### {heading}", *(_typed(root, True, kind, words) or [missing(command, gpu=True)])]
    return "\n\n".join(told)


AXES = {
    "mask": "how the tree's mask is built",
    "runtime": "how a cycle is run: as it is, compiled, or replayed from a CUDA graph",
    "cache": "the head's keys and values: in place, or grown by concatenation as the official head does",
    "attention": "one masked window, or the prefix without a mask and the tree with one",
    "product": "the projections' products: the library's, or small ones by a kernel that loads its weights early",
}


def axes_block(found: Found, root: Path) -> str:
    """The choices on each axis of a strategy, the usual one first."""
    rows = [
        {"axis": f"`{axis}`", "what it is": AXES[axis], "choices": ", ".join(f"`{name}`" for name in names)}
        for axis, names in CHOICES.items()
    ]
    return markdown_table(rows)


def target_name(name: str) -> str:
    """A target as it is called in words: "" is the embedded one."""
    return name or DEFAULT_TARGET.rpartition("/")[2]


def _is_of(record: Record, name: str) -> bool:
    return target_slug(str(record["settings"].get("target", ""))) == target_slug(name or DEFAULT_TARGET)


# --- from the notebooks -----------------------------------------------------------------------------------


def notebook_facts(path: Path) -> dict[str, str]:
    """Question and time of a notebook, from its metadata; ReadmeError where they aren't there."""
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("eagle_lab", {})
    if set(metadata) != {"question", "time"}:
        raise ReadmeError(f"{path.name} must have metadata.eagle_lab with its question and its time.")
    return {"notebook": f"[{path.stem}](notebooks/{path.name})", **metadata}


def notebooks_block(found: Found, root: Path) -> str:
    """All notebooks in a table."""
    return markdown_table([notebook_facts(path) for path in sorted((root / "notebooks").glob("*.ipynb"))])


BLOCKS: dict[str, Block] = {
    "picture": picture_block,
    "results": verdicts_block,
    "compare-cpu": compare_block,
    "verdicts": verdicts_block,
    "draft": draft_block,
    "sweep-cpu": sweep_block,
    "optimize-cpu": optimize_block,
    "seed": seed_block,
    "simulated": simulated_block,
    "profile-cpu": profile_block,
    "gpu": gpu_block,
    "notebooks": notebooks_block,
    "axes": axes_block,
}


def render(page: str, root: Path = ROOT) -> str:
    """A page's text, such as "README.md", with every block rendered anew from `root`.

    Raises ReadmeError for an unknown block, or for one without an end.
    """
    text = (root / page).read_text(encoding="utf-8")
    if text.count("<!-- generated: ") != len(_BLOCK.findall(text)):
        raise ReadmeError(f"{page} has a block that never ends; close each with <!-- end -->.")
    found = {path.stem: record for path, record in read_all(root / "data" / "results")[0].items()}
    up = "../" * page.count("/")  # links are written as from the README

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ReadmeError(f"{page}'s block {name!r} is unknown; known: {', '.join(BLOCKS)}.")
        body = re.sub(r"\]\((?=data/|notebooks/|docs/)", f"]({up}", BLOCKS[name](found, root))
        return f"{match['head']}{body}\n{match['end']}"

    return _BLOCK.sub(one, text)


def stale(root: Path = ROOT) -> dict[str, str]:
    """The pages that aren't what the records render, each with the text that it should have."""
    made = {page: render(page, root) for page in PAGES}
    return {page: text for page, text in made.items() if text != (root / page).read_text(encoding="utf-8")}
