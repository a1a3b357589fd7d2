"""Arms in one process: heads beside one target, trees, plain decoding, all stretch by stretch of the same text."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from make import GOLDEN

from eagle_lab.decode.generate import decode, decode_plain
from eagle_lab.engines.arm import parse
from eagle_lab.engines.here import base_arm, check_arm, cycles, is_here, pair_of
from eagle_lab.measure.lockstep import lock_step
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.pair import shape_pair, with_head

PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]  # of golden.json: the golden head knows such text
TOKENS = 24


@pytest.fixture(scope="module")
def other_head(tiny_pair, tmp_path_factory):
    """The golden head with noise in its weights, saved: a worse head for the same target."""
    folder = tmp_path_factory.mktemp("heads") / "noisy"
    kept = {name: weight.clone() for name, weight in tiny_pair.head.named_parameters()}
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tiny_pair.head.midlayer.parameters():
            weight.add_(2.0 * weight.std() * torch.randn_like(weight))
        save_draft(tiny_pair.head, folder, "official")
        for name, weight in tiny_pair.head.named_parameters():
            weight.copy_(kept[name])
    return str(folder)


def in_step(pair, texts, max_new_tokens=TOKENS, seed=3):
    baseline = parse(texts[0], base_arm(pair))
    arms = [baseline, *(parse(text, baseline) for text in texts[1:])]
    for arm in arms:
        assert is_here(pair, arm)
        check_arm(pair_of(pair, arm), arm)

    def opens(arm):
        return lambda: cycles(pair, arm, PROMPT, max_new_tokens, seed)

    opened = [opens(arm) for arm in arms]
    return lock_step(pair, opened, max_new_tokens, random.Random(seed))


def test_arms_of_every_kind_decode_the_same_text_in_stretches(tiny_pair, other_head):
    texts = [
        "rebuild,total_tokens=15,depth=4", "plain", "total_tokens=7,top_k=2", f"draft={other_head}",
        "num_speculative_tokens=3",
    ]  # fmt: skip
    found = in_step(tiny_pair, texts)
    assert len(set(found.tokens)) == 1
    plain = decode_plain(tiny_pair, PROMPT, parse("plain").decoding(TOKENS)).tokens
    assert list(found.tokens[0]) == plain[: len(found.tokens[0])]
    for stretch in found.stretches:
        assert stretch.cycles[1] == stretch.tokens  # plain decoding commits one token a cycle
        assert stretch.cycles[0] <= stretch.tokens


def test_sampled_arms_draw_the_same_numbers(tiny_pair):
    found = in_step(tiny_pair, ["rebuild,temperature=1,top_p=0.9", "plain", "total_tokens=15,depth=3"])
    assert len(set(found.tokens)) == 1


def test_another_temperature_is_another_text(tiny_pair):
    # the first arm to part ends what both have decoded; no stretch is longer than the text they share
    assert len(set(in_step(tiny_pair, ["rebuild", "temperature=4"]).tokens)) == 2


def test_a_head_beside_another_decodes_as_it_does_alone(tiny_pair, other_head):
    from eagle_lab.models.pair import load

    decoding = parse("rebuild,total_tokens=15,depth=4").decoding(TOKENS)
    before = decode(tiny_pair, PROMPT, decoding)
    beside = with_head(tiny_pair, other_head)
    alone = load(GOLDEN / "target", other_head, device="cpu", dtype="float32")
    assert beside.target is tiny_pair.target and beside.origin["draft"] == other_head
    assert decode(beside, PROMPT, decoding) == decode(alone, PROMPT, decoding)
    assert decode(tiny_pair, PROMPT, decoding) == before
    assert len(before.cycles) != len(decode(beside, PROMPT, decoding).cycles)


def test_heads_of_the_same_taps_hear_once(tiny_pair, other_head):
    layers = tiny_pair.target.get_decoder().layers

    def hooks():
        return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers)

    before = hooks()
    with_head(tiny_pair, other_head)
    assert hooks() == before


@pytest.mark.parametrize(
    "text", ["dtype=bfloat16", "quantization=fp8", "target=other", "code=main", "python=python", "command=x"]
)
def test_what_needs_a_process_of_its_own(tiny_pair, text):
    assert not is_here(tiny_pair, parse(text, base_arm(tiny_pair)))


def test_what_cannot_run_is_said_before_any_work(tiny_pair):
    with pytest.raises(ValueError, match="brings its own head"):
        with_head(shape_pair("tiny", torch.device("cpu"), torch.float32), "x")
    with pytest.raises(ValueError, match="draft vocabulary has only"):
        check_arm(tiny_pair, replace(parse("top_k=1000,depth=1,total_tokens=5"), draft=tiny_pair.draft_name))
    with pytest.raises(ValueError, match="needs CUDA|needs a CUDA|cuda"):
        check_arm(tiny_pair, parse("runtime=cuda_graph"))


def test_a_plain_decode_of_one_token_commits_nothing(tiny_pair):
    (only,) = cycles(tiny_pair, parse("plain"), PROMPT, 1)
    assert (
        only.committed == ()
        and [only.bonus] == decode_plain(tiny_pair, PROMPT, parse("plain").decoding(1)).tokens
    )
