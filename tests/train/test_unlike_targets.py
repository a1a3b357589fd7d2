"""Targets that ask more than the usual: a head is trained on what they compute, or nothing is."""

from __future__ import annotations

import pytest
import torch
from make import random_pair, random_target

from eagle_lab import generate
from eagle_lab.train.make_draft import strategy_on
from eagle_lab.train.packing import Reader, pack
from eagle_lab.train.text import Request, Text, Texts, TextSettings
from eagle_lab.train.train import _entry
from eagle_lab.train.writer import write

OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = [
    ("mistral", {"sliding_window": 6}),
    ("gemma3_text", {"sliding_window": 6}),
    ("gpt_oss", {"sliding_window": 6, **OSS}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_what_a_head_learns_from_has_the_targets_windows(kind, settings):
    """Two texts in one row, each longer than the window, read as the target reads each alone."""
    target, draw = random_target(kind, **settings), torch.Generator().manual_seed(3)
    texts = [tuple(torch.randint(1, 14, (n,), generator=draw).tolist()) for n in (19, 23)]
    batch = Reader(target, (2, 3, 4), pack(Texts.of([Text(t[:3], t[3:]) for t in texts]), 48, seed=0)).read(
        [0]
    )
    for text in texts:
        row = batch.ids[0].tolist()
        start = next(i for i in range(48 - len(text)) if tuple(row[i : i + len(text)]) == text)
        own = target(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False)
        taps = torch.cat([own.hidden_states[i][0] for i in (2, 3, 4)], -1)
        torch.testing.assert_close(batch.taps[0, start : start + len(text)], taps, atol=1e-4, rtol=1e-4)
        wanted = own.logits[0].argmax(-1)[3:-1]
        assert batch.top1[0, start + 3 : start + len(text) - 1].tolist() == wanted.tolist()


@pytest.mark.parametrize(("kind", "settings"), [("gpt_oss", OSS), ("qwen3", {})])
def test_acceptance_is_measured_with_an_attention_that_the_target_has(kind, settings):
    pair = random_pair(kind, **settings)
    assert strategy_on(pair) == "doubling,product=transposed" + ",attention=eager" * (kind == "gpt_oss")
    assert len(generate(pair, [5, 6, 7], 6, strategy=strategy_on(pair)).tokens) == 6


def test_text_of_logits_that_are_not_finite_is_refused():
    target = random_target("llama")
    target.get_input_embeddings().weight[9] = float("nan")  # only a text that comes to this token meets it
    requests = [(i, Request(prompt)) for i, prompt in enumerate([(5, 6), (5, 9)])]
    with pytest.raises(ValueError, match="the target's logits aren't finite in float32"):
        list(write(target, requests, TextSettings(batch=2, answer_tokens=12, greedy_share=1.0), []))


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(ValueError, match="the loss isn't finite at step 7"):
        _entry(7, 0.1, [float("nan"), 0.0, 2.0], 1.0)
