"""Arms in lock-step: they decode what they decode alone, and each stretch is the same text for all."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
from greenlet import getcurrent

from eagle_lab import generate, generate_plain, stream
from eagle_lab.decode.strategy import parse
from eagle_lab.measure import lockstep
from eagle_lab.measure.lockstep import lock_step, slicing

PROMPT = tuple(range(5, 25))
TOKENS = 24


def opened(pair, **options):
    """What opens a decode of the prompt."""
    return lambda: stream(pair, PROMPT, TOKENS, record=False, **options)


def test_arms_with_equal_cycles_make_a_stretch_of_each_cycle(tiny_pair):
    arms = [opened(tiny_pair), opened(tiny_pair, strategy="incremental"), opened(tiny_pair)]
    found = lock_step(tiny_pair, arms, TOKENS, random.Random(3))
    alone = generate(tiny_pair, PROMPT, TOKENS)
    assert [s.tokens for s in found.stretches] == [len(c.committed) for c in alone.cycles[1:]]
    assert all(s.cycles == (1, 1, 1) and sorted(s.order) == [0, 1, 2] for s in found.stretches)
    assert found.tokens == (found.tokens[0],) * 3
    assert found.tokens[0][:TOKENS] == tuple(t for c in alone.cycles for t in c.committed)[:TOKENS]
    assert all(t > 0 for s in found.stretches for t in s.seconds) and all(t > 0 for t in found.first_s)


def test_arms_with_other_trees_are_paired_over_the_same_text(tiny_pair):
    arms = [opened(tiny_pair, top_k=1, depth=1, total_tokens=1), opened(tiny_pair, total_tokens=31)]
    found = lock_step(tiny_pair, arms, TOKENS, random.Random(0))
    assert found.tokens[0] == found.tokens[1]
    assert any(s.cycles[0] != s.cycles[1] for s in found.stretches)
    for s in found.stretches:
        assert s.cycles == (s.order.count(0), s.order.count(1)) and min(s.cycles) >= 1
        assert s.tokens >= max(s.cycles)  # a cycle commits at least its root


def test_the_coin_decides_who_is_made_first_and_who_steps_first(tiny_pair):
    arms = [opened(tiny_pair), opened(tiny_pair)]
    runs = [lock_step(tiny_pair, arms, TOKENS, random.Random(seed)) for seed in range(6)]
    assert {run.made for run in runs} == {(0, 1), (1, 0)}
    assert {s.order for run in runs for s in run.stretches} == {(0, 1), (1, 0)}
    again = lock_step(tiny_pair, arms, TOKENS, random.Random(0))
    assert again.made == runs[0].made and [s.order for s in again.stretches] == [
        s.order for s in runs[0].stretches
    ]


def test_whoever_listens_can_end_an_instance(tiny_pair):
    seen = []

    def listen(stretch):
        seen.append(stretch)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lock_step(tiny_pair, [opened(tiny_pair)] * 2, TOKENS, random.Random(0), listen)
    assert len(seen) == 2


STRATEGIES = ("rebuild", "incremental", "rebuild,product=transposed", "rebuild,attention=eager")


def sliced(pair, strategies=STRATEGIES, seed=0, **options):
    """Lock-step of strategies whose cycles are cut into slices."""
    arms = [opened(pair, strategy=one, **options) for one in strategies]
    around = slicing([(pair, parse(one)) for one in strategies])
    return lock_step(pair, arms, TOKENS, random.Random(seed), around=around)


def head_forwards(pair):
    """Of one cycle."""
    decode, calls = opened(pair)(), []
    next(decode)
    handle = pair.head.register_forward_pre_hook(lambda *_: calls.append(1))
    next(decode)
    handle.remove()
    return len(calls)


def test_a_product_that_takes_longer_than_a_layer_is_cut_too(tiny_pair, monkeypatch):
    """The same tokens, and a slice for each further piece; nothing of it is left."""
    whole = sliced(tiny_pair)
    real, out = lockstep.in_pieces, tiny_pair.target.get_output_embeddings()
    most, pieces = out.weight.numel() // 4, []

    def smaller(models, product, _most, *more):
        cut = real(models, product, most, *more)
        pieces.append({module.weight: module.pieces for _, _, module in cut})
        return cut

    monkeypatch.setattr(lockstep, "in_pieces", smaller)
    before = modules(tiny_pair)
    found = sliced(tiny_pair)
    assert found.tokens == whole.tokens and pieces[0][out.weight] == 4
    counts = [{len(x) for s in one.stretches for x in s.slices} for one in (whole, found)]
    assert counts[0] == {1 + head_forwards(tiny_pair) + 8 + 1}
    # the head's logits come before each of its forwards, and what it makes of the target's states once
    head, forwards = tiny_pair.head, head_forwards(tiny_pair)
    more = (pieces[0][head.lm_head.weight] - 1) * forwards + pieces[0].get(head.fc.weight, 1) - 1
    assert more and counts[1] == {count + 3 + more for count in counts[0]}
    assert modules(tiny_pair) == before


def modules(pair):
    """Each module of target and head by its name: what a swap would change."""
    return {**dict(pair.target.named_modules()), **{f"head.{n}": m for n, m in pair.head.named_modules()}}


def test_arms_that_take_turns_inside_a_cycle_decode_what_they_decode_alone(tiny_pair):
    """Also where they differ in what the target as a whole is set to: its attention, its products, its tapped states."""
    before = tiny_pair.target.config._attn_implementation
    alone = generate(tiny_pair, PROMPT, TOKENS)
    found = sliced(tiny_pair)
    assert [s.tokens for s in found.stretches] == [len(c.committed) for c in alone.cycles[1:]]
    assert all(s.cycles == (1,) * 4 and sorted(s.order) == [0, 1, 2, 3] for s in found.stretches)
    assert len({s.order for s in found.stretches}) > 1
    assert found.tokens == (tuple(t for c in alone.cycles for t in c.committed)[:TOKENS],) * 4
    assert all(t > 0 for s in found.stretches for t in s.seconds)
    assert all(
        sum(x) == pytest.approx(t) for s in found.stretches for x, t in zip(s.slices, s.seconds, strict=True)
    )
    # what comes before the first pause, the head's forwards, the target's eight layers and its last norm
    assert {len(x) for s in found.stretches for x in s.slices} == {1 + head_forwards(tiny_pair) + 8 + 1}
    tiny_pair.target.set_attn_implementation(before)
    assert generate(tiny_pair, PROMPT, TOKENS).cycles == alone.cycles, "nothing of the slices is left"


def test_arms_of_unlike_cycles_take_turns_inside_them(tiny_pair):
    trees = ({"top_k": 1, "depth": 1, "total_tokens": 1}, {"total_tokens": 31})
    arms = [opened(tiny_pair, **tree) for tree in trees]
    around = slicing([(tiny_pair, parse("rebuild"))] * 2)
    found = lock_step(tiny_pair, arms, TOKENS, random.Random(0), around=around)
    assert (
        found.tokens[0]
        == found.tokens[1]
        == tuple(generate_plain(tiny_pair, PROMPT, TOKENS).tokens)[: len(found.tokens[0])]
    )
    assert any(s.cycles[0] != s.cycles[1] for s in found.stretches)
    assert all(s.cycles == (s.order.count(0), s.order.count(1)) for s in found.stretches)


def test_slices_of_all_arms_alternate(tiny_pair, monkeypatch):
    """The layers see the arms in turn: no arm runs a forward to its end while another waits."""
    seen = []
    real = lockstep._pause
    monkeypatch.setattr(lockstep, "_pause", lambda: (seen.append(getcurrent()), real()))
    found = sliced(tiny_pair, ("rebuild", "rebuild"))
    runs = [list(group) for _, group in groupby(seen)]
    assert len(seen) >= 2 * len(found.stretches) * 4
    assert max(map(len, runs)) <= 2, (
        "two slices of one arm come together only where a round ends and the next begins"
    )


def test_an_arm_that_fails_inside_a_slice_ends_the_instance_and_leaves_no_hook(tiny_pair):
    layers = tiny_pair.target.get_decoder().layers
    before, was = [len(layer._forward_pre_hooks) for layer in layers], modules(tiny_pair)
    count = 0

    def fail(*_):
        nonlocal count
        count += 1
        if count == 40:
            raise RuntimeError("planted")

    handle = layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        sliced(tiny_pair)
    handle.remove()
    assert [len(layer._forward_pre_hooks) for layer in layers] == before
    assert modules(tiny_pair) == was, "nor anybody's products"
    tiny_pair.sessions.clear()
    assert sliced(tiny_pair).stretches


@pytest.mark.parametrize("strategy", ["doubling,runtime=compile"])
def test_what_is_compiled_is_not_cut(tiny_pair, strategy):
    assert slicing([(tiny_pair, parse("rebuild")), (tiny_pair, parse(strategy))]) is None
