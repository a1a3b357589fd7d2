"""A grid of comparisons: arms x trees x sets of prompts against one baseline, declared in YAML or as a `Grid`.

A cell is a comparison with a record of its own. A cell that can't be compared is a hole that says why. The grid's record
is written after each cell, and the same grid started again goes on where it stopped, inside a cell too.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.measure.records import Part, Record, check_folder, made, read, write
from eagle_lab.models.pair import Pair, load
from eagle_lab.runtime.checks import flat, sentence
from eagle_lab.train.tries import Tries
from eagle_lab.verdict.agreement import ArmsDisagree
from eagle_lab.verdict.compare import NothingMeasured, compare
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.settings import Count, Number
from eagle_lab.verdict.stats import Verdict


class Tree(Part):
    """Sizes of a draft tree. One that can't be, which `decode.tree.TreeShape` refuses, is a hole and no error of the file."""

    top_k: Count = 10
    depth: Count = 7
    total_tokens: Count = 63


class Grid(Part):
    """What is compared: each of `arms` with each of `trees` and `prompts`, against `baseline`. The rest as for `compare`.

    name: of its record, grid-NAME.json; arms: as in `engines.arm`; both arms of a cell have its tree, unless they name
    another.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    target: str | None = None
    draft: str | None = None
    device: str | None = None
    dtype: str | None = None
    baseline: str = "rebuild"
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    trees: Annotated[tuple[Tree, ...], Field(min_length=1)] = (Tree(),)
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("heldout",)
    iterations: Count | None = None
    minutes: Number | None = None
    forks: Count | None = None
    max_new_tokens: Count = 50
    delta: Number = 0.01
    seed: int = 0


class GridCell(Part):
    """One comparison. record: its file, relative to the grid's; verdict: None for a hole, and `missing` says why."""

    arm: str
    tree: Tree
    prompts: str
    record: str | None = None
    verdict: Verdict | None = None
    missing: str | None = None


class GridRecord(Record):
    """A grid's cells in the order in which they are declared, as far as it came."""

    schema_name: Literal["eagle_lab.grid.v1"] = Field("eagle_lab.grid.v1", alias="schema")
    settings: Grid
    cells: list[GridCell] = []


def read_grid(path: str | Path) -> Grid | Tries:
    """A grid from YAML, of trainings where it names `tries`; ValueError, one sentence, where the file is none."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        kind = Tries if isinstance(found, dict) and "tries" in found else Grid
        return kind.model_validate(found)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {flat(error)}.") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {sentence(error)}") from None


def run_grid(
    grid: Grid,
    folder: str | Path,
    *,
    pair: Pair | None = None,
    cluster: str | None = None,
    on_cell: Callable[[GridCell], object] | None = None,
) -> GridRecord:
    """Compare cell after cell; with a cluster each cell's processes are tasks of Ray (`verdict.compare`).

    Args: folder: gets the grid's record and, in grid-NAME/, the cells'; pair: loaded by the grid's names where None; on_cell:
    told of each cell as it is done. Raises ValueError where the folder has a grid of that name with other settings, and
    ClusterFailed as `compare` does: the grid is interrupted then, no hole.
    """
    path = check_folder(folder) / f"grid-{grid.name}.json"
    record = read(path, GridRecord) if path.exists() else None
    if record is not None and record.settings != grid:
        raise ValueError(f"{path} was begun with other settings; name the grid otherwise, or move it away.")
    pair = pair or load(grid.target, grid.draft, grid.device, grid.dtype)
    if record is None:
        record = GridRecord(**made(str(pair.device)), settings=grid)
    cells = {(cell.arm, cell.tree, cell.prompts): cell for cell in record.cells}
    places = cells_of(grid)
    for number, place in enumerate(places):
        if (known := cells.get(place)) is not None and known.verdict is not None:
            continue  # a hole is tried again
        arm, tree, prompts = place
        cells[place] = _cell(pair, grid, GridCell(arm=arm, tree=tree, prompts=prompts), path, number, cluster)
        record.cells = [cells[one] for one in places if one in cells]
        write(record, path)
        if on_cell is not None:
            on_cell(cells[place])
    return record


def cells_of(grid: Grid) -> list[tuple[str, Tree, str]]:
    """(arm, tree, prompts) of each cell, each once."""
    return list(dict.fromkeys(product(grid.arms, grid.trees, grid.prompts)))


def _cell(pair: Pair, grid: Grid, cell: GridCell, path: Path, number: int, cluster: str | None) -> GridCell:
    place = path.with_suffix("") / f"{number:03}"
    place.mkdir(parents=True, exist_ok=True)
    begun = max(place.glob("comparison-*.json"), default=None)
    options = grid.model_dump(
        include={"baseline", "iterations", "minutes", "forks", "max_new_tokens", "delta", "seed"}
    )
    try:
        if begun is not None and (record := read(begun, ComparisonRecord)).verdict is not None:
            found, verdict = begun, record.verdict
        else:
            done = compare(
                pair, candidate=cell.arm, prompts=cell.prompts, **cell.tree.model_dump(), **options, cluster=cluster,
                resume=begun, results_dir=place,
            )  # fmt: skip
            found, verdict = done.path, done.verdict
    except (ValueError, ArmsDisagree, EngineFailed, NothingMeasured) as error:
        return cell.model_copy(update={"missing": flat(error)})
    return cell.model_copy(update={"record": str(found.relative_to(path.parent)), "verdict": verdict})
