"""Numbers that aren't finite become one error, whoever made them and however tokens are chosen."""

from __future__ import annotations

import pytest
import torch
from make import random_pair

from eagle_lab import generate, generate_plain
from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.sampling import Sampling, choose
from eagle_lab.decode.strategy import Decoding

PROMPT = [5, 9, 17, 31]
SIZES = {"top_k": 3, "depth": 2, "total_tokens": 6}


@pytest.fixture
def pair(prepared):
    """A small pair; a runtime that captures runs the step itself, which is what it would record."""
    return random_pair()


WAYS = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "top_k_sampling": 5, "top_p": 0.9, "seed": 1},
    {"strategy": "cuda_graph,doubling,attention=tree"},
]


def spoil(pair, who, value):
    weight = pair.head.lm_head.weight if who == "head" else pair.target.lm_head.weight
    weight.data = weight.data.clone()
    weight.data[11] = value


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_s_logits(pair, options, value):
    spoil(pair, "target", value)
    for decode in (generate, generate_plain):
        sizes = SIZES if decode is generate else {}
        for count in (1, 8):
            with pytest.raises(ValueError, match="the target's logits aren't finite in float32"):
                decode(pair, PROMPT, count, **options, **sizes)


@pytest.mark.parametrize("options", WAYS)
def test_a_head_s_scores(pair, options):
    spoil(pair, "head", float("nan"))
    with pytest.raises(
        ValueError, match="^the head's scores aren't finite in float32, .* load the pair with"
    ):
        generate(pair, PROMPT, 8, **options, **SIZES)
    assert len(generate_plain(pair, PROMPT, 8, **options).tokens) == 8  # it has no head


def test_both_are_named_and_a_batch_is_no_way_out(pair):
    spoil(pair, "head", float("nan"))
    with pytest.raises(ValueError, match="the head's scores"):
        decode_batch(pair, [PROMPT, PROMPT[:2]], Decoding.of(6, **SIZES))
    spoil(pair, "target", float("nan"))
    with pytest.raises(ValueError, match="the target's logits aren't"):
        decode_batch(pair, [PROMPT, PROMPT[:2]], Decoding.of(6), plain=True)


def test_numbers_that_turn_bad_in_the_middle_of_a_text(pair, monkeypatch):
    whole = generate_plain(pair, PROMPT, 8).tokens
    late = max(whole, key=whole.index)  # the last new kind of token
    embedding = pair.target.get_input_embeddings()
    embedding.weight.data = embedding.weight.data.clone()
    embedding.weight.data[late] = float("nan")
    assert late not in PROMPT
    with pytest.raises(ValueError, match="the target's logits aren't finite"):
        generate_plain(pair, PROMPT, 12)
    with pytest.raises(ValueError, match="aren't finite"):
        generate(pair, PROMPT, 12, **SIZES)


def test_a_session_that_met_bad_numbers_serves_the_next_prompt(pair):
    good = pair.target.lm_head.weight.data
    strategy = "cuda_graph,doubling,attention=tree"
    spoil(pair, "target", float("nan"))
    with pytest.raises(ValueError, match="aren't finite"):
        generate(pair, PROMPT, 8, strategy=strategy, **SIZES)
    pair.target.lm_head.weight.data = good
    assert (
        generate(pair, PROMPT, 8, strategy=strategy, **SIZES).tokens == generate_plain(pair, PROMPT, 8).tokens
    )


def test_a_token_that_can_t_be_is_not_a_fault():
    """A logit of -inf is a way to forbid a token; nothing is wrong as long as another is chosen."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0], [float("-inf")] * 3, [float("nan"), 0.0, 0.0]])
    uniform = torch.full((3,), 0.5, dtype=torch.float64)
    for sampling in (Sampling(), Sampling(1.0)):
        assert choose(logits, sampling, uniform)[1].tolist() == [True, False, False]
