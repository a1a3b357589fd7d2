"""The ladder, the tree sizes and the batch sweep on the tiny pair, and the sentences made from them."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from make import verdict

from eagle_lab.decode.strategy import Decoding
from eagle_lab.models.prompts import load_prompts
from eagle_lab.report.charts import ladder as charts_optimize
from eagle_lab.studies import batches as throughput
from eagle_lab.studies import ladder
from eagle_lab.studies.launching import eager_forwards
from eagle_lab.studies.machine_records import get_prompts
from eagle_lab.studies.optimize_bars import acceptance
from eagle_lab.studies.optimize_records import (
    batch_sentence,
    batch_table,
    ladder_sentence,
    ladder_table,
    sizes_sentence,
)
from eagle_lab.studies.profile import profile_prompts
from eagle_lab.verdict.agreement import ArmsDisagree


@pytest.fixture(scope="module")
def prompts(tiny_pair):
    """Three prompts of random ids, as the tiny pair has no tokenizer."""
    return profile_prompts(tiny_pair, get_prompts(tiny_pair, 3))


def test_each_rung_changes_one_axis():
    """One change at a time, from the official ways to one graph; also where the cycle compiled whole is among them."""
    with_compiled = [*ladder.RUNGS[:5], ladder.COMPILED, *ladder.RUNGS[5:]]
    for rungs in (ladder.RUNGS, with_compiled):
        for (_, one), (_, other) in pairwise(rungs):
            assert len(ladder.changed({"against": one, "strategy": other})) == 1
    assert ladder.changed({"against": "rebuild", "strategy": "doubling,tree"}) == ["mask", "attention"]
    assert ladder.changed({"against": None, "strategy": "rebuild"}) == []


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
    below = found["rungs"][0]["strategy"]
    for rung in found["rungs"][1:]:
        assert rung["against_plain"] == "identical" and rung["pairs_parted"] == 0 and rung["pairs"] == 2
        assert rung["against"] == below and rung["verdict"]["decision"] and rung["cycle_s"] > 0
        if rung["verdict"][
            "estimate"
        ]:  # else other processes kept the machine so busy that its pairs were dropped
            below = rung["strategy"]
    assert found["best"] in strategies and not found["disagreed"]
    assert found["rungs"][0]["against_plain"] == "identical"
    table = ladder_table({"ladder": found})
    assert len(table) == len(found["rungs"]) + len(found["unavailable"])
    assert ladder_sentence(found)


def test_cycles_in_turn_are_the_ladders_and_give_one_acceptance_for_all_rungs(
    tiny_pair, prompts, tmp_path, monkeypatch
):
    """Near ties give rungs other texts, so a τ of each would differ for nothing."""
    sizes = {"top_k": 3, "depth": 2, "total_tokens": 6, "max_new_tokens": 24, "iterations": 2}
    real = ladder.in_turn

    def odd(*args, **options):
        found = real(*args, **options)
        first, *others = found.values()
        return dict(zip(found, [[(took, 3) for took, _ in first], *others], strict=True))

    monkeypatch.setattr(ladder, "in_turn", odd)
    found = ladder.climb(tiny_pair, prompts, **sizes, results_dir=tmp_path)
    assert found["in_turn"] and {len(rung["cycles_s"]) for rung in found["rungs"]} == {24}
    # of random ids the tiny head gets nothing accepted: 1 in all rungs but the first
    tau = found["acceptance_length"]
    assert tau == pytest.approx(1 + 2 / len(found["rungs"]))
    column = ladder_table({"ladder": found})[f"tokens/s at τ {tau:.2f}"]
    measured = [c for c in column if c != "–"]
    assert measured == [f"{tau / rung['cycle_s']:.1f}" for rung in found["rungs"]]
    few = ladder.climb(tiny_pair, prompts[:1], **sizes | {"max_new_tokens": 5}, results_dir=tmp_path)
    assert not few["in_turn"] and few["acceptance_length"] is None


def test_the_acceptance_is_that_of_most_prompts():
    """Of the ladder's own tree, where it was set against plain decoding."""
    row = {"total_tokens": 63, "acceptance_length": 3.6}
    found = {
        "ladder": {"acceptance_length": 1.9},
        "tree_sizes": [row | {"total_tokens": 7, "acceptance_length": 2.5}],
    }
    assert acceptance(found) == 1.9 and acceptance({"ladder": {}}) is None
    found["tree_sizes"].append(row | {"acceptance_length": 3.2})
    assert acceptance(found) == 3.2
    assert acceptance(found | {"against_plain": [row]}) == 3.6
    assert acceptance({"ladder": {"stated_acceptance": 3.0}, "tree_sizes": [row]}) == 3.0


def test_an_error_at_the_end_keeps_what_was_judged(tiny_pair, prompts, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ladder, "in_turn", fails)
    kept = []
    sizes = {"top_k": 3, "depth": 2, "total_tokens": 6, "max_new_tokens": 4, "iterations": 2}
    found = ladder.climb(
        tiny_pair, prompts, **sizes, keep=lambda f: kept.append(f["verdict"]), results_dir=tmp_path
    )
    assert (
        found["failed"] == {"cycles in turn": "OutOfMemoryError: CUDA out of memory"} and not found["in_turn"]
    )
    assert len(kept) == len(found["rungs"]) + 1 and kept[-1] == found["verdict"]


def test_what_is_held_against_plain_decoding_is_told_in_words(tiny_pair, prompts, monkeypatch):
    sizes = {"top_k": 3, "depth": 2, "total_tokens": 6}
    strategies = ["rebuild", "doubling", "runtime=cuda_graph,doubling"]
    told = ladder.against_plain(tiny_pair, prompts[0], strategies, 6, sizes)
    assert [told[s] for s in strategies[:2]] == ["identical"] * 2 and "needs a CUDA GPU" in told[
        strategies[2]
    ]
    real = ladder.generate

    def odd(*args, **options):
        done = real(*args, **options)
        return replace(done, tokens=[*done.tokens[:2], 7, *done.tokens[3:]])

    monkeypatch.setattr(ladder, "generate", odd)
    with pytest.raises(
        ArmsDisagree, match="'rebuild' and plain decoding differ on prompt random-0: new token 2"
    ):
        ladder.against_plain(tiny_pair, prompts[0], ["rebuild"], 6, sizes)


def rung(strategy, against, estimate):
    """A rung with what its comparison gave."""
    return {
        "strategy": strategy,
        "against": against,
        "verdict": against and verdict(estimate, estimate, estimate),
    }


def test_shares_are_of_log_time_from_the_first_rung_to_the_best():
    rungs = [
        rung("a", None, None),
        rung("b", "a", 0.5),
        rung("c", "b", 2.0),
        rung("d", "c", 0.125),
        rung("e", "d", 1.5),
    ]
    assert ladder.fastest(rungs) == "d"
    shares = ladder.shares({"rungs": rungs, "best": "d"})
    # 1/8 in all: a third by b, which c takes back, and all of it by d
    assert shares == [None, pytest.approx(1 / 3), pytest.approx(-1 / 3), pytest.approx(1), None]
    assert ladder.shares({"rungs": rungs[:1], "best": "a"}) == [None]
    # a rung whose pairs were all dropped is skipped: the next was compared with the one before it
    dropped = [rung("a", None, None), rung("b", "a", None), rung("c", "a", 0.5)]
    assert ladder.fastest(dropped) == "c"
    assert ladder.shares({"rungs": dropped, "best": "c"}) == [None, None, 1]


def test_a_ladder_without_a_gain_says_why():
    dropped = [{"verdict": None}, {"verdict": verdict(None, 0, None)}]
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
    assert [row["as_alone"] for row in found] == ["1 of 1", "2 of 2"]
    assert found[0]["total_tokens"] == 6 and "6 draft nodes" in batch_sentence(found)
    with pytest.raises(ValueError, match="batch size 0 must be a whole number"):
        throughput.sweep(tiny_pair, prompts, batches=(0,))


def test_a_row_that_differs_from_what_it_gives_alone_is_told(tiny_pair, prompts, monkeypatch):
    shape = {"top_k": 3, "depth": 2, "total_tokens": 6}
    real = throughput.decode_batch

    def odd(pair, ids, *args, **options):
        rows = real(pair, ids, *args, **options)
        return [replace(rows[0], tokens=[*rows[0].tokens[:2], 7, *rows[0].tokens[3:]]), *rows[1:]]

    monkeypatch.setattr(throughput, "decode_batch", odd)
    first, *others = throughput.rows_against_alone(
        tiny_pair, [p.ids for p in prompts], Decoding.of(6, "doubling", **shape)
    )
    assert first is not None and first.position == 2 and not first.tie and others == [None, None]
    assert re.match(
        r"2 of 3; new token 2 is 7 .* more than the arithmetic's error",
        throughput.alone_words([first, *others]),
    )
    with pytest.raises(
        ArmsDisagree, match="in a batch of 1 'doubling' decodes other tokens than alone: new token 2"
    ):
        throughput.sweep(tiny_pair, prompts, batches=(1,), max_new_tokens=6, repeats=2, **shape)


@pytest.mark.parametrize(
    ("highs", "at", "words"),
    [([0.8, 0.9, 0.95], None, "at every batch size"),
     ([0.8, 1.1, 1.2], 2, r"From a batch of \*\*2\*\* on, .* is not shown to be faster than plain decoding, by 6 pairs each[.]"),
     ([1.1, 0.9, 1.2], 4, r"\*\*4\*\*"), ([None, 1.1, 1.2], 1, "At no batch size measured is .* shown to be faster")],
)  # fmt: skip
def test_where_speculation_stops_paying(highs, at, words):
    rows = [
        {"batch": b, "ratio": [0.1, 0.5, high], "eagle_s": [1] * 6}
        for b, high in zip((1, 2, 4), highs, strict=True)
    ]
    assert throughput.crossing(rows) == at and throughput.slower(rows) is None
    assert re.search(words, batch_sentence(rows))
    lost = [row | {"ratio": [1.1, 1.2, 1.3]} if row["batch"] >= (at or 9) else row for row in rows]
    assert throughput.slower(lost) == at
    assert at is None or f"From a batch of **{at}** on, speculative decoding is slower" in batch_sentence(
        lost
    )


def test_a_rung_that_fails_is_named_and_the_ladder_goes_on(tiny_pair, prompts, tmp_path, monkeypatch):
    real, kept = ladder.compare, []

    def fails(pair, **options):
        if options["candidate"] == "doubling":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return real(pair, **options)

    monkeypatch.setattr(ladder, "compare", fails)
    sizes = {"top_k": 3, "depth": 2, "total_tokens": 6, "max_new_tokens": 4, "iterations": 2}
    found = ladder.climb(tiny_pair, prompts, **sizes, stated=2.5, keep=lambda f: kept.append(len(f["rungs"])))
    assert found["failed"] == {"doubling": "OutOfMemoryError: CUDA out of memory"} and kept[:4] == [
        1,
        2,
        3,
        4,
    ]
    table = ladder_table({"ladder": found})
    assert "CUDA out of memory" in table.to_string()
    first = found["rungs"][0]
    assert len(first["cycles_s"]) >= 1
    assert table["tokens/s at τ 2.50, stated"].iloc[0] == f"{2.5 / first['cycle_s']:.1f}"


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
    assert ladder.uncompiled(ladder.RUNGS[-1][1]) == "cuda,attention=tree_fused,runtime=cuda_graph"
    assert ladder.uncompiled("cuda, early,runtime=compile") == "cuda,runtime=eager"


def test_the_eager_forward_is_the_targets_own(tiny_pair):
    before = tiny_pair.target.config._attn_implementation
    took = list(islice(eager_forwards(tiny_pair, rows=8), 3))
    assert len(took) == 3 and min(took) > 0
    assert tiny_pair.target.config._attn_implementation == before


def test_cycles_of_strategies_are_timed_in_turn(tiny_pair, prompts, monkeypatch):
    order = []
    real = ladder.stream

    def noted(*args, **options):
        for cycle in real(*args, **options):
            order.append(options["strategy"])
            yield cycle

    monkeypatch.setattr(ladder, "stream", noted)
    sizes = {"max_new_tokens": 20, "top_k": 3, "depth": 2, "total_tokens": 6}
    found = ladder.in_turn(tiny_pair, prompts, ["rebuild", "doubling"], 3, **sizes)
    assert [len(cycles) for cycles in found.values()] == [3, 3]
    assert all(took > 0 and 1 <= count <= 3 for cycles in found.values() for took, count in cycles)
    rounds = [tuple(order[at : at + 2]) for at in range(0, 8, 2)]  # one of each has the prefill in it
    assert len(order) == 8 and set(rounds) == {("rebuild", "doubling"), ("doubling", "rebuild")}
    assert ladder.in_turn(tiny_pair, [], ["rebuild"], 3) == {"rebuild": []}


def test_cycles_and_forwards_are_timed_in_turn(tiny_pair, monkeypatch):
    """As many of each, over as many prompts as it takes; the first rung's cycles."""
    used = []
    real = ladder.stream
    monkeypatch.setattr(ladder, "stream", lambda *a, **k: used.append(k["strategy"]) or real(*a, **k))
    prompts = profile_prompts(tiny_pair, load_prompts("heldout")[:2])
    own, attentions = tiny_pair.target.config._attn_implementation, []
    forward = type(tiny_pair.target).forward

    def spy(self, *args, **options):
        if options[tiny_pair.cache_keyword].__class__.__name__ == "StaticCache":
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


def test_the_chart_of_batches_marks_where_speculation_stops_paying():
    """At that batch's place on an axis of categories, not at its number."""
    row = {"eagle_tokens_per_s": 1.0, "plain_tokens_per_s": 1.0, "eagle_s": [1.0] * 6, "plain_s": [1.0] * 6}
    rows = [row | {"batch": b, "ratio": [0.5, 0.8, high]} for b, high in ((1, 0.9), (4, 0.95), (16, 1.2))]
    figure = charts_optimize.batches(rows)
    assert [(shape.x0, shape.x1, shape.xref) for shape in figure.layout.shapes] == [(2, 2, "x"), (2, 2, "x2")]
    assert "not shown to be faster" in figure.data[-1].name
    assert not charts_optimize.batches(rows[:2]).layout.shapes
