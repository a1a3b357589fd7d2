"""Cycles after long prefixes: what is timed, what is refused, and that both ways give the same tokens there."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
from make import ENVIRONMENT

from eagle_lab import generate, generate_plain
from eagle_lab.decode.strategy import Decoding
from eagle_lab.decode.tree import TreeShape
from eagle_lab.measure.environment import Environment
from eagle_lab.measure.floor import Cost, Experts, Floor
from eagle_lab.measure.records import Difference, read, record_path, write
from eagle_lab.models.prompts import Prompt
from eagle_lab.report import ladder as report
from eagle_lab.report.charts import ladder as charts
from eagle_lab.studies import scaling
from eagle_lab.studies.profile import get_prompts
from eagle_lab.studies.scaling import Context, ContextsRecord, ContextsSettings, Turns
from eagle_lab.verdict.agreement import ArmsDisagree

SHAPE = TreeShape(3, 2, 6)
TIE = Difference(position=2, left=7, right=8, margin=0.1, tolerance=0.5)


@pytest.fixture
def pair(tiny_pair):
    """The tiny pair without sessions of other tests."""
    tiny_pair.sessions.clear()
    yield tiny_pair
    tiny_pair.sessions.clear()


def test_tokens_after_a_long_prefix_are_plain_decoding_s(pair):
    text = scaling.text_of(get_prompts(pair, 20), 600)
    expected = generate_plain(pair, text, 12).tokens
    for strategy in ("doubling", "doubling,attention=tree", "cache=concat,attention=eager"):
        assert generate(pair, text, 12, strategy=strategy, **asdict(SHAPE)).tokens == expected


def test_cycles_are_timed_after_each_prefix(pair):
    kept = []
    found = scaling.contexts(
        pair, [40, 300], strategy="doubling", shape=SHAPE, cycles=3, keep=lambda record: kept.append(len(record.contexts))
    )  # fmt: skip
    assert [row.prefix for row in found.contexts] == [row.floor.prefix for row in found.contexts] == [40, 300]
    for row in found.contexts:
        assert len(row.eagle.cycles_s) == len(row.plain.cycles_s) == len(row.eagle.tokens) == 3
        assert len(row.eagle.first_s) == len(row.plain.first_s) == 1 and row.tie is None
        assert row.plain.tokens == [1, 1, 1] and all(1 <= n <= SHAPE.width for n in row.eagle.tokens)
    assert kept == [1, 2] and found.settings.strategy == "mask=doubling" and found.settings.total_tokens == 6
    assert found.contexts[1].floor_s > found.contexts[0].floor_s > found.contexts[0].plain_floor_s


def test_all_prefixes_share_a_cache_and_each_attention_makes_the_windows_that_it_needs_ready(pair, prepared):
    options = {"strategy": "doubling,runtime=compile", "shape": SHAPE, "cycles": 2}
    scaling.contexts(pair, [40, 600], **options)
    windows = {tuple(idle.steps): idle.capacity for (idle,) in pair.sessions.values()}
    assert windows == {(256, 512, 1024): 1024} and len(pair.sessions) == 2  # with a tree, and plain
    pair.sessions.clear()
    scaling.contexts(pair, [600], **options)
    assert {tuple(idle.steps) for (idle,) in pair.sessions.values()} == {(1024,)}


def test_lengths_that_can_t_be_are_refused(pair):
    room = scaling.beyond(SHAPE, 2)
    with pytest.raises(
        ValueError, match=f"a prefix of 9,000 tokens and the {room} after it exceed the target's context"
    ):
        scaling.contexts(pair, [40, 9000], shape=SHAPE, cycles=2)
    for wrong in (0, -3, True, 1.5):
        with pytest.raises(ValueError, match="must be a whole number of tokens, at least 1"):
            scaling.contexts(pair, [wrong], shape=SHAPE, cycles=2)
    with pytest.raises(ValueError, match="too few for the usual prefixes"):
        scaling.contexts(pair, shape=SHAPE, cycles=2)
    with pytest.raises(ValueError, match="cycles is 0"):
        scaling.contexts(pair, [40], shape=SHAPE, cycles=0)
    assert scaling.lengths("1024,4096") == [1024, 4096]
    with pytest.raises(ValueError, match="give whole numbers with commas"):
        scaling.lengths("1k,4k")


def test_other_tokens_than_plain_decoding_s_are_an_error(pair, monkeypatch):
    real = scaling.plain_stream

    def odd(*args):
        for n, one in enumerate(real(*args)):
            yield one if n != 2 else one.__class__(one.prefix, (one.committed[0] ^ 1,), one.bonus)

    monkeypatch.setattr(scaling, "plain_stream", odd)
    with pytest.raises(
        ArmsDisagree, match="after 40 tokens 'mask=doubling' decodes other tokens than plain decoding"
    ):
        scaling.contexts(pair, [40], strategy="doubling", shape=SHAPE, cycles=3)


def test_an_answer_that_ends_is_followed_by_that_of_another_text(pair, monkeypatch):
    decoding = Decoding.of(4, "doubling", **asdict(SHAPE))
    eagle, plain, tie = scaling.one_length(pair, get_prompts(pair, 20), 40, decoding, 5, random.Random(0))
    assert len(eagle.first_s) == len(plain.first_s) > 1 and tie is None
    assert len(eagle.cycles_s) == len(plain.cycles_s) > 0
    with pytest.raises(ValueError, match="every answer after 40 tokens ended with its first cycle"):
        scaling.one_length(
            pair, get_prompts(pair, 20), 40, Decoding.of(1, "doubling", **asdict(SHAPE)), 5, random.Random(0)
        )


def test_a_text_is_prompts_one_after_the_other():
    prompts = [Prompt("a", "own", "", (1, 2)), Prompt("b", "own", "", (3, 4, 5))]
    assert scaling.text_of(prompts, 7) == (1, 2, 3, 4, 5, 1, 2)
    assert scaling.text_of(prompts, 4, first=3) == (3, 4, 5, 1)


def turns(seconds, tokens):
    return Turns(first_s=[2.0], cycles_s=[seconds * x for x in (0.9, 1.0, 1.1)], tokens=[tokens] * 3)


def context(prefix, eagle, plain, floor=True, tie=None):
    least = {"bytes": 1, "flops": 1, "memory_s": 0.0, "arithmetic_s": 0.0}
    parts = {name: Cost(**least, seconds=s) for name, s in (("cycle", eagle / 2), ("plain token", plain / 4))}
    known = Floor(prefix=prefix, bandwidth=1e9, rate=1e12, threads=1, parts=parts)
    return Context(
        prefix=prefix, eagle=turns(eagle, 2), plain=turns(plain, 1),
        floor=known if floor else Experts(setting="num_experts", experts=4), tie=tie,
    )  # fmt: skip


def record(rows, stated=3.0):
    settings = ContextsSettings(
        target="shape:tiny", draft="random", dtype="bfloat16", strategy="mask=cuda", **asdict(SHAPE), cycles=3, seed=0,
        stated_acceptance=stated,
    )  # fmt: skip
    return ContextsRecord(
        created="2026-01-01T00:00:00Z", command="x", environment=Environment.model_validate(ENVIRONMENT),
        settings=settings, contexts=rows,
    )  # fmt: skip


def test_what_a_record_says(tmp_path):
    rows = [context(1024, 0.008, 0.004), context(32768, 0.012, 0.008, floor=False)]
    found = record(rows)
    path = record_path(found, tmp_path)
    write(found, path)
    assert path.name == "contexts-cpu-tiny.json" and read(path, ContextsRecord) == found
    assert rows[0].eagle.quartiles == pytest.approx((0.0076, 0.008, 0.0084))
    assert (rows[0].floor_s, rows[0].plain_floor_s, rows[1].floor_s, rows[1].plain_floor_s) == (
        0.004, 0.001, None, None,
    )  # fmt: skip
    assert found.speed(rows[0]) == pytest.approx(1.5) and found.speed(rows[1]) == pytest.approx(2.0)
    assert record(rows, None).speed(rows[0]) == pytest.approx(1.0)


def test_the_words_of_long_contexts(snapshot):
    near, far = context(1024, 0.008, 0.004), context(32768, 0.012, 0.008, tie=TIE)
    told = [
        record([near, far]), record([near, far], None), record([near]), record([context(1024, 0.008, 0.004, floor=False)]), record([])
    ]  # fmt: skip
    snapshot("\n\n".join(report.contexts(one) for one in told), "contexts.md")


def test_the_chart_of_long_contexts():
    figure = charts.contexts(
        record([context(1024, 0.008, 0.004), context(32768, 0.012, 0.008, floor=False)]), "where"
    )
    eagle, least, plain, plain_least, speed = figure.data
    assert eagle.x == ("1,024", "32,768") and eagle.y == (8.0, 12.0) and plain.y == (4.0, 8.0)
    assert least.y == (4.0, None) and plain_least.y == (1.0, None) and speed.y == (1.5, 2.0)
    assert eagle.error_y.array == (0.4, 0.6)
