"""Losslessness of every strategy, the exact number of tokens, and the refusal of bad input."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from make import GOLDEN

from eagle_lab import generate, generate_plain, load, stream
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.strategy import AXES, Decoding, check, unavailable
from eagle_lab.verdict.agreement import agree

CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
RUN = CASES[0]["runs"][0]
SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}
MASKS = [name for name in MASK_BUILDERS if unavailable("mask", name, "cpu") is None]
STRATEGIES = [
    f"cache={c},attention={a}" for c, a in itertools.product(AXES["cache"], ("sdpa", "eager", "tree"))
]


@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, "attention=tree,product=transposed", *(f"mask={name}" for name in MASKS)]
)
def test_every_strategy_gives_the_official_cycles_and_plain_tokens(tiny_pair, strategy):
    """All four golden runs: trees, committed tokens and bonus of each cycle, and the tokens of plain decoding."""
    for case in CASES:
        sizes = {name: case[name] for name in SIZES}
        for run in case["runs"]:
            found = generate(tiny_pair, run["prompt"], case["max_new_tokens"], strategy=strategy, **sizes)
            assert found.tokens == run["new_tokens"][: len(found.tokens)]
            assert found.tokens == generate_plain(tiny_pair, run["prompt"], case["max_new_tokens"]).tokens
            for one, golden in zip(found.cycles, run["cycles"], strict=False):
                assert [*one.tokens] == golden["tokens"] and [*one.committed] == golden["committed"]
                assert one.prefix == golden["prefix"] and one.bonus == golden["bonus"]


@pytest.mark.parametrize("strategy", ["rebuild", "doubling,attention=tree,product=transposed"])
def test_a_head_in_8_bits_drafts_others_and_the_tokens_stay(tiny_pair, strategy):
    for case in CASES:
        sizes, count = {name: case[name] for name in SIZES}, case["max_new_tokens"]
        for run in case["runs"]:
            found = generate(tiny_pair, run["prompt"], count, strategy=f"{strategy},head=fp8", **sizes)
            assert found.tokens == generate_plain(tiny_pair, run["prompt"], count).tokens
            whole = generate(tiny_pair, run["prompt"], count, strategy=strategy, **sizes)
            assert [c.scores for c in found.cycles] != [c.scores for c in whole.cycles]
            plain = generate_plain(tiny_pair, run["prompt"], count, strategy=f"{strategy},head=fp8")
            assert plain.tokens == found.tokens
            first, other = found.cycles[0], whole.cycles[0]
            # children of the same root, as likely but for the rounding
            assert first.scores[:2] == pytest.approx(other.scores[:2], abs=0.5)


@pytest.mark.parametrize("strategy", ["rebuild", "doubling,attention=tree"])
def test_a_quantized_target_gives_its_own_plain_tokens(strategy, monkeypatch):
    """In bfloat16, as on a GPU: rounding to 8 bits makes steps of rounding errors, so near ties may part."""
    monkeypatch.setattr(
        "eagle_lab.models.pair.check_quantization", lambda *_: "fp8"
    )  # a CPU computes the same
    draft = GOLDEN / "draft_official"
    pair = load(GOLDEN / "target", draft, "cpu", "bfloat16", quantization="fp8", verbose=False)
    prompt, count = RUN["prompt"], 16
    found = generate(pair, prompt, count, strategy=strategy, **SIZES)
    plain = generate_plain(pair, prompt, count).tokens
    where = agree(pair, prompt, found.tokens, plain, Decoding.of(count))
    # logits have a standard deviation of 4 here, and rounding takes them 1 to 2 apart
    assert where is None or (where.tie and where.position >= 3 and where.margin < 1)
    assert len(found.cycles) < len(found.tokens)  # the head still drafts for it


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_decoding_is_the_same_under_every_strategy(tiny_pair, strategy):
    expected = RUN["new_tokens"][:12]
    assert generate_plain(tiny_pair, RUN["prompt"], 12, strategy=strategy).tokens == expected


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.2, "top_p": 0.8, "seed": 4}]
)
def test_any_number_of_new_tokens_is_a_prefix_of_more(tiny_pair, options):
    whole = generate_plain(tiny_pair, RUN["prompt"], 14, **options).tokens
    for count in (1, 2, 5, 14):
        found = generate(tiny_pair, RUN["prompt"], count, strategy="doubling", **SIZES, **options)
        assert (
            found.tokens == whole[:count] == generate_plain(tiny_pair, RUN["prompt"], count, **options).tokens
        )


def test_streams_with_different_attention_do_not_mix(tiny_pair):
    left = stream(tiny_pair, RUN["prompt"], 16, strategy="tree", record=False, **SIZES)
    right = stream(
        tiny_pair, RUN["prompt"], 16, strategy="attention=eager,cache=concat", record=False, **SIZES
    )
    assert all(one == other for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("prompt", "count", "options", "message"),
    [
        ([], 4, {}, "the prompt is empty"),
        ([1, 512], 4, {}, "512, which is not a token id from 0 to 511"),
        ([1], 0, {}, "max_new_tokens is 0"),
        ([1], True, {}, "max_new_tokens is True"),
        (torch.tensor([[1, 2], [3, 4]]), 4, {}, "are 2 prompts; give one prompt at a time"),
        ([[1, 2], [3, 4]], 4, {}, "are 2 prompts"),
        (torch.tensor([1.0, 2.0]), 4, {}, "1.0, which is not a token id"),
        ("Hello", 4, {}, "must be a list of token ids"),
        ([True, 2], 4, {}, "True, which is not a token id"),
        ([1], 5000, {}, "exceed the target's context"),
        ([1], 4, {"total_tokens": 500}, "total_tokens is 500, but top_k=4 and depth=3 give only 52"),
        ([1], 4, {"top_k": 300, "total_tokens": 9}, "the draft vocabulary has only 256 tokens"),
        ([1], 4, {"strategy": "cuda_graph,doubling"}, "needs a CUDA GPU"),
    ],
)
def test_bad_input_is_refused_before_any_forward(tiny_pair, monkeypatch, prompt, count, options, message):
    def forward(*args, **kwargs):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(tiny_pair.target, "forward", forward)
    with pytest.raises(ValueError, match=message):
        generate(tiny_pair, prompt, count, **{**SIZES, **options})


@pytest.mark.parametrize(
    "form", [tuple, torch.tensor, lambda ids: torch.tensor([ids]), np.array, lambda ids: np.array([ids])]
)
def test_every_form_of_one_prompt_is_the_same_prompt(tiny_pair, form):
    wanted = generate(tiny_pair, RUN["prompt"], 4, **SIZES).tokens
    assert generate(tiny_pair, form(RUN["prompt"]), 4, **SIZES).tokens == wanted
    assert generate_plain(tiny_pair, form(RUN["prompt"]), 4).tokens == wanted


def test_check_lets_everything_through_that_can_run_here():
    for mask, cache in itertools.product(MASKS, AXES["cache"]):
        assert check(f"mask={mask},cache={cache}", "cpu").mask == mask


def test_nothing_that_decoding_asks_of_transformers_is_deprecated(tiny_pair, recwarn):
    generate(tiny_pair, [1, 124, 306, 281], 4, top_k=4, depth=3, total_tokens=16)
    generate_plain(tiny_pair, [1, 124, 306, 281], 4)
    assert not [str(one.message) for one in recwarn if "deprecated" in str(one.message)]
