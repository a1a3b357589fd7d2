"""A batch gives each prompt what it gets alone."""

from __future__ import annotations

import json

import pytest
import torch
from make import GOLDEN, needs_gpu

from eagle_lab import generate, generate_plain, load
from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.strategy import Decoding

SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}


@pytest.fixture(scope="module")
def prompts():
    """Prompts of different lengths, cut from the golden runs."""
    cases = json.loads((GOLDEN / "golden.json").read_text())["cases"]
    whole = [run["prompt"] for case in cases for run in case["runs"]]
    return [whole[0], whole[1][:3], whole[0] + whole[1], whole[1][:1]]


@pytest.mark.parametrize("strategy", ["rebuild", "doubling,attention=tree", "attention=eager"])
def test_each_row_equals_its_own_decode(tiny_pair, prompts, strategy):
    together = decode_batch(tiny_pair, prompts, Decoding.of(20, strategy, **SIZES))
    alone = [generate(tiny_pair, prompt, 20, strategy=strategy, record=False, **SIZES) for prompt in prompts]
    assert [row.tokens for row in together] == [one.tokens for one in alone]
    assert [row.cycles for row in together] == [one.cycles for one in alone]
    assert len({len(row.cycles) for row in together}) > 1, "rows with equal acceptance would not test much"


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", "tree_fused"])
def test_each_row_of_a_replayed_batch_equals_its_own_decode(prompts, attention):
    """In one CUDA graph for all rows, each accepts what it accepts alone."""
    on_gpu = load(GOLDEN / "target", GOLDEN / "draft_official", device="cuda", dtype="float32")
    strategy = f"cuda_graph,doubling,attention={attention}"
    together = decode_batch(on_gpu, prompts, Decoding.of(20, strategy, **SIZES))
    alone = [generate(on_gpu, prompt, 20, **SIZES) for prompt in prompts]
    assert [row.tokens for row in together] == [one.tokens for one in alone]
    assert [len(row.cycles) for row in together] == [len(one.cycles) for one in alone]


def test_plain_rows_equal_their_own_decode(tiny_pair, prompts):
    together = decode_batch(tiny_pair, prompts, Decoding.of(12), plain=True)
    assert [row.tokens for row in together] == [
        generate_plain(tiny_pair, prompt, 12).tokens for prompt in prompts
    ]


def test_sampled_rows_draw_with_their_own_seed(tiny_pair, prompts):
    options = {"temperature": 1.0, **SIZES}
    together = decode_batch(tiny_pair, prompts[:3], Decoding.of(12, seed=5, **options))
    alone = [
        generate(tiny_pair, prompt, 12, seed=5 + row, **options).tokens
        for row, prompt in enumerate(prompts[:3])
    ]
    assert [row.tokens for row in together] == alone


def test_a_finished_row_idles_and_disturbs_nobody(tiny_pair, prompts, monkeypatch):
    """One row ends at once (its first token is an end-of-sequence id); the other's decode is as before."""
    first = generate_plain(tiny_pair, prompts[0], 1).tokens[0]
    other = next(p for p in prompts[1:] if first not in generate_plain(tiny_pair, p, 20).tokens)
    before = generate(tiny_pair, other, 20, **SIZES).tokens
    monkeypatch.setattr(type(tiny_pair), "eos", property(lambda self: frozenset([first])))
    rows = decode_batch(tiny_pair, [prompts[0], other], Decoding.of(20, **SIZES))
    assert rows[0].tokens == [first] and not rows[0].cycles
    assert rows[1].tokens == before


def test_idle_rows_stay_where_they_are(tiny_pair, prompts):
    """However long the others take, an idle row's length, root and hidden state do not move."""
    from eagle_lab.decode.sampling import Sampling
    from eagle_lab.decode.session import session
    from eagle_lab.decode.strategy import parse
    from eagle_lab.decode.tree import TreeShape

    shape = TreeShape(**SIZES)
    with torch.inference_mode(), session(tiny_pair, parse("doubling"), shape, Sampling(), 2, 80, 0) as ready:
        for row in range(2):
            prompt = torch.tensor([prompts[row]])
            ready.prefill(row, prompt, torch.zeros(1, 90, dtype=torch.float64))
        ready.state.active[0] = False
        before = [t[0].clone() for t in (ready.state.length, ready.state.root, ready.state.hidden)]
        for _ in range(3):
            ready.step()
            ready.state.visible_length = int(ready.state.length.max())
        after = [t[0] for t in (ready.state.length, ready.state.root, ready.state.hidden)]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert ready.state.length[1] >= len(prompts[1]) + 3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "the batch is empty"),
        ([[1], []], {}, "the prompt is empty"),
        ([[1], [2]], {"strategy": "cache=concat"}, "cache=concat holds one prompt, but the batch has 2"),
        ([[1], [2]], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_bad_batches_are_refused(tiny_pair, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        decode_batch(tiny_pair, prompts, Decoding.of(4, **options))
