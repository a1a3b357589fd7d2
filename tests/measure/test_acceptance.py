"""Acceptance: what is counted, and that a tree's size and the way to decode are only that."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from eagle_lab.__main__ import app
from eagle_lab.decode.generate import Cycle
from eagle_lab.measure.acceptance import (
    Acceptance,
    AcceptanceRecord,
    AcceptanceSettings,
    acceptance,
    by_depth,
    committed_lengths,
    difference,
    tau,
)
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


def of_counts(lengths, **changes):
    """An acceptance whose numbers follow from counts by prompt."""
    counts = np.array(list(lengths.values()))
    cycles, tokens = counts.sum(1), counts @ np.arange(1, counts.shape[1] + 1)
    known = {"max_new_tokens": 8, "top_k": 4, "depth": 3, "total_tokens": 7, "strategy": "rebuild", **changes}
    whole = tokens.sum() / cycles.sum()
    own = dict(zip(lengths, (tokens / cycles).tolist(), strict=True))
    return Acceptance(
        settings=AcceptanceSettings(**known, prompts=len(lengths)), tau=whole, cycles=cycles.sum(), by_category={},
        by_depth=[], by_prompt=own, by_tree_size={}, lengths=lengths,
    )  # fmt: skip


def drawn(seed, prompts=40, better=0.0):
    """Counts of prompts that differ in how hard they are; a better head moves all of them."""
    draw = np.random.default_rng(seed)
    hard = draw.uniform(0.3, 0.7, prompts)
    rows = draw.multinomial(30, np.stack([hard - better, 0.8 - hard + better, np.full(prompts, 0.2)], 1))
    return {f"p{n}": row.tolist() for n, row in enumerate(rows)}


def bootstrap(one, other=None, times=4000):
    """The percentile interval of τ, or of a difference, over resampled prompts."""
    draw = np.random.default_rng(0)
    tables = [np.array(list(x.values())) for x in (one, other) if x is not None]
    found = []
    for _ in range(times):
        at = draw.integers(0, len(tables[0]), len(tables[0]))
        taus = [(t[at].sum(0) @ np.arange(1, t.shape[1] + 1)) / t[at].sum() for t in tables]
        found.append(taus[0] - (taus[1] if other is not None else 0))
    return np.percentile(found, [2.5, 97.5])


def test_the_intervals_are_those_of_resampled_prompts():
    one, other = drawn(1), drawn(2, better=0.1)
    found = of_counts(one).interval
    assert [found.low, found.high] == pytest.approx(bootstrap(one), abs=0.01) and found.prompts == 40
    gap = difference(of_counts(one), of_counts(other)).tau
    assert [gap.low, gap.high] == pytest.approx(bootstrap(one, other), abs=0.015)
    assert gap.value == pytest.approx(of_counts(one).tau - of_counts(other).tau, abs=1e-4)
    with_itself = difference(of_counts(one), of_counts(one)).tau
    assert (with_itself.value, with_itself.low, with_itself.high) == (0, 0, 0), (
        "pairing takes the prompts out"
    )


def test_the_order_of_prompts_does_not_matter():
    one, other = drawn(1), drawn(2)
    turned = dict(reversed(list(other.items())))
    assert difference(of_counts(one), of_counts(turned)) == difference(of_counts(one), of_counts(other))


def test_one_prompt_has_no_interval():
    assert of_counts({"a": [1, 2, 3]}).interval is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (of_counts({"a": [1, 2], "b": [2, 2]}, max_new_tokens=9), "different max_new_tokens"),
        (of_counts({"a": [1, 2], "c": [2, 2]}), "different prompts"),
        (of_counts({"a": [1, 2], "b": [2, 2]}).model_copy(update={"lengths": None}), "no counts by prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_paired_is_refused(other, words):
    with pytest.raises(ValueError, match=words):
        difference(of_counts({"a": [1, 2], "b": [2, 2]}), other)


def test_the_words_of_the_field():
    found = of_counts({"a": [1, 0, 3], "b": [2, 2, 0]}).model_copy(
        update={"by_depth": by_depth(CYCLES, 2), "cycles": 3}
    )
    assert found.tau == 16 / 8 and found.mean_over_requests == (10 / 4 + 6 / 4) / 2
    assert found.draft_acceptance_rate == 1 / 7
    assert found.acceptance_by_position == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-4)


def test_the_command_compares_two_heads_and_writes_a_record(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_lab.models.pair.load", lambda *_: tiny_pair)
    monkeypatch.setattr("eagle_lab.measure.acceptance.prepare", lambda *_: as_prompts())
    words = ["acceptance", "--max-new-tokens", "8", "--sizes", "7", "--out", str(tmp_path / "a.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    record = read(tmp_path / "a.json", AcceptanceRecord)
    assert f"τ = {record.acceptance.tau:.3f} [" in done.stdout and record.beside is None
    done = CliRunner().invoke(app, [*words, "--beside", "itself"])
    assert done.exit_code == 0, done.output
    record = read(tmp_path / "a.json", AcceptanceRecord)
    assert record.beside.acceptance == record.acceptance and record.beside.difference.tau.high == 0
    assert "+0.000 [0.000, 0.000] of τ, paired over 2 prompts" in done.stdout


def as_prompts():
    from eagle_lab.models.prompts import prepare

    return prepare(None, PROMPTS)
