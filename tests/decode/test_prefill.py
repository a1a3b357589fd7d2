"""Prompts read padded, as a CUDA graph would replay it, give what reading them as they are gives."""

from __future__ import annotations

import pytest
import torch

from eagle_lab import generate, stream
from eagle_lab.decode import prefill as prefills
from eagle_lab.decode import session as sessions
from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.forward import attention_set
from eagle_lab.decode.prefill import LENGTHS, captured_prefill, padded_lengths, prefill
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.models.cache import KeyValueCache
from eagle_lab.runtime import needs
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime.prepare import Prepared

SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}


@pytest.fixture
def pair(tiny_pair, monkeypatch):
    """The tiny pair, and a capture that keeps the step itself: exactly what a graph would record."""
    monkeypatch.setattr(needs, "missing", lambda what, needed, device: None)
    monkeypatch.setattr(
        runtime, "prepare", lambda name, step, reset, device, pool=None: Prepared(step, 0.0, 0)
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for kept in (tiny_pair.sessions, tiny_pair.prefills):
        kept.clear()
    yield tiny_pair
    for kept in (tiny_pair.sessions, tiny_pair.prefills):
        kept.clear()


def caches(pair, rows=1, slots=128):
    c = pair.head.config
    head = KeyValueCache([pair.device], rows, c.num_key_value_heads, slots, c.head_size, pair.dtype)
    return pair.new_cache(rows, slots), head


def kept_of(cache, count):
    return torch.cat([buffer[..., :count, :].flatten() for buffer in cache.buffers.values()])


@pytest.mark.parametrize("attention", ["sdpa", "tree", "eager"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_prompt_is_read_as_it_is(pair, attention, temperature):
    """Token, hidden state, and the keys and values of both models; one prefill after another prompt's padding."""
    plan, sampling = parse(f"doubling,attention={attention}"), Sampling(temperature)
    ready = captured_prefill(pair, plan, sampling, True, LENGTHS[0])
    generator = torch.Generator().manual_seed(1)
    for count in (LENGTHS[0], 1, 2, 17):  # the first fills what the later ones leave as padding
        ids = torch.randint(3, pair.config.vocab_size, (1, count), generator=generator)
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        own, padded = caches(pair), caches(pair)
        with torch.inference_mode():
            with attention_set(pair, attention):
                expected = prefill(pair, plan, sampling, ids, None, uniform, *own)
            found = ready.run(ids, uniform, *padded)
        assert torch.equal(found.first, expected.first)
        assert torch.allclose(found.hidden, expected.hidden, atol=1e-4)
        for one, other in zip(own, padded, strict=True):
            assert torch.allclose(kept_of(one, count), kept_of(other, count), atol=1e-4)


def test_a_prefills_token_outlives_the_next_prompt(pair):
    ready = captured_prefill(pair, parse("doubling"), Sampling(), False, LENGTHS[0])
    none = torch.zeros(1, dtype=torch.float64)
    with torch.inference_mode():
        first = ready.run(torch.tensor([[5, 6, 7]]), none, caches(pair)[0], None)
        kept = int(first.first)
        ready.run(torch.tensor([[9, 8]]), none, caches(pair)[0], None)
    assert int(first.first) == kept and first.hidden is None


def test_padded_lengths_fit_the_cache_and_long_prompts_are_read_as_they_are(pair, monkeypatch):
    assert padded_lengths(256) == [64, 128, 256] and padded_lengths(32) == []
    assert padded_lengths(1 << 20) == list(LENGTHS)
    asked = []
    monkeypatch.setattr(prefills, "LENGTHS", (8, 16))
    real = sessions.captured_prefill
    monkeypatch.setattr(sessions, "captured_prefill", lambda *a: asked.append(a[-1]) or real(*a))
    strategy = "cuda_graph,doubling"
    for count, wanted in ((5, 8), (9, 16), (20, None)):
        prompt = list(range(3, 3 + count))
        expected = generate(pair, prompt, 8, **SIZES).tokens
        generate(pair, prompt, 8, strategy=strategy, **SIZES)  # makes ready
        asked.clear()
        assert generate(pair, prompt, 8, strategy=strategy, **SIZES).tokens == expected
        assert asked == ([wanted] if wanted else [])


def test_the_pairs_sessions_share_their_prefills(pair):
    for tokens in (8, 12):
        for sizes in (SIZES, {**SIZES, "total_tokens": 7}):
            generate(pair, [4, 5, 6], tokens, strategy="cuda_graph,doubling", **sizes)
    assert len(pair.sessions) == 2
    assert (
        len(pair.prefills) == len(padded_lengths(sessions.SMALLEST_WINDOW)) + 1
    )  # and the pool that they share
    (idle, *_) = pair.sessions.values()
    assert idle[0].report()["readings"][0][1] > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_prompts_of_a_batch_are_read_each_at_its_length(pair, temperature):
    prompts = [list(range(3, 3 + count)) for count in (5, 64, 65, 128, 3, 150)]
    options = {"temperature": temperature, "seed": 3, **SIZES}
    found = decode_batch(pair, prompts, Decoding.of(10, "cuda_graph,doubling", **options))
    usual = decode_batch(pair, prompts, Decoding.of(10, "doubling", **options))
    assert [row.tokens for row in found] == [row.tokens for row in usual]


def test_two_streams_share_a_prefill(pair):
    prompts = [[5, 6, 7, 8], [9, 10]]
    options = {"strategy": "cuda_graph,doubling", "record": False, **SIZES}
    left, right = (stream(pair, prompt, 12, **options) for prompt in prompts)
    both = [next(left), next(right), *left, *right]
    alone = [list(stream(pair, prompt, 12, **options)) for prompt in prompts]
    assert both == [alone[0][0], alone[1][0], *alone[0][1:], *alone[1][1:]]
