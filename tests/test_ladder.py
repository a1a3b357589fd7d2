"""The ladder, the tree sizes and the batch sweep on the tiny pair, and the sentences made from them."""

from __future__ import annotations

import re
from itertools import islice

import pytest
import torch

from eagle_lab import ladder, throughput
from eagle_lab.launching import eager_forwards
from eagle_lab.machine_records import get_prompts
from eagle_lab.optimize_records import (
    batch_sentence,
    batch_table,
    ladder_sentence,
    ladder_table,
    sizes_sentence,
)
from eagle_lab.profile import profile_prompts
from eagle_lab.prompts import load_prompts
from eagle_lab.strategy import parse


@pytest.fixture(scope="module")
def prompts(tiny_pair):
    """Three prompts of random ids, as the tiny pair has no tokenizer."""
    return profile_prompts(tiny_pair, get_prompts(tiny_pair, 3))


def test_each_rung_changes_one_axis_or_is_listed_beside_one_that_it_refines():
    """One change at a time, from the official ways to one graph."""
    axes = ("mask", "runtime", "cache", "attention")
    plans = [parse(strategy) for _, strategy in ladder.RUNGS]
    for one, other in zip(plans[:6], plans[1:6], strict=False):
        assert sum(getattr(one, axis) != getattr(other, axis) for axis in axes) == 1
    for later in plans[6:]:  # the last joins the two before it
        near = [sum(getattr(one, axis) != getattr(later, axis) for axis in axes) for one in plans[5:]]
        assert near.count(1) >= 1


def test_what_cannot_run_is_listed_with_its_reason(tiny_pair):
    can, cannot = ladder.available(tiny_pair)
    assert [strategy for _, strategy in can] == [strategy for _, strategy in ladder.RUNGS[:5]]
    assert set(cannot) == {ladder.COMPILED[1], *(strategy for _, strategy in ladder.RUNGS[5:])}
    assert all("CUDA" in reason for strategy, reason in cannot.items() if "cuda_graph" in strategy)


def test_a_climb_of_the_tiny_pair(tiny_pair, prompts, tmp_path):
    found = ladder.climb(
        tiny_pair,
        prompts,
        top_k=3,
        depth=2,
        total_tokens=6,
        max_new_tokens=4,
        iterations=2,
        results_dir=tmp_path,
    )
    assert [rung["strategy"] for rung in found["rungs"]] == [s for _, s in ladder.available(tiny_pair)[0]]
    strategies = {rung["strategy"]: rung for rung in found["rungs"]}
    for rung in found["rungs"][1:]:
        assert rung["against_plain"] == "identical" and rung["pairs_parted"] == 0 and rung["pairs"] == 2
        assert rung["against"] in strategies and rung["verdict"]["decision"] and rung["cycle_s"] > 0
    assert found["best"] in strategies and not found["disagreed"]
    table = ladder_table(found)
    assert len(table) == len(found["rungs"]) + len(found["unavailable"])
    assert ladder_sentence(found)


def verdict(estimate, low, high):
    """A verdict's JSON values with the numbers that matter here."""
    return {
        "decision": "ADOPT", "estimate": estimate, "low": low, "high": high, "equivalence": [low, high], "method": "",
        "pairs": 9, "forks": 1, "delta": 0.01, "alpha": 0.05, "provisional": True, "reasons": [],
    }  # fmt: skip


def test_shares_are_of_log_time_among_the_changes_that_helped():
    estimates = [None, 0.5, 1.2, 0.25]
    rungs = [{"verdict": e and verdict(e, e, e)} for e in estimates]
    assert ladder.shares(rungs) == [None, pytest.approx(1 / 3), None, pytest.approx(2 / 3)]
    dropped = [{"verdict": None}, {"verdict": verdict(None, 0, None)}]
    assert ladder.shares(dropped) == [None, None]
    assert "every pair was dropped" in ladder_sentence({"rungs": dropped, "verdict": None})
    slower = {
        "rungs": [{"verdict": None, "strategy": "first"}, {"verdict": verdict(1.2, 1.1, 1.3)}],
        "verdict": None,
    }
    assert ladder_sentence(slower) == "No change was measured to be faster than first."
    cut_off = slower | {"best": "second"}
    assert "not compared with the first yet" in ladder_sentence(cut_off)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.8, 0.7, 0.9), "it pays"),
        ((1.3, 1.2, 1.4), "no tree of these sizes pays"),
        ((0.99, 0.9, 1.1), "not shown to pay"),
    ],
)
def test_the_size_that_pays_is_named_only_where_it_is_shown(numbers, words):
    rows = [
        {"total_tokens": 7, "acceptance_length": 2.0, "verdict": verdict(*numbers)},
        {"total_tokens": 63, "acceptance_length": 3.0, "verdict": verdict(2.0, 1.9, 2.1)},
    ]
    assert words in sizes_sentence(rows) and "7 draft nodes" in sizes_sentence(rows)


def test_tree_sizes_of_the_tiny_pair(tiny_pair, prompts):
    found = ladder.tree_sizes(tiny_pair, prompts, sizes=(3, 7), max_new_tokens=4, iterations=2)
    assert [row["total_tokens"] for row in found] == [3, 7]
    assert all(len(row["seconds"]) == 2 and row["acceptance_length"] >= 1 for row in found)
    with pytest.raises(ValueError, match="tree size 5 has no shape; known: 3, 7, 15, 31, 63"):
        ladder.tree_sizes(tiny_pair, prompts, sizes=(5,))


def test_a_sweep_of_batches(tiny_pair, prompts):
    shape = {"top_k": 3, "depth": 2, "total_tokens": 6}
    found = throughput.sweep(tiny_pair, prompts, batches=(1, 2), max_new_tokens=4, repeats=2, **shape)
    assert [row["new_tokens"] for row in found] == [[4, 4], [8, 8]]
    assert batch_table(found).shape[0] == 2
    assert throughput.rows_equal_alone(tiny_pair, prompts, 6, "doubling", shape) == [True] * 3
    with pytest.raises(ValueError, match="batch size 0 must be a whole number"):
        throughput.sweep(tiny_pair, prompts, batches=(0,))


@pytest.mark.parametrize(
    ("highs", "at", "words"),
    [([0.8, 0.9, 0.95], None, "at every batch size"), ([0.8, 1.1, 1.2], 2, "batch of \\*\\*2\\*\\*"),
     ([1.1, 0.9, 1.2], 4, "\\*\\*4\\*\\*"), ([None, 1.1, 1.2], 1, "not measured to be faster at any")],
)  # fmt: skip
def test_where_speculation_stops_paying(highs, at, words):
    rows = [{"batch": b, "ratio": [0.1, 0.5, high]} for b, high in zip((1, 2, 4), highs, strict=True)]
    assert throughput.crossing(rows) == at
    assert re.search(words, batch_sentence(rows))


def test_a_rung_that_fails_is_named_and_the_ladder_goes_on(tiny_pair, prompts, tmp_path, monkeypatch):
    real, kept = ladder.compare, []

    def fails(pair, **options):
        if options["candidate"] == "doubling":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return real(pair, **options)

    monkeypatch.setattr(ladder, "compare", fails)
    sizes = {"top_k": 3, "depth": 2, "total_tokens": 6, "max_new_tokens": 4, "iterations": 2}
    found = ladder.climb(tiny_pair, prompts, **sizes, stated=2.5, keep=lambda f: kept.append(len(f["rungs"])))
    assert found["failed"] == {"doubling": "OutOfMemoryError: CUDA out of memory"} and kept == [1, 2, 3, 4]
    assert "CUDA out of memory" in ladder_table(found).to_string()
    first = found["rungs"][0]
    assert first["acceptance_length"] == 2.5 and len(first["cycles_s"]) >= 1
    assert first["tokens_per_s"] == pytest.approx(
        2.5 * len(first["cycles_s"]) / sum(first["cycles_s"]), rel=1e-3
    )
    assert "tokens/s at a stated τ of 2.5" in ladder_table(found).columns


def test_with_a_stated_acceptance_only_so_many_cycles_are_decoded(tiny_pair, prompts, monkeypatch):
    taken = []
    real = ladder.stream

    def counted(*args, **options):
        for cycle in real(*args, **options):
            taken.append(1)
            yield cycle

    monkeypatch.setattr(ladder, "stream", counted)
    (row,) = ladder.tree_sizes(tiny_pair, prompts, sizes=(3,), max_new_tokens=6, iterations=2, stated=3.0)
    assert len(taken) == 3 * 2 and row["stated"] and row["acceptance_length"] == 3  # a warm-up and two pairs
    grown = throughput.sweep(
        tiny_pair,
        prompts,
        batches=(1,),
        max_new_tokens=6,
        repeats=2,
        stated=3.0,
        top_k=3,
        depth=2,
        total_tokens=6,
    )
    assert grown[0]["stated"] and grown[0]["new_tokens"] == [6, 6]
    assert "stated and not measured" in batch_sentence(grown) and "(stated)" in batch_table(grown).to_string()


def test_what_has_no_measurement_says_so():
    assert "not measured yet" in batch_sentence([])
    assert "could be judged" in sizes_sentence([])
    assert ladder.uncompiled("doubling,runtime=compile+cuda_graph") == "doubling,runtime=cuda_graph"


def test_the_eager_forward_is_the_targets_own(tiny_pair):
    before = tiny_pair.target.config._attn_implementation
    took = list(islice(eager_forwards(tiny_pair, rows=8), 3))
    assert len(took) == 3 and min(took) > 0
    assert tiny_pair.target.config._attn_implementation == before


def test_cycles_and_forwards_are_timed_in_turn(tiny_pair, monkeypatch):
    """As many of each, over as many prompts as it takes; the first rung's cycles."""
    used = []
    real = ladder.stream
    monkeypatch.setattr(ladder, "stream", lambda *a, **k: used.append(k["strategy"]) or real(*a, **k))
    prompts = profile_prompts(tiny_pair, load_prompts("heldout")[:2])
    own, attentions = tiny_pair.target.config._attn_implementation, []
    forward = type(tiny_pair.target).forward

    def spy(self, *args, **options):
        if options["past_key_values"].__class__.__name__ == "StaticCache":
            attentions.append(self.config._attn_implementation)
        return forward(self, *args, **options)

    monkeypatch.setattr(type(tiny_pair.target), "forward", spy)
    found = ladder.beside_forwards(tiny_pair, prompts, 3, top_k=2, depth=2, total_tokens=4)
    assert len(found["cycle_s"]) == len(found["forward_s"]) == 3 and min(*found["cycle_s"]) > 0
    assert set(used) == {ladder.RUNGS[0][1]}
    # the forwards are the target's own, whatever attention the cycles between them use
    assert set(attentions) == {own} and tiny_pair.target.config._attn_implementation == "eager"
    tiny_pair.target.set_attn_implementation(own)
    few = ladder.beside_forwards(tiny_pair, [], 3)
    assert few == {"cycle_s": [], "forward_s": []}
