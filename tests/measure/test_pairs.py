from dataclasses import replace

import pytest

from eagle_lab.decode.generate import to_warm_up
from eagle_lab.decode.strategy import Decoding
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm, parse
from eagle_lab.measure.environment import Cause
from eagle_lab.measure.pairs import Fork, Plan, fork_messages, renew, take_sample, time_in_pairs, warm_up
from eagle_lab.measure.records import InstanceSample
from eagle_lab.models.prompts import Prompt

SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}
PROMPTS = (Prompt("a", "own", "", (1, 124, 306, 281)), Prompt("b", "own", "", (1, 245, 323)))


def arms(baseline, candidate):
    return tuple(parse(name, Arm(shape=TreeShape(**SIZES))) for name in (baseline, candidate))


PLAN = Plan(arms("rebuild", "doubling"), PROMPTS, 8, seed=1)


def test_a_fork_gives_each_pair_and_the_parts(tiny_pair):
    messages = list(fork_messages(tiny_pair, PLAN, Fork(0, (4, 5, 6))))
    samples = [m["sample"] for m in messages if "sample" in m]
    assert [s.iteration for s in samples] == [4, 5, 6]
    assert [s.prompt for s in samples] == ["a", "b", "a"]
    assert not any("tokens" in m for m in messages)
    parts = [m["part"] for m in messages if "part" in m]
    assert {p.arm for p in parts} == {"baseline", "candidate"}
    assert all(len(p.calls_s) == p.cycles for p in parts)


def test_a_fork_of_cycles_gives_instances_with_their_control_and_few_whole_decodes(tiny_pair):
    plan = replace(PLAN, pairs_of="cycles")
    messages = list(fork_messages(tiny_pair, plan, Fork(0, (4, 5, 6), wholes=1)))
    found = [m["instance"] for m in messages if "instance" in m]
    assert [(i.iteration, i.prompt) for i in found] == [(4, "a"), (5, "b"), (6, "a")]
    assert {len(times) for i in found for times in i.seconds} == {3} == {len(i.first_s) for i in found}
    assert all(i.cycles(session) == len(i.seconds) for i in found for session in range(3))
    assert {i.made for i in found} != {(0, 1, 2)} or len({i.order for i in found}) > 1
    (sample,) = (m["sample"] for m in messages if "sample" in m)
    assert sample.iteration == 4 and 0 < sample.first_s[0] < sample.baseline_s
    assert sum("part" in m for m in messages) == 2


@pytest.mark.parametrize(("runtime", "kept"), [("cuda_graph", 0), ("compile+cuda_graph", 0), ("compile", 1)])
def test_an_instance_makes_its_sessions_anew_unless_a_whole_step_is_compiled(tiny_pair, runtime, kept):
    pair = replace(tiny_pair, sessions={"one": []})
    renew(pair, Plan(arms("doubling", f"doubling,runtime={runtime}"), PROMPTS, 8, pairs_of="cycles"))
    assert len(pair.sessions) == kept


def test_a_fork_begins_no_instance_after_its_time(tiny_pair):
    plan = replace(PLAN, pairs_of="cycles")
    messages = fork_messages(tiny_pair, plan, Fork(0, tuple(range(50)), seconds=0.0))
    assert sum("instance" in m for m in messages) == 1


def test_the_order_is_a_recorded_coin(tiny_pair):
    short = Plan(arms("rebuild", "doubling"), PROMPTS, 1, seed=1)
    orders = [take_sample(tiny_pair, short, Fork(0, ()), i)["sample"].order for i in range(24)]
    again = [take_sample(tiny_pair, short, Fork(0, ()), i)["sample"].order for i in range(24)]
    assert orders == again
    assert 4 < orders.count("baseline first") < 20


def test_a_control_decodes_the_baseline_twice(tiny_pair, monkeypatch):
    used = []
    from eagle_lab.measure import pairs as measure

    real = measure.cycles
    monkeypatch.setattr(measure, "cycles", lambda *a: (used.append(str(a[1].strategy)), real(*a))[1])
    take_sample(tiny_pair, PLAN, Fork(0, (), control=True), 0)
    assert used == ["rebuild", "rebuild"]


def test_a_busy_machine_costs_the_pair(tiny_pair, monkeypatch):
    from eagle_lab.measure import pairs as measure

    def dropped():
        return take_sample(tiny_pair, PLAN, Fork(0, ()), 0)["sample"].dropped

    monkeypatch.setattr(measure, "foreign_load", lambda *_: 0.9)
    assert dropped() == (Cause.FOREIGN_LOAD,)
    monkeypatch.setattr(measure, "foreign_load", lambda *_: 0.0)
    assert dropped() == ()
    monkeypatch.setattr(measure, "throttle_reasons", lambda *_: [Cause.POWER_CAP])
    assert dropped() == (Cause.POWER_CAP,)


def long(length):
    """A prompt of so many ids."""
    return Prompt(f"{length} ids", "own", "", tuple(3 + n % 200 for n in range(length)))


def test_nothing_is_compiled_inside_a_timed_pair(tiny_pair, prepared):
    """A longer prompt needs a larger cache, and under a fixed runtime a cycle of its own."""
    prompts = (*PROMPTS, long(250), long(260), long(510))
    plan = Plan(arms("rebuild", "doubling,runtime=compile"), prompts, 8)
    fork = Fork(0, tuple(range(5)))
    warm_up(tiny_pair, plan, fork)
    made = len(prepared)
    # a window of 256, 512 and 1024 slots: the smaller ones of a longer cache are for shorter prompts
    assert made == 3
    assert len(list(fork_messages(tiny_pair, plan, Fork(0, (0, 1, 2, 3, 4), control=True)))) == 5
    for iteration in fork.iterations:
        take_sample(tiny_pair, plan, fork, iteration)
    assert len(prepared) == made


def test_what_is_warmed_up_is_the_first_of_each_size():
    def decodings(*strategies, **sizes):
        return [Decoding.of(50, strategy, **sizes) for strategy in strategies]

    SMALL = {"top_k": 2, "depth": 2, "total_tokens": 4}
    lengths = [50, 60, 170, 180, 40, 700]
    assert to_warm_up(lengths, decodings("rebuild", "doubling")) == [0]
    fixed = decodings("rebuild", "doubling,runtime=compile")
    assert to_warm_up(lengths, fixed) == [0, 2, 5]
    assert to_warm_up(lengths[2:], fixed) == [0, 2, 3]
    # 200 plain tokens fit into 256 slots, but not with a tree beside them
    assert to_warm_up([50, 204, 206], fixed) == [0, 1, 2]
    assert to_warm_up([50, 60], decodings("doubling,runtime=compile", **SMALL)) == [0]
    # the same cache, but the second prompt begins in a smaller window, which the first has no use for
    long = [Decoding.of(400, "doubling,runtime=compile", **SMALL)]
    assert to_warm_up([300, 150, 140, 310], long) == [0, 1]


def test_pairs_warm_up_the_items_that_are_named():
    seen = []
    found = time_in_pairs(
        seen.append, lambda item: seen.append(item.upper()), ["a", "b", "c"], 2, warmup=[2, 1]
    )
    assert len(found) == 2
    assert [sorted(seen[at : at + 2]) for at in range(0, 8, 2)] == [
        ["C", "c"],
        ["B", "b"],
        ["A", "a"],
        ["B", "b"],
    ]
    with_default = []
    time_in_pairs(with_default.append, with_default.append, ["a", "b", "c"], 1)
    assert with_default == ["c", "c", "a", "a"]


def test_pairs_of_any_two_functions_find_the_slower_one():
    from eagle_lab.measure.spans import spin

    found = time_in_pairs(lambda x: spin(100_000), lambda x: spin(400_000), ["item"], 12)
    assert len(found) == 12
    assert sorted(c / b for b, c in found)[6] > 2


def test_some_sessions_of_an_instance_are_numbered_anew():
    taken = InstanceSample(
        prompt="a", made=(3, 1, 0, 2), first_s=(0.1, 0.2, 0.3, 0.4), seconds=((1.0, 2.0, 3.0, 4.0),), order=((2, 0, 3, 1, 3),),
        tokens=(5,), slices=(((1.0,), (2.0,), (1.0, 2.0), (2.0, 2.0)),), foreign_load=0.0,
    )  # fmt: skip
    few = taken.of((2, 3))
    assert (few.made, few.first_s, few.seconds) == ((1, 0), (0.3, 0.4), ((3.0, 4.0),))
    assert (few.order, few.slices) == (((0, 1, 1),), (((1.0, 2.0), (2.0, 2.0)),))
    assert (few.cycles(0), few.cycles(1), few.tokens) == (1, 2, (5,))
    assert taken.of((0, 1, 2, 3)) == taken
