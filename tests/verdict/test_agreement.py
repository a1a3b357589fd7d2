"""The judge of two decodes: same, tie, or bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eagle_lab.decode.generate import decode_plain, generate_plain
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding
from eagle_lab.engines.protocol import Decoded
from eagle_lab.models.pair import Pair, shape_pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import agree, drawn, first_difference, logits_in_shapes, parted

GREEDY = Decoding.of(8)
PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_equal_decodes_agree(tiny_pair):
    tokens = generate_plain(tiny_pair, PROMPT, 8).tokens
    assert agree(tiny_pair, PROMPT, tokens, list(tokens), GREEDY) is None


def test_a_wrong_token_is_no_tie_and_its_margin_is_the_targets(tiny_pair):
    tokens = generate_plain(tiny_pair, PROMPT, 8).tokens
    wrong = [*tokens[:5], (tokens[5] + 1) % 512, *tokens[6:]]
    found = agree(tiny_pair, PROMPT, tokens, wrong, GREEDY)
    logits = tiny_pair.target(torch.tensor([PROMPT + tokens[:5]])).logits[0, -1]
    assert (found.position, found.left, found.right) == (5, tokens[5], wrong[5])
    assert found.margin == pytest.approx(float(logits[tokens[5]] - logits[wrong[5]]), abs=1e-4)
    assert found.tolerance < 1e-3 < found.margin and not found.tie
    assert str(found).startswith(f"new token 5: {tokens[5]} and {wrong[5]}, logit margin ")


def test_another_arithmetic_s_margin_is_told_and_judged_by_no_tolerance(tiny_pair):
    tokens = generate_plain(tiny_pair, PROMPT, 8).tokens
    wrong = [*tokens[:5], (tokens[5] + 1) % 512, *tokens[6:]]
    prompt = Prompt("p", "own", "", tuple(PROMPT))
    one, other, theirs = (
        Decoded(seconds=1.0, tokens=ids) for ids in (tokens, wrong, [*tokens[:5], 512, *tokens[6:]])
    )
    logits = tiny_pair.target(torch.tensor([PROMPT + tokens[:5]])).logits[0, -1]
    margin = pytest.approx(float(logits[tokens[5]] - logits[wrong[5]]), abs=1e-4)
    found = parted(tiny_pair, prompt, one, other, GREEDY, judged=False)
    assert (found.position, found.left, found.right) == (5, tokens[5], wrong[5])
    assert found.margin == margin and found.tolerance is None and not found.tie
    assert str(found) == f"new token 5: {tokens[5]} and {wrong[5]}, logit margin {found.margin:.3g}"
    judged = parted(tiny_pair, prompt, one, other, GREEDY)
    assert judged.margin == margin and judged.tolerance < 1e-3
    assert parted(tiny_pair, prompt, one, one, GREEDY, judged=False) is None
    # a token that the pair's target lacks has no logit there
    beyond = parted(tiny_pair, prompt, one, theirs, GREEDY, judged=False)
    assert (beyond.position, beyond.right, beyond.margin, beyond.tolerance) == (5, 512, None, None)


def test_two_wrong_tokens_that_nearly_tie_with_each_other_are_no_tie(tiny_pair):
    logits = logits_in_shapes(tiny_pair, PROMPT)[0]
    low = logits.sort().indices[:2].tolist()
    assert not agree(tiny_pair, PROMPT, [low[0]], [low[1]], GREEDY).tie


def test_a_decode_that_ends_early_is_no_tie(tiny_pair):
    found = agree(tiny_pair, PROMPT, [174, 77], [174], GREEDY)
    assert found.position == 1 and not found.tie and found.margin is None and "ends there" in str(found)


def test_equal_logits_are_a_tie(tiny_pair):
    """Two vocabulary rows with the same weights: their logits are equal, whichever is taken."""
    first = generate_plain(tiny_pair, PROMPT, 1).tokens[0]
    other = (first + 7) % 512
    weight = tiny_pair.target.lm_head.weight
    kept = weight[other].clone()
    weight[other] = weight[first]
    try:
        found = agree(tiny_pair, PROMPT, [first], [other], GREEDY)
    finally:
        weight[other] = kept
    assert found.tie and found.margin == 0


def test_a_near_tie_in_bfloat16_is_measured(tiny_pair):
    """In half precision the three shapes differ, so the tolerance is a distance, and a far token is still wrong."""
    import copy

    head = copy.deepcopy(tiny_pair.head).to(torch.bfloat16)
    pair = Pair(
        copy.deepcopy(tiny_pair.target).to(torch.bfloat16), head, None, tiny_pair.device, torch.bfloat16,
        "tiny", "tiny",
    )  # fmt: skip
    rows = logits_in_shapes(pair, PROMPT)
    far = int(rows[0].argmin())
    found = agree(pair, PROMPT, [int(rows[0].argmax())], [far], GREEDY)
    assert found.tolerance >= 2 * 2**-7 * 0.9 * float(rows[0].max()) and not found.tie


def test_in_half_precision_logits_are_taken_by_another_attention_too():
    """The three shapes may share their kernels; the error of rounding is then only seen by another arithmetic."""
    cpu = torch.device("cpu")
    for quantization in ("", "fp8"):
        pair = shape_pair("tiny", cpu, torch.bfloat16, quantization=quantization)
        rows = logits_in_shapes(pair, PROMPT)
        assert len(rows) == len(logits_in_shapes(shape_pair("tiny", cpu, torch.float32), PROMPT)) + 1
        assert torch.equal(rows[-1], logits_in_shapes(pair, PROMPT, "eager")[0])
        assert float((rows[-1] - rows[0]).abs().max()) > 0
    pair.target._supports_sdpa = False  # as transformers says of classes that have eager attention alone
    pair.target.set_attn_implementation("eager")
    assert len(logits_in_shapes(pair, PROMPT, "eager")) == len(rows) - 1


def test_sampled_decodes_are_judged_by_the_cumulative_distribution(tiny_pair):
    options = {"temperature": 1.0, "seed": 5}
    tokens = generate_plain(tiny_pair, PROMPT, 6, **options).tokens
    wrong = [*tokens[:3], (tokens[3] + 100) % 512, *tokens[4:]]
    found = agree(tiny_pair, PROMPT, tokens, wrong, Decoding.of(6, **options))
    assert found.position == 3 and found.unit == "probability" and not found.tie
    with pytest.raises(ValueError, match="only with their seed"):
        agree(tiny_pair, PROMPT, tokens, wrong, Decoding.of(6, temperature=1.0))


@pytest.mark.parametrize(
    ("drawn_at", "fits"),
    [((1.0, 1.0, 0), True), ((0.7, 1.0, 0), False), ((1.3, 1.0, 0), False), ((1.0, 0.8, 0), False), ((1.0, 1.0, 5), False)],
)  # fmt: skip
def test_tokens_drawn_by_other_numbers_fit_the_distribution_that_they_were_drawn_from(
    tiny_pair, drawn_at, fits
):
    prompts = [Prompt(f"p{n}", "own", "", tuple(PROMPT[: 6 + n % 3])) for n in range(16)]
    decodes = [
        (p, Decoded(seconds=1.0, tokens=decode_plain(tiny_pair, p.ids, decoding).tokens))
        for n, p in enumerate(prompts)
        for decoding in [replace(GREEDY, sampling=Sampling(*drawn_at), max_new_tokens=16, seed=900 + n)]
    ]
    found = drawn(tiny_pair, decodes, Sampling(1.0))
    assert found.tokens > 240 and (found.p_value > 0.01 if fits else found.p_value < 1e-4)
