"""The generated parts of README.md and docs/: nothing measured is typed in by hand.

docs/results.md is one template. In the other pages a block between `<!-- generated: NAME -->` and `<!-- end -->` is what
`BLOCKS[NAME]` makes of the records, the notebooks and the code. `python -m eagle_lab docs` renders all, `--check` fails
where a page is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eagle_lab import ROOT
from eagle_lab.decode.strategy import AXES
from eagle_lab.measure import records
from eagle_lab.measure.acceptance import AcceptanceRecord
from eagle_lab.measure.environment import machine_key
from eagle_lab.report import calibration, ladder, page, profile, seed, sweep
from eagle_lab.report.charts.engines import EnginesRecord, engines_rows, engines_words
from eagle_lab.report.charts.style import PLOTLY, thumbnail
from eagle_lab.report.instances import instances_table
from eagle_lab.report.training import grown, trainings
from eagle_lab.report.words import render, table
from eagle_lab.studies import breakdown, scaling, sweep_summary
from eagle_lab.studies.ladder import fastest_tree
from eagle_lab.studies.operators import OperatorsRecord
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.record import OptimizeRecord
from eagle_lab.studies.scaling import ContextsRecord
from eagle_lab.studies.seed import SeedRecord, published
from eagle_lab.studies.sweep import BASELINE, NODES, SweepRecord
from eagle_lab.verdict import simulate
from eagle_lab.verdict.calibration import CYCLES, CYCLES_HERE, CalibrationRecord
from eagle_lab.verdict.instances import InstancesRecord
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.summary import verdict_of

NOT_CALIBRATED = "Not measured yet: `python -m eagle_lab record calibration`."
EXAMPLE = "compare-cpu-rebuild-vs-incremental"  # the README's one real result
# in the order in which a person meets the questions; which of its charts stands for it
NOTEBOOKS = {
    "explore": 0, "compare": 1, "profile": 5, "optimize": 3, "sweep": 4, "batch": 2, "engines": 0, "correctness": 0,
    "calibrate": 0, "train_draft": 0, "seed": 0, "history": 0,
}  # fmt: skip
DISAGREE = 4 / 3  # two records of one machine whose cycles are further apart than this are said to disagree
PICTURES = Path("docs", "pictures")  # of the notebooks, made by `pictures`
PAGES = ("README.md", "docs/guide.md", "docs/strategies.md", "docs/results.md")
_BLOCK = re.compile(
    r"(?P<head><!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.S
)


class DocsError(ValueError):
    """A page that can't be rendered; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """A record in docs/results.md: its file's name, and what it says as Markdown."""

    name: str
    record: records.Headed
    body: str


def entries(root: Path, kind: type[records.R], section: Callable[[records.R], str]) -> list[Entry]:
    """Every record of a kind below data/results, those of a CPU first."""
    found = records.read_all(root / "data" / "results", kind)[0].items()
    cpu_first = sorted(found, key=lambda item: item[1].environment.gpu is not None)
    return [Entry(path.stem, record, section(record).strip()) for path, record in cpu_first]


def results(root: Path) -> str:
    """docs/results.md: every record of data/results."""
    folder = root / "data" / "results"
    trained, seeds = trainings(folder), records.committed(SeedRecord, folder)
    judged = records.read_all(folder, AcceptanceRecord)[0]
    return render(
        "results.md.j2",
        comparisons=entries(root, ComparisonRecord, page.section),
        profiles=entries(root, ProfileRecord, profile.section),
        ladders=entries(root, OptimizeRecord, ladder.section),
        kernels=entries(root, OperatorsRecord, ladder.kernels),
        contexts=entries(root, ContextsRecord, ladder.contexts),
        instances=entries(root, InstancesRecord, instances_table),
        sweeps=entries(root, SweepRecord, sweep.page),
        engines=[
            Entry(path.stem, record, engines_words(record))
            for path, record in records.read_all(folder, EnginesRecord)[0].items()
        ],
        engines_rows=engines_rows,
        heads=[Entry(path.stem, record, "") for path, record in trained.items()],
        growth=grown(trained.values()),
        beside=[Entry(path.stem, one, "") for path, one in judged.items() if one.beside],
        claims=seed.claims(published(), seeds, folder),
        seeds=seeds,
        redone=seed.redone(seeds),
    )


def picture(root: Path) -> str:
    """The one real result: its chart, its verdict line, and links to its report and record."""
    path = root / "data" / "results" / f"{EXAMPLE}.json"
    record = records.read(path, ComparisonRecord) if path.exists() else None
    there = [end for end in ("svg", "md", "json") if path.with_suffix(f".{end}").exists()]
    told = page.sentence(record, verdict_of(record)) if record else ""
    return render("readme_picture.md.j2", record=record, name=EXAMPLE, there=there, sentence=told)


def answers(root: Path) -> str:
    """A question a row and a model on a machine a column, from the profiles, ladders and sweeps."""
    folder = root / "data" / "results"
    ladders, columns = records.committed(OptimizeRecord, folder), []
    swept = records.read_all(folder, SweepRecord)[0].items()
    for name, record in records.committed(ProfileRecord, folder).items():
        where = machine_key(record.environment)
        here = {path.stem: one for path, one in swept if machine_key(one.environment) == where}
        columns.append({"links": _links(root, name, here), **_column(record, ladders.get(name), here)})
    return render("readme_results.md.j2", columns=columns, study=breakdown, NODES=NODES, BASELINE=BASELINE)


def _links(root: Path, name: str, swept: dict[str, SweepRecord]) -> list[tuple[str, str]]:
    """Kind and file of the records that a column rests on."""
    files = [
        ("profile", f"profile-{name}"),
        ("ladder", f"optimize-{name}"),
        *(("sweep", one) for one in swept),
    ]
    folder = Path("data", "results")
    return [
        (kind, path.as_posix()) for kind, file in files if (root / (path := folder / f"{file}.json")).exists()
    ]


def _column(
    record: ProfileRecord, optimized: OptimizeRecord | None, swept: dict[str, SweepRecord]
) -> dict[str, Any]:
    ratios = {
        name: r
        for s in swept.values()
        for name in s.settings.builders
        if (r := sweep_summary.ratio(s, name, NODES))
    }
    again, sizes = (optimized.against_plain, optimized.tree_sizes) if optimized else ([], [])
    climbed = optimized.ladder if optimized else None
    same = climbed.rung(record.settings.strategy) if climbed else None
    cycles = (breakdown.cycle_seconds(record), same.cycle_s) if same and same.cycle_s else (1.0, 1.0)
    builder = min(ratios, key=lambda name: ratios[name][1], default=None)
    return {
        "record": record,
        "optimized": optimized,
        "crossing": scaling.crossing(optimized.batches) if optimized else None,
        "plain": again[0] if again else fastest_tree(sizes),
        "apart": cycles if max(cycles) > DISAGREE * min(cycles) else None,
        "builder": builder,
        "faster": 1 / ratios[builder][1] if builder else None,
    }


def notebooks(root: Path) -> str:
    """All notebooks with a picture, question and time, three in a row; DocsError where `NOTEBOOKS` names others."""
    paths = {path.stem: path for path in (root / "notebooks").glob("*.ipynb")}
    if unlike := set(paths) ^ set(NOTEBOOKS):
        raise DocsError(f"report/readme.py's NOTEBOOKS and notebooks/ differ: {', '.join(sorted(unlike))}.")
    facts = [notebook_facts(paths[name]) | {"name": name} for name in NOTEBOOKS]
    return render("readme_notebooks.md.j2", facts=facts, pictures=PICTURES.as_posix())


def notebook_facts(path: Path) -> dict[str, str]:
    """Question and time of a notebook, from its metadata; DocsError where they aren't there."""
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("eagle_lab", {})
    if set(metadata) != {"question", "time"}:
        raise DocsError(f"{path.name} must have metadata.eagle_lab with its question and its time.")
    return metadata


def pictures(root: Path = ROOT) -> list[Path]:
    """Draw each notebook's picture anew from its own committed chart; → the files, small PNGs.

    Raises DocsError where no browser can draw, or a notebook has no such chart.
    """
    made = []
    for name, number in NOTEBOOKS.items():
        cells = json.loads((root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        charts = [data[PLOTLY] for data in outputs if PLOTLY in data]
        if number >= len(charts):
            raise DocsError(f"{name}.ipynb has {len(charts)} charts; its picture is of number {number + 1}.")
        drawn = thumbnail(charts[number])
        if drawn is None:
            raise DocsError("no Chromium or Chrome is here to draw pictures with.")
        made.append(root / PICTURES / f"{name}.png")
        made[-1].parent.mkdir(exist_ok=True)
        made[-1].write_bytes(drawn)
    return made


@cache
def simulated() -> str:
    """How often each design errs, simulated anew at the default seed: a few seconds."""
    keys = ("coverage", "false_verdicts", "told_1", "power_2")
    ours = (CYCLES_HERE.name, CYCLES.name)
    return table(
        [
            {"design and analysis": f"**{row['design']}**" if row["design"] in ours else row["design"]}
            | {calibration.METRICS[k]: calibration.rate(row, k) for k in keys}
            for row in simulate.tabulate()
        ]
    )


def calibrated(root: Path) -> str:
    """What short runs with planted delays found on each machine, beside the same design simulated."""
    found = entries(root, CalibrationRecord, calibration.of_runs)
    return "\n\n".join(entry.body for entry in found) or NOT_CALIBRATED


BLOCKS: dict[str, Callable[[Path], str]] = {
    "picture": picture,
    "notebooks": notebooks,
    "results": answers,
    "axes": lambda _: render("axes.md.j2", axes=AXES),
    "simulated": lambda _: simulated(),
    "calibrated": calibrated,
}


def rendered(name: str, root: Path = ROOT) -> str:
    """The text that a page, such as "README.md", should have.

    Raises DocsError for an unknown block or one without an end, OSError for a page that can't be read.
    """
    up = "../" * name.count("/")  # links are written as from the README

    def near(text: str) -> str:
        return re.sub(r"\]\((?=data/|notebooks/|docs/)", f"]({up}", text)

    if name == "docs/results.md":
        return near(results(root))
    text = (root / name).read_text(encoding="utf-8")
    if text.count("<!-- generated: ") != len(_BLOCK.findall(text)):
        raise DocsError(f"{name} has a block that never ends; close each with <!-- end -->.")

    def one(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise DocsError(f"{name}'s block {match['name']!r} is unknown; known: {', '.join(BLOCKS)}.")
        return f"{match['head']}{near(BLOCKS[match['name']](root)).strip()}\n{match['end']}"

    return _BLOCK.sub(one, text)


def stale(root: Path = ROOT) -> dict[str, str]:
    """The pages that aren't what the records render, each with the text that it should have."""
    made = {name: rendered(name, root) for name in PAGES}
    return {name: text for name, text in made.items() if text != (root / name).read_text(encoding="utf-8")}
