"""Arms in lock-step: they decode what they decode alone, and each stretch is the same text for all."""

from __future__ import annotations

import random

import pytest

from eagle_lab import generate, stream
from eagle_lab.measure.lockstep import lock_step

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
