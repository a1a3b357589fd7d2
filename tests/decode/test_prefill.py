"""Prompts read padded, as a CUDA graph would replay it, give what reading them as they are gives."""

from __future__ import annotations

import pytest
import torch
from make import random_pair
from torch.utils._python_dispatch import TorchDispatchMode

from eagle_lab import generate, generate_plain
from eagle_lab.decode import prefill as prefills
from eagle_lab.decode import session as sessions
from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.forward import attention_set
from eagle_lab.decode.prefill import LENGTHS, captured_prefill, padded_lengths, prefill
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.models import cache as cache_module
from eagle_lab.models.cache import KeyValueCache, text_bytes

SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}


@pytest.fixture
def pair(tiny_pair, prepared):
    """The tiny pair, and a capture that keeps the step itself: exactly what a graph would record."""
    return tiny_pair


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


LONG = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 700}),
    "windows in some layers": ("gemma3_text", {"sliding_window": 700}),
}
# two layers each, so that 32,000 tokens take a minute
SMALL = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "window": ("mistral", {"sliding_window": 700, "num_hidden_layers": 2}),
    "windows in some layers": (
        "gemma3_text",
        {
            "sliding_window": 700,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def long_pair(kind, settings, length):
    """A random target that has room for so many tokens."""
    pair = random_pair(kind, context=length + 64, **settings)
    prompt = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return pair, prompt


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *((name, 2000) for name in LONG),
        *(pytest.param(name, length, marks=pytest.mark.slow) for name in SMALL for length in (8000, 16000)),
        pytest.param("llama", 32000, marks=pytest.mark.slow),
    ],
)
def test_a_long_prompt_read_in_pieces_gives_transformers_tokens(name, length):
    pair, prompt = long_pair(*(LONG if length == 2000 else SMALL)[name], length)
    with torch.inference_mode():
        wanted = pair.target.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, length:
        ].tolist()
    assert generate_plain(pair, prompt, 12).tokens == wanted
    assert generate(pair, prompt, 12, **SIZES).tokens == wanted
    if name == "llama" and length <= 8000:
        for strategy in ("tree", "attention=eager,cache=concat"):
            assert generate(pair, prompt, 12, strategy=strategy, **SIZES).tokens == wanted


@pytest.mark.parametrize("attention", ["sdpa", "tree"])
def test_pieces_leave_what_one_reading_leaves(monkeypatch, attention):
    """Token, the head's hidden state, and all keys and values; with the last piece whole, short, and of one token."""
    pair, prompt = long_pair("llama", {}, 97)
    strategy, none = parse(f"attention={attention}"), torch.zeros(1, dtype=torch.float64)
    left = {}
    for piece in (97, 48, 32, 40):
        monkeypatch.setattr(prefills, "PIECE", piece)
        own = caches(pair)
        with torch.inference_mode(), attention_set(pair, attention):
            done = prefill(pair, strategy, Sampling(), torch.tensor([prompt]), None, none, *own)
        left[piece] = (done.first, done.hidden, *(kept_of(cache, 97) for cache in own))
    assert [len(prefills.pieces(97)), prefills.pieces(81)[-1]] == [3, (80, 81)]
    for piece in (48, 32, 40):
        for one, other in zip(left[97], left[piece], strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("strategy", ["rebuild", "tree", "attention=eager"])
def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch, strategy):
    monkeypatch.setattr(prefills, "PIECE", 128)
    monkeypatch.setattr(cache_module, "PIECE", 128)
    largest, told = {}, {}
    for length in (1024, 2048, 4096):
        pair, prompt = long_pair("llama", {}, length)
        with Largest() as mode:
            generate(pair, prompt, 2, strategy=strategy, **SIZES)
        largest[length] = mode.bytes
        attention = parse(strategy).attention
        told[length] = text_bytes(pair.config, pair.head.config, pair.dtype, length + 20, attention=attention)
        assert mode.bytes <= told[length]
    for sizes in (largest, told):
        assert sizes[2048] < 2.2 * sizes[1024] and sizes[4096] < 2.2 * sizes[2048]


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(monkeypatch):
    pair, prompt = long_pair("llama", {}, 8000)
    monkeypatch.setattr(sessions, "free_bytes", lambda device, every: 20 * 2**20)

    def forward(*args, **kwargs):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(pair.target, "forward", forward)
    for decode in (generate, generate_plain):
        with pytest.raises(
            ValueError,
            match=r"a text of \d+ tokens needs .* MiB for its keys, values and masks, but cpu has 20.0 MiB",
        ):
            decode(pair, prompt, 8)
    with pytest.raises(ValueError, match="in 2 rows needs"):
        decode_batch(pair, [prompt, prompt], Decoding.of(8, **SIZES))
