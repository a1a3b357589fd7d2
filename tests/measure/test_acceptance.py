"""Acceptance: what is counted, and that a tree's size and the way to decode are only that."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from eagle_lab.__main__ import app
from eagle_lab.decode.generate import Cycle
from eagle_lab.measure.acceptance import AcceptanceRecord, acceptance, by_depth, committed_lengths, tau
from eagle_lab.measure.records import read

CYCLES = [Cycle(0, (1, 2, 3), 4), Cycle(3, (4,), 5), Cycle(4, (5, 6), 7)]
PROMPTS = [[1, 124, 306, 281, 69, 192, 471, 312], [1, 7, 9]]


def test_counts():
    assert tau(CYCLES) == 2.0
    assert [(d.reached, d.accepted) for d in by_depth(CYCLES, 2)] == [
        (3, round(2 / 3, 4)),
        (2, 0.5),
        (1, 0.0),
    ]
    assert committed_lengths(CYCLES, 4) == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="at least one cycle"):
        tau([])


def test_every_number_follows_from_the_cycles(tiny_pair):
    found = acceptance(tiny_pair, PROMPTS, 30, top_k=4, depth=3, sizes=(16, 7), progress=False)
    counts = [sum(column) for column in zip(*found.lengths.values(), strict=True)]
    assert sum(counts) == found.cycles
    assert found.tau == round(sum(n * c for n, c in enumerate(counts, 1)) / found.cycles, 4)
    assert found.by_depth[0].reached == found.cycles and found.by_depth[1].reached == found.cycles - counts[0]
    assert found.by_tree_size[16] == found.tau == found.by_category["own"] and found.tau > 1
    other = acceptance(
        tiny_pair, PROMPTS, 30, top_k=4, depth=3, sizes=(16, 7), strategy="doubling", progress=False
    )
    assert other.model_copy(update={"settings": found.settings}) == found
    with pytest.raises(ValueError, match="sizes is empty"):
        acceptance(tiny_pair, PROMPTS, 30, sizes=())


def test_the_command_writes_a_record(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_lab.models.pair.load", lambda *_: tiny_pair)
    monkeypatch.setattr("eagle_lab.measure.acceptance.prepare", lambda *_: as_prompts())
    done = CliRunner().invoke(
        app, ["acceptance", "--max-new-tokens", "8", "--sizes", "7", "--out", str(tmp_path / "a.json")]
    )
    assert done.exit_code == 0, done.output
    record = read(tmp_path / "a.json", AcceptanceRecord)
    assert f"τ = {record.acceptance.tau:.3f}" in done.stdout


def as_prompts():
    from eagle_lab.models.prompts import prepare

    return prepare(None, PROMPTS)
