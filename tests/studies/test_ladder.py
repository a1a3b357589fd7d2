"""The ladder, the tree sizes and the batches on the tiny pair; their numbers on made-up records."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from make import ENVIRONMENT, verdict

from eagle_lab.decode.generate import decode
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import parse as parse_arm
from eagle_lab.engines.here import base_arm
from eagle_lab.measure.environment import Cause, Environment
from eagle_lab.measure.floor import Floor
from eagle_lab.measure.pairs import Plan
from eagle_lab.measure.records import Difference, InstanceSample, committed, read, write
from eagle_lab.measure.worker import WorkerDied, Workers
from eagle_lab.report import ladder as report
from eagle_lab.report.charts import ladder as charts
from eagle_lab.studies import ladder, scaling
from eagle_lab.studies.ladder import Ladder, Prepared, Rung, Skip, Skipped, TreeSize
from eagle_lab.studies.operators import Kernel, Operators, OperatorsRecord, operators_path, operators_record
from eagle_lab.studies.profile import get_prompts
from eagle_lab.studies.record import OptimizeRecord, new_ladder
from eagle_lab.verdict.agreement import ArmsDisagree
from eagle_lab.verdict.stats import Reason, Verdict, Why

SHAPE = TreeShape(3, 2, 6)
FEW = {"max_new_tokens": 4, "iterations": 2}
TIE = Difference(position=2, left=7, right=8, margin=0.1, tolerance=0.5)


@pytest.fixture(scope="module")
def prompts(tiny_pair):
    """Three prompts of random ids, as the tiny pair has no tokenizer."""
    return get_prompts(tiny_pair, 3)


def judged(estimate, low=None, high=None):
    low, high = (estimate if x is None else x for x in (low, high))
    return Verdict.model_validate(verdict(estimate, low, high) | {"method": "signed rank"})


def rung(strategy, against=None, estimate=None, **more):
    found = judged(estimate) if against else None
    return Rung(change=strategy, strategy=strategy, against=against, verdict=found, **more)


def made(rungs, best, **more):
    least = {"bytes": 1, "flops": 1, "memory_s": 0.001, "arithmetic_s": 0.0, "seconds": 0.001}
    floor = Floor(prefix=1, bandwidth=1.0, rate=1.0, threads=1, parts={"cycle": least})
    return Ladder(rungs=rungs, skipped=[], best=best, floor=floor, total_tokens=63, **more)


def odd(real):
    """Decodes whose third token is another one."""

    def other(*args, **options):
        done = real(*args, **options)
        rows = done if isinstance(done, list) else [done]
        rows[0] = replace(rows[0], tokens=[*rows[0].tokens[:2], 7, *rows[0].tokens[3:]])
        return rows if isinstance(done, list) else rows[0]

    return other


def test_each_rung_changes_one_axis():
    """One change at a time, from the official ways to one graph; also where the cycle compiled whole is among them."""
    on_a_gpu = [r for r in ladder.RUNGS if r is not ladder.ON_CPU]
    with_compiled = [*on_a_gpu[:5], ladder.COMPILED, *on_a_gpu[5:]]
    for rungs in (on_a_gpu, with_compiled):
        for (_, one), (_, other) in pairwise(rungs):
            assert len(ladder.changed(rung(other, one, 1.0))) == 1
    assert ladder.changed(rung("doubling,tree", "rebuild", 1.0)) == ["mask", "attention"]
    assert ladder.changed(rung("rebuild")) == []


def test_what_cannot_run_is_listed_with_its_reason(tiny_pair):
    can, cannot = ladder.available(tiny_pair)
    kept = "mask=doubling,attention=tree,product=transposed"
    assert can == [*ladder.RUNGS[:5], (ladder.RUNGS[5][0], kept)]
    why = {one.strategy: one for one in cannot}
    assert set(why) == {ladder.COMPILED[1], *(strategy for _, strategy in ladder.RUNGS[6:])}
    assert why.pop(ladder.COMPILED[1]).why == Skip.NOT_ASKED
    assert all(one.why == Skip.UNAVAILABLE and "CUDA" in one.error for one in why.values())


def test_the_rungs_above_a_cpu_s_keep_its_product(tiny_pair, monkeypatch):
    """So that each changes one axis, the cycle compiled whole too."""
    monkeypatch.setattr(ladder, "unavailable", lambda axis, name, device: "no" if "graph" in name else None)
    can = ladder.available(tiny_pair, compiled=True)[0]
    assert [parse(strategy).product == "transposed" for _, strategy in can] == [False] * 4 + [True] * 3
    assert parse(can[6][1]) == parse(f"{ladder.COMPILED[1]},product=transposed")
    for (_, one), (_, other) in pairwise(can):
        assert len(ladder.changed(rung(other, one, 1.0))) == 1


def test_a_climb_of_the_tiny_pair(tiny_pair, prompts, monkeypatch):
    """Two rungs fail and are named; the others take turns, and each is compared with the one below it that works."""
    real, kept = ladder.alone, []

    def fails(pair, prompt, arm, max_new_tokens):
        if arm.strategy == parse("doubling"):
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        if arm.strategy == parse(ladder.RUNGS[4][1]):
            raise ArmsDisagree("other tokens")
        return real(pair, prompt, arm, max_new_tokens)

    monkeypatch.setattr(ladder, "alone", fails)
    found = ladder.climb(
        tiny_pair, prompts, SHAPE, max_new_tokens=12, iterations=2, stated=2.5,
        keep=lambda so_far: kept.append((len(so_far.rungs), so_far.in_turn)),
    )  # fmt: skip
    assert [one for one in found.skipped if one.why in (Skip.FAILED, Skip.DISAGREED)] == [
        Skipped(strategy="doubling", why=Skip.FAILED, error="OutOfMemoryError: CUDA out of memory"),
        Skipped(strategy=ladder.RUNGS[4][1], why=Skip.DISAGREED, error="other tokens"),
    ]
    assert kept == [(1, False), (2, False), (3, False), (4, False), (4, True)]
    assert all(one.checked and one.plain is None and one.cycle_s > 0 for one in found.rungs)
    for below, one in pairwise(found.rungs):
        assert (one.against, one.pairs, one.pairs_parted) == (below.strategy, 2, 0)
        assert (one.verdict.instances, one.verdict.pairs) == (2, len(one.cycles_s))
    assert found.rung(found.best) and found.in_turn and found.in_turn_error is None
    # cycles in turn, as many of each; the stated τ is the ladder's
    assert len({len(one.cycles_s) for one in found.rungs}) == 1 and found.acceptance_length == 2.5
    record = new_ladder(tiny_pair, 2.5)
    record.ladder = found
    assert record.acceptance_length == 2.5 and report.section(record)
    assert OptimizeRecord.model_validate_json(record.model_dump_json()) == record
    assert charts.ladder(found).layout.xaxis.type == "log"


def test_a_climb_in_fresh_processes(tiny_pair, prompts, monkeypatch):
    monkeypatch.setattr(ladder, "available", lambda *_: (list(ladder.RUNGS[2:4]), []))
    found = ladder.climb(tiny_pair, prompts, SHAPE, max_new_tokens=8, iterations=3, forks=2)
    verdict = found.rungs[1].verdict
    assert (verdict.forks, verdict.instances, verdict.method) == (2, 3, "t over forks")
    # a tree on random weights commits little more than a token a cycle
    assert 1 <= found.acceptance_length < 2
    for iterations, forks in ((1, 2), (0, 1), (2, 0)):
        with pytest.raises(ValueError, match="can't be spread over"):
            ladder.climb(tiny_pair, prompts, SHAPE, iterations=iterations, forks=forks)


def test_what_preparing_a_rung_took_is_kept(tiny_pair, prompts, prepared, monkeypatch):
    """As it was alone; each instance prepares anew, but for a step that is compiled whole."""
    rungs = [ladder.RUNGS[5], ladder.COMPILED]
    monkeypatch.setattr(ladder, "available", lambda *_: (rungs, []))
    found = ladder.climb(tiny_pair, prompts, SHAPE, max_new_tokens=6, iterations=2, compiled=True)
    assert [[one.windows for one in rung.prepared] for rung in found.rungs] == [[], [[256]]]
    assert prepared == ["compile"] and found.rungs[1].verdict.instances == 2


def instance(ratios, fork=0, stretches=5, **more):
    """Each session's cycle takes its ratio of 10 ms."""
    every = tuple(range(len(ratios)))
    seconds = (tuple(0.01 * r for r in ratios),) * stretches
    turns = {"seconds": seconds, "order": (every,) * stretches, "tokens": (2,) * stretches} | more
    return InstanceSample(
        fork=fork, iteration=fork, prompt="a", made=every, first_s=ratios, foreign_load=0.0, **turns
    )


def test_rungs_are_judged_in_the_same_instances():
    """By the ratio to the one below; what was dropped counts for nothing, and five processes are not provisional."""
    rungs = [rung("rebuild", checked=True), rung("doubling"), rung("doubling,attention=tree")]
    tried, ratios = made(rungs, "rebuild"), (1.0, 1.0, 0.8, 1.2)
    taken = [{"instance": instance(ratios, fork)} for fork in range(5)]
    taken.append({"instance": instance((1.0, 9.0, 9.0, 9.0), 5, dropped=[Cause.HARDWARE_THERMAL])})
    found = ladder.judged(tried, taken, 7, None, "fork 5 ended")
    one, other = found.rungs[1:]
    assert (one.verdict.estimate, other.verdict.estimate) == (pytest.approx(0.8), pytest.approx(1.5))
    assert (one.verdict.decision, other.verdict.decision) == ("ADOPT", "REVERT")
    assert (other.verdict.forks, other.verdict.instances, other.verdict.pairs) == (5, 5, 25)
    assert not other.verdict.provisional and (other.against, other.pairs) == ("doubling", 6)
    assert found.best == "doubling" and found.verdict.estimate == pytest.approx(0.8)
    assert [r.cycle_s for r in found.rungs] == [pytest.approx(0.01 * r) for r in (1, 0.8, 1.2)]
    assert found.in_turn and found.in_turn_error == "fork 5 ended" and found.acceptance_length == 2
    for judged_so in (other.verdict, found.verdict):
        short = [(r.why, r.count, r.of) for r in judged_so.reasons][1:]
        assert short == [(Why.DROPPED, 1, 6), (Why.NOT_TAKEN, 6, 7)]
    # less than half of what was planned decides nothing
    lost = ladder.judged(tried, taken, 11, None, None).verdict
    assert lost.decision == "INCONCLUSIVE" and lost.reasons[1].why == Why.PAIRS_LOST
    # nothing is decided where the first rung's two sessions differ
    unlike = [{"instance": instance((1.0, 1.03, 0.8, 1.2), fork)} for fork in range(5)]
    found = ladder.judged(tried, unlike, 5, None, None)
    assert [r.verdict.decision for r in found.rungs[1:]] == ["INCONCLUSIVE"] * 2
    assert {r.verdict.reasons[0].why for r in found.rungs[1:]} == {Why.CONTROL_DIFFERS}
    # a first rung that scatters so much that its two sessions are 8% apart by chance is no reason to doubt the others
    wide = [1.4, 0.8, 1.3, 0.85, 1.05]
    noisy = [{"instance": instance((1.0, r, 0.8, 1.2), fork)} for fork, r in enumerate(wide)]
    found = ladder.judged(tried, noisy, 5, None, None)
    assert [r.verdict.decision for r in found.rungs[1:]] == ["ADOPT", "REVERT"]
    assert all(r.verdict.reasons[0].why != Why.CONTROL_DIFFERS for r in found.rungs[1:])
    # but what its own two sessions could make is doubted of the rung that is held against it, of few processes too
    near = [{"instance": instance((1.0, 1.08 + fork / 100, 0.97, 0.9), fork)} for fork in range(2)]
    found = ladder.judged(tried, near, 2, None, None)
    assert [r.verdict.decision for r in found.rungs[1:]] == ["INCONCLUSIVE", "ADOPT"]
    assert found.rungs[1].verdict.reasons[0].why == Why.CONTROL_DIFFERS


def test_more_cycles_for_a_text_are_no_slower_rung():
    """Where a near tie parts two rungs, one may need another cycle; the time of a cycle is what counts."""
    seconds = ((0.01, 0.01, 0.01), (0.02, 0.02, 0.01))  # the second stretch: two cycles, two cycles, one
    odd = instance((1.0, 1.0, 1.0), seconds=seconds, order=((2, 0, 1), (0, 1, 2, 1, 0)), tokens=(1, 2))
    found = ladder.judged(made([rung("a"), rung("b")], "a"), [{"instance": odd}] * 2, 2, None, None)
    assert found.rungs[1].verdict.estimate == pytest.approx(1)
    assert [r.cycles_s for r in found.rungs] == [[0.01] * 4] * 2
    assert found.acceptance_length == pytest.approx(3 * 3 / 8)
    even = instance((1.0, 1.0, 0.5))
    assert ladder.by_cycle(even) is even


def test_a_rung_with_other_tokens_in_turn_is_left_out():
    tried = made([rung("a"), rung("b"), rung("c")], "a")
    tokens = {(0, 2): None, (0, 3): TIE}  # of b against a, which no tie explains, and of c against a

    def parting(iteration, base, at, left, right):
        if where := tokens[base, at]:
            return where
        raise ArmsDisagree(f"iteration {iteration}: {left} and {right}")

    message = {"instance": instance((1.0, 1.0, 0.5, 0.5)), "tokens": [[1, 2], [1, 2], [1, 3], [1, 4]]}
    found = ladder.judged(tried, [message], 1, parting, None)
    lost = Skipped(strategy="b", why=Skip.DISAGREED, error="iteration 0: (1, 2) and (1, 3)")
    assert found.skipped == [lost] and tried.skipped == []
    assert [r.strategy for r in found.rungs] == ["a", "c"]
    last = found.rungs[1]
    assert (last.against, last.pairs, last.pairs_parted, last.ties) == ("a", 1, 1, [TIE])
    assert last.verdict.estimate == pytest.approx(0.5)


def test_tokens_of_two_sessions_are_held_against_each_other(tiny_pair, prompts):
    names = ("rebuild", "doubling", "doubling,attention=tree")
    arms = tuple(base_arm(tiny_pair, parse_arm(name)) for name in names)
    plan = Plan(arms, tuple(prompts), 4, sessions=(0, 0, 1, 2))
    same = decode(tiny_pair, prompts[1].ids, Decoding.of(4, "rebuild"), record=False).tokens
    assert ladder._parting(tiny_pair, plan, 1, 2, 3, same, same) is None
    with pytest.raises(ArmsDisagree, match="new token 1: .* more than arithmetic explains"):
        ladder._parting(tiny_pair, plan, 1, 2, 3, same, [same[0], same[1] ^ 1, *same[2:]])


def test_what_ends_the_turns_keeps_what_was_measured(tiny_pair, prompts, monkeypatch):
    rungs = list(ladder.RUNGS[2:4])
    monkeypatch.setattr(ladder, "available", lambda *_: (rungs, []))

    def out_of_memory(pair, plan, fork):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(ladder, "fork_messages", out_of_memory)
    found = ladder.climb(tiny_pair, prompts, SHAPE, **FEW)
    assert found.in_turn_error == "OutOfMemoryError: CUDA out of memory" and not found.in_turn
    assert [one.strategy for one in found.rungs] == [strategy for _, strategy in rungs]
    assert all(one.checked and one.verdict is None for one in found.rungs)

    begun = []

    def messages(self, fork):
        begun.append(fork.number)
        if fork.number == dies:
            raise WorkerDied(fork.number, code, "killed", begun=code < 0)
        yield {"instance": instance((1.0, 1.0, 0.8), fork.number)}

    monkeypatch.setattr(Workers, "messages", messages)
    dies, code = 1, -9
    found = ladder.climb(tiny_pair, prompts, SHAPE, max_new_tokens=4, iterations=3, forks=3)
    assert found.in_turn and found.in_turn_error == "fork 1 ended with exit code -9: killed"
    assert begun == [0, 1, 2] and found.rungs[1].verdict.forks == 2
    assert [(r.why, r.count, r.of) for r in found.rungs[1].verdict.reasons][-1] == (Why.NOT_TAKEN, 2, 3)
    dies, code = 0, 1
    begun.clear()
    found = ladder.climb(tiny_pair, prompts, SHAPE, max_new_tokens=4, iterations=3, forks=3)
    assert begun == [0] and not found.in_turn, "the next one could not begin either"


def test_shares_are_of_log_time_from_the_first_rung_to_the_best():
    rungs = [rung("a"), rung("b", "a", 0.5), rung("c", "b", 2.0), rung("d", "c", 0.125), rung("e", "d", 1.5)]
    assert ladder.fastest(rungs) == "d"
    # 1/8 in all: a third by b, which c takes back, and all of it by d
    shares = [None, pytest.approx(1 / 3), pytest.approx(-1 / 3), pytest.approx(1), None]
    assert ladder.gain_shares(made(rungs, "d")) == shares
    assert ladder.gain_shares(made(rungs[:1], "a")) == [None]


def test_the_acceptance_is_that_of_most_prompts(tiny_pair):
    """Of the ladder's own tree, where it was set against plain decoding."""
    record = new_ladder(tiny_pair, None)
    assert record.acceptance_length is None
    record.ladder = made([rung("a")], "a", acceptance_length=1.9)
    record.tree_sizes = [size(7, tau=2.5)]
    assert record.acceptance_length == 1.9
    record.tree_sizes.append(size(63, tau=3.2))
    assert record.acceptance_length == 3.2
    record.against_plain = [size(63, tau=3.6)]
    assert record.acceptance_length == 3.6
    assert new_ladder(tiny_pair, 3.0).acceptance_length == 3.0


def size(nodes, ratio=0.5, tau=3.0, stated=False, processes=1, control=()):
    seconds = [(1.0, ratio * (1 + 0.01 * n)) for n in range(-4, 5)]
    return TreeSize(
        **asdict(TREES[nodes]), seconds=[seconds] * processes, control=control, acceptance_length=tau, stated=stated,
        strategy="s",
    )  # fmt: skip


def test_a_tree_size_is_judged_over_processes_beside_its_control():
    assert size(63).verdict.provisional and size(63).verdict.decision == "ADOPT"
    five = size(63, processes=5).verdict
    assert (five.forks, five.method, five.provisional) == (5, "t over forks", False)
    same = size(63, processes=5, control=[[(1.0, 1.0)] * 2] * 5).verdict
    assert same == five
    unlike = size(63, processes=5, control=[[(1.0, 1.1)] * 2] * 5).verdict
    assert unlike.decision == "INCONCLUSIVE" and unlike.reasons[0].why == Why.CONTROL_DIFFERS
    # 2% away, but no more than its scatter allows: of so few pairs that is no reason for doubt
    noisy = [[(1.0, 1.02 + by)] * 2 for by in (-0.06, -0.03, 0.0, 0.03, 0.06)]
    assert size(63, processes=5, control=noisy).verdict == same


def here(pair, arms, forks, measure, **options):
    """What fresh processes would give, one after the other in this one."""
    return [measure(pair, number, **options) for number in range(forks)]


def test_tree_sizes_of_the_tiny_pair(tiny_pair, prompts, monkeypatch):
    monkeypatch.setattr(ladder, "in_processes", here)
    found = ladder.tree_sizes(tiny_pair, prompts, sizes=(3, 7), **FEW)
    assert [row.total_tokens for row in found] == [3, 7]
    assert [(len(row.seconds[0]), row.control) for row in found] == [(2, [])] * 2
    assert all(len(row.seconds) == 1 and row.acceptance_length >= 1 for row in found)
    (row,) = ladder.tree_sizes(tiny_pair, prompts, sizes=(3,), max_new_tokens=4, iterations=3, forks=2)
    assert [len(one) for one in row.seconds] == [1, 2] and [len(one) for one in row.control] == [2, 2]
    with pytest.raises(ValueError, match="can't be spread over"):
        ladder.tree_sizes(tiny_pair, prompts, iterations=2, forks=3)
    with pytest.raises(ValueError, match="tree size 5 has no shape; known: 3, 7, 15, 31, 63"):
        ladder.tree_sizes(tiny_pair, prompts, sizes=(5,))
    taken = []
    real = ladder.decode_stream

    def counted(*args, **options):
        for cycle in real(*args, **options):
            taken.append(1)
            yield cycle

    monkeypatch.setattr(ladder, "decode_stream", counted)
    (row,) = ladder.tree_sizes(tiny_pair, prompts, sizes=(3,), max_new_tokens=6, iterations=2, stated=3.0)
    assert len(taken) == 3 * 2, "two cycles make six tokens at three a cycle: a warm-up and two pairs"
    assert row.stated and row.acceptance_length == 3


def test_a_sweep_of_batches(tiny_pair, prompts, monkeypatch):
    monkeypatch.setattr(scaling, "in_processes", here)
    decoding = Decoding.of(4, "doubling", **asdict(SHAPE))
    found = scaling.sweep(tiny_pair, prompts, [decoding], batches=(1, 2), repeats=2)
    assert [(row.new_tokens, row.rows_parted, row.total_tokens) for row in found] == [
        ([[4, 4]], 0, 6),
        ([[8, 8]], 0, 6),
    ]
    (stated,) = scaling.sweep(tiny_pair, prompts, [decoding], batches=(1,), repeats=2, stated={6: 2.0})
    assert stated.stated and stated.acceptance_length == 2.0 and stated.new_tokens == [[4, 4]]
    (row,) = scaling.sweep(tiny_pair, prompts, [decoding], batches=(2,), repeats=3, forks=2)
    assert row.new_tokens == [[8], [8, 8]] and row.pairs == 3
    assert [len(one) for one in (*row.plain_s, *row.eagle_s)] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="can't be spread over"):
        scaling.sweep(tiny_pair, prompts, [decoding], repeats=2, forks=3)
    with pytest.raises(ValueError, match="batch size 0 must be a whole number"):
        scaling.sweep(tiny_pair, prompts, [decoding], batches=(0,))
    monkeypatch.setattr(scaling, "decode_batch", odd(scaling.decode_batch))
    first, *others = scaling.rows_against_alone(tiny_pair, [p.ids for p in prompts], decoding)
    assert first.position == 2 and not first.tie and others == [None, None]
    with pytest.raises(ArmsDisagree, match="in a batch of 1 'mask=doubling' decodes other tokens than alone"):
        scaling.sweep(tiny_pair, prompts, [decoding], batches=(1,), repeats=2)


def test_a_batch_takes_the_tree_that_is_the_fastest_for_it(tiny_pair, prompts, monkeypatch):
    """It is chosen by decodes of its own, and the pairs are of that tree alone."""
    monkeypatch.setattr(scaling, "in_processes", here)
    seconds = {
        (1, 6): 2,
        (1, 3): 3,
        (1, 1): 4,
        (2, 6): 3,
        (2, 3): 2,
        (2, 1): 2.5,
        (3, 6): 2,
        (3, 3): 3,
        (3, 1): 1,
    }
    clock, real = [0.0], scaling.decode_batch

    def timed(pair, ids, decoding, **plain):
        clock[0] += seconds.get((len(ids), decoding.shape.total_tokens), 0)
        return real(pair, ids, decoding, **plain)

    monkeypatch.setattr(scaling, "decode_batch", timed)
    monkeypatch.setattr(scaling, "now", lambda device: clock[0])
    shapes = [SHAPE, TreeShape(2, 2, 3), TreeShape(1, 1, 1)]
    decodings = [Decoding.of(4, "doubling", **asdict(shape)) for shape in shapes]
    tau = {6: 3.0, 3: 2.0, 1: 1.5}
    found = scaling.sweep(tiny_pair, prompts, decodings, batches=(1, 2, 3, 1), repeats=2, stated=tau)
    assert [(row.batch, row.total_tokens) for row in found] == [(1, 6), (2, 3), (3, 1), (1, 6)]
    assert [row.acceptance_length for row in found] == [3.0, 2.0, 1.5, 3.0]
    assert all(len(times) == 2 for row in found for times in row.eagle_s)


def batch(count, ratio, spread=0.01, processes=1, **more):
    eagle = [ratio * (1 + spread * n) for n in range(-4, 5)]
    times = {"new_tokens": [count] * 9, "plain_s": [1.0] * 9, "eagle_s": eagle}
    return scaling.Batch(
        batch=count, **{key: [each] * processes for key, each in times.items()}, acceptance_length=2.0, stated=False,
        strategy="s", **asdict(SHAPE), rows_parted=0, **more,
    )  # fmt: skip


def test_a_batch_has_its_rates_over_all_processes_and_its_interval_over_their_estimates():
    found = batch(4, 0.5, processes=5)
    assert (found.pairs, found.plain_rate, found.eagle_rate) == (45, 4.0, 8.0)
    assert (found.plain_decode_s, found.eagle_decode_s) == (1.0, 0.5)
    low, estimate, high = found.ratio
    assert low == pytest.approx(estimate) == pytest.approx(high), "the processes agree"
    one = batch(4, 0.5).ratio
    assert one[0] < one[1] < one[2] and one[1] == pytest.approx(estimate)


def test_the_prompts_of_a_batch_come_in_turn(prompts):
    a, b, c = (prompt.ids for prompt in prompts)
    assert scaling.groups(prompts, 1, (2, 3)) == [[c], [a]]
    assert scaling.groups(prompts, 2, (0, 1)) == [[a, b], [a, b]], "a whole batch is left once"
    assert scaling.groups(prompts, 4, (5,)) == [[a, b, c, a]]


@pytest.mark.parametrize(
    ("ratios", "spread", "crossing", "slower"),
    [
        ((0.5, 0.6, 0.7), 0.01, None, None),
        ((0.5, 1.0, 1.0), 0.1, 2, None),
        ((1.0, 0.5, 1.0), 0.05, 4, None),
        ((0.5, 0.6, 1.5), 0.01, 4, 4),
        ((1.0, 1.0, 1.0), 0.1, 1, None),
    ],
)
def test_where_speculation_stops_paying(ratios, spread, crossing, slower):
    rows = [batch(count, ratio, spread) for count, ratio in zip((1, 2, 4), ratios, strict=True)]
    assert (scaling.crossing(rows), scaling.crossing(rows, slower=True)) == (crossing, slower)


def test_the_widest_tie_is_that_with_the_largest_margin_for_its_tolerance():
    other = TIE.model_copy(update={"margin": 0.2, "tolerance": 2.0})
    assert scaling.widest([None, other, TIE]) == TIE and scaling.widest([None]) is None


def test_what_a_capture_took_counts_shared_prefills_once():
    def session(seconds, size, readings=()):
        flags = {"windows": [], "merged_projections": 0, "early_products": 0, "early_launches": False}
        return Prepared(seconds=seconds, bytes=size, cache_bytes=2**20, readings=readings, **flags)

    shared = set()
    both = [session(1.5, 2**21, [(0.5, 2**20)]), session(1.0, 0)]
    assert report.prepared(both, shared) == (3.0, 5 * 2**20)
    assert report.prepared(both, shared) == (2.5, 4 * 2**20), "a later rung that shares them didn't make them"
    assert report.prepared([session(1.0, 0, [(0.5, 2**20), (0.25, 2**21)])], shared) == (1.25, 3 * 2**20)


def test_kernels_by_kind():
    names = (
        "void cublasLt::splitKreduce_kernel",
        "stream_kernel",
        "whole_kernel",
        "merge_kernel",
        "triton_poi_0",
    )
    kinds = ["matrix products"] * 2 + ["attention", "choosing children", "small kernels"]
    assert [report.kind(name) for name in names] == kinds
    libraries = (
        "pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>",
        "fmha_cutlassF_bf16_aligned_64x64",
    )
    assert {report.kind(name) for name in libraries} == {"attention"}
    assert report.short("void ns::gemm<float, 3>(int)") == "gemm" and len(report.short("k" * 99)) == 60


def test_what_is_left_without_the_compiler():
    assert ladder.uncompiled("doubling,runtime=compile+cuda_graph") == "mask=doubling,runtime=cuda_graph"
    assert parse(ladder.uncompiled(ladder.RUNGS[-1][1])) == parse(
        "cuda,attention=tree_fused,runtime=cuda_graph"
    )
    assert ladder.uncompiled(ladder.ON_CPU[1]) == str(parse(ladder.ON_CPU[1]))
    assert ladder.uncompiled("cuda, early,runtime=compile") == "mask=cuda"


@pytest.mark.parametrize(
    "best, batches",
    [
        ("cuda,early,attention=tree_fused,runtime=compile+cuda_graph", "cuda,attention=tree_fused,runtime=compile+cuda_graph"),
        ("doubling,attention=tree,runtime=compile", "doubling,attention=tree"),
        ("doubling,attention=tree,product=transposed", "doubling,attention=tree,product=transposed"),
        ("cache=concat,attention=eager", "attention=eager"),
    ],
)  # fmt: skip
def test_batches_take_the_best_strategy_that_holds_them(best, batches):
    assert parse(ladder.of_batches(best)) == parse(batches)


def test_the_words_of_a_ladder(tiny_pair, snapshot):
    """Every way that the templates can end, once."""
    parted = {"plain": TIE, "ties": [TIE], "pairs_parted": 2, "pairs": 8}
    rungs = [
        rung("rebuild", cycle_s=0.05, checked=True),
        rung("doubling", "rebuild", 0.5, cycle_s=0.01, checked=True, **parted),
        rung("tree", "doubling", 1.2, cycle_s=0.02, checked=True, pairs=8),
    ]
    found = made(rungs, "doubling", verdict=judged(0.5, 0.4, 0.6), in_turn=True, acceptance_length=2.0)
    skipped = [
        Skipped(strategy="a", why=Skip.NOT_ASKED),
        Skipped(strategy="b", why=Skip.UNAVAILABLE, error="mask=cuda needs a CUDA device, not cpu"),
        Skipped(strategy="c", why=Skip.FAILED, error="OutOfMemoryError: CUDA out of memory"),
    ]
    found.skipped.extend(skipped)
    record = new_ladder(tiny_pair, None)
    record.environment, record.ladder = Environment.model_validate(ENVIRONMENT), found
    kernels = [Kernel(name="void ns::gemm<float, 3>(int)", calls=4, device_ms=3.0)]
    seen = {"prompt": "a", "cycles": 2, "seconds": 1.0, "operators_s": 0.5, "top": [], "top_kernels": kernels}
    record.operators = Operators(busy_s=0.004, kernels=10, **seen)
    record.tree_sizes = record.against_plain = [size(15), size(63, 0.8)]
    record.batches = [batch(1, 0.5)]
    text = [report.section(record)]
    for changes in ({}, {"best": "rebuild"}, {"verdict": judged(0.99, 0.9, 1.1)}):
        text.append(report.ladder(found.model_copy(update={"verdict": None} | changes)))
    text += [report.sizes([size(63, ratio, stated=True)]) for ratio in (1.2, 1.0)]
    text += [report.sizes([]), report.batches([])]
    turns = {"pairs": 72, "instances": 8, "forks": 5, "provisional": False}
    control = Reason(why=Why.CONTROL_DIFFERS, interval=(1.01, 1.02, 1.03))
    for estimate, reasons in ((0.5, ()), (1.0, (control,))):
        taken = judged(estimate).model_copy(update={**turns, "reasons": reasons})
        text.append(report.ladder(found.model_copy(update={"verdict": taken})))
    text.append(
        report.ladder(found.model_copy(update={"verdict": None, "best": "rebuild", "rungs": rungs[:1]}))
    )
    for in_turn in (True, False):
        ended = {"in_turn": in_turn, "in_turn_error": "fork 1 ended", "skipped": []}
        text.append(report.skipped(found.model_copy(update=ended)))
    record.against_plain = [size(63, processes=5, control=[[(1.0, 1.1)] * 2] * 5)]
    text += [report.sizes(record.against_plain), report.best_against_plain(record)]
    for ratios in ((0.5, 0.6), (0.5, 1.0), (1.0, 1.0), (0.5, 1.5)):
        rows = [batch(n, ratio, 0.1 * (ratio == 1), widest_tie=TIE) for n, ratio in enumerate(ratios, 1)]
        text.append(report.batches(rows))
    rows = [row.model_copy(update={"total_tokens": 6 // row.batch, "stated": True}) for row in rows]
    text += [report.batches(rows), report.batch_table(rows)]
    snapshot("\n".join(text), "ladder.md")


def test_the_committed_records_can_be_told_and_drawn():
    for record in committed(OptimizeRecord).values():
        assert report.section(record)
        assert charts.ladder(record.ladder).data and charts.tree_sizes(record.tree_sizes).data
        if record.batches:
            figure = charts.batches(record.batches)
            assert list(figure.data[-1].error_y.array) and figure.layout.shapes[0].yref == "y3"


def test_kernels_of_a_cycle_are_kept_and_told_by_kind(tiny_pair, prompts, tmp_path, snapshot):
    decoding = Decoding.of(64, "doubling", top_k=4, depth=3, total_tokens=12)
    record = operators_record(tiny_pair, prompts, decoding, cycles=2)
    path = operators_path(record, tmp_path)
    assert path.name == "operators-cpu-target.json" and record.settings.processes == 1
    write(record, path)
    assert read(path, OperatorsRecord) == record and record.operators.cycles == 2
    assert record.operators.busy_s is None and record.operators.top[0].host_ms > 0

    record.settings = record.settings.model_copy(update={"processes": 2})
    assert operators_path(record, tmp_path).name == "operators-x2-cpu-target.json"
    rows = {"void ns::gemm<float>(int)": 3.0, "ncclDevKernel_AllReduce_Sum_bf16": 1.0, "triton_mul": 0.5}
    seen = [Kernel(name=name, calls=4, device_ms=ms) for name, ms in rows.items()]
    record.operators = record.operators.model_copy(
        update={"busy_s": 0.005, "kernels": 12, "top_kernels": seen}
    )
    times = report.busy_by_kind(record.operators)
    assert times["matrix products"] == 1.5 and times["sums over GPUs"] == 0.5 and times["attention"] == 0
    assert times["small kernels"] == pytest.approx(0.5)  # the unnamed, and what lies beyond the named ones
    record.environment = Environment.model_validate(ENVIRONMENT)
    snapshot(report.kernels(record), "kernels.md")
