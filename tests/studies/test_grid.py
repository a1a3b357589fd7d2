"""Grids: cells, holes, and an interrupted one that goes on where it stopped."""

from __future__ import annotations

from importlib import import_module

import pytest

from eagle_lab.measure.cluster import ClusterFailed
from eagle_lab.measure.records import read
from eagle_lab.report.words import render
from eagle_lab.studies.grid import Grid, GridRecord, cells_of, read_grid, run_grid
from eagle_lab.verdict.record import ComparisonRecord, Resumed
from eagle_lab.verdict.stats import Decision

compared = import_module("eagle_lab.verdict.compare")
YAML = """
name: tiny
arms: [doubling, "attention=tree_fused"]
trees: [{top_k: 4, depth: 3, total_tokens: 16}, {top_k: 2, depth: 3, total_tokens: 8}]
prompts: [chat]
iterations: 2
forks: 1
max_new_tokens: 8
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.yaml").write_text(YAML)
    return read_grid(tmp_path / "grid.yaml")


@pytest.fixture(autouse=True)
def own_prompts(monkeypatch):
    """The golden target has no tokenizer: every set of prompts is this one."""
    from eagle_lab.models.prompts import Prompt

    mine = [Prompt("a", "own", "", (1, 124, 306, 281)), Prompt("b", "own", "", (1, 245, 323))]
    monkeypatch.setattr(compared, "ready", lambda *_: mine)


def test_a_grid_goes_on_where_it_stopped_and_marks_its_holes(tiny_pair, grid, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    taken = []

    def cut(cell):
        taken.append(cell)
        raise Cut

    with pytest.raises(Cut):
        run_grid(grid, tmp_path, pair=tiny_pair, on_cell=cut)
    # the second cell is cut in its middle
    real, calls = compared.append, []

    def once(record, path, field, item):
        real(record, path, field, item)
        calls.append(field)
        if calls == ["instances"]:
            raise Cut

    monkeypatch.setattr(compared, "append", once)
    with pytest.raises(Cut):
        run_grid(grid, tmp_path, pair=tiny_pair)
    later = []
    found = run_grid(grid, tmp_path, pair=tiny_pair, on_cell=later.append)
    assert found == read(tmp_path / "grid-tiny.json", GridRecord)
    assert [(c.arm, c.tree, c.prompts) for c in found.cells] == cells_of(grid) and len(found.cells) == 4
    assert found.cells[0] == taken[0] and later == found.cells[1:], "the finished cell is not taken again"
    records = [read(tmp_path / c.record, ComparisonRecord) for c in found.cells[:2]]
    assert [r.settings.total_tokens for r in records] == [16, 8]
    assert not records[0].events and [type(e) for e in records[1].events] == [Resumed]
    assert all(
        len(r.instances) == 2 and r.verdict == c.verdict for r, c in zip(records, found.cells, strict=False)
    )
    for hole in found.cells[2:]:
        assert hole.verdict is None and hole.record is None and "tree_fused" in hole.missing
    table = render("grid.md.j2", grid=found, count=4)
    # two instances of a tiny pair end as chance has it
    assert sum(map(table.count, Decision)) == 2 and table.count("none: ") == 2
    assert all(c.verdict.decision in table for c in found.cells[:2])
    with pytest.raises(ValueError, match="other settings"):
        run_grid(grid.model_copy(update={"seed": 1}), tmp_path, pair=tiny_pair)


def test_a_cluster_that_fails_is_no_hole(tiny_pair, grid, tmp_path, monkeypatch):
    def fail(*_, **options):
        raise ClusterFailed(options["cluster"])

    monkeypatch.setattr(import_module("eagle_lab.studies.grid"), "compare", fail)
    with pytest.raises(ClusterFailed, match="here:1"):
        run_grid(grid, tmp_path, pair=tiny_pair, cluster="here:1")
    assert not (tmp_path / "grid-tiny.json").exists()


def test_a_file_that_is_no_grid_is_one_sentence(tmp_path):
    for text, said in (
        (": :", "is not YAML"),
        ("name: a", "arms"),
        (YAML + "depht: 3", "depht"),
        ("3", "grid.yaml"),
    ):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_grid(tmp_path / "grid.yaml")
    assert Grid(name="a", arms=("doubling",)).trees[0].total_tokens == 63
