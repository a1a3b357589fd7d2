"""Parts of a decoder compiled: one compilation for all layers, the same numbers, and nothing left behind."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaModel

from eagle_lab import regional
from eagle_lab.regional import KEPT, ROTARY, compiled_layers, compiled_parts, forget


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator, which takes minutes on a CPU: what is traced is what counts here."""
    compile = torch.compile
    monkeypatch.setattr(
        regional.torch, "compile", lambda f, **options: compile(f, backend="eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("inside, graphs", [(compiled_layers, 3), (compiled_parts, 3)])
def test_one_compilation_serves_all_layers(tiny_pair, traced, inside, graphs):
    decoder, ids = tiny_pair.target.get_decoder(), torch.arange(3, 15)[None]
    home = sys.modules[type(decoder).__module__]
    before = getattr(home, ROTARY)
    with torch.no_grad():
        expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
        with inside(decoder):
            found = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    forget(decoder)
    assert not any(KEPT in vars(place) for place in (home, *decoder.modules()))
    assert getattr(home, ROTARY) is before and not any(
        "forward" in vars(module) for module in decoder.modules()
    )


def test_what_was_compiled_does_not_keep_the_model(traced):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    decoder = LlamaModel(config)
    with torch.no_grad(), compiled_layers(decoder):
        decoder(input_ids=torch.arange(4)[None], use_cache=False)
    gone = weakref.ref(decoder.layers[0])
    del decoder
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_makes_the_norm_that_reads_its_output(tiny_pair, traced, monkeypatch, hooked):
    """The last norm finds itself made; where somebody listens to it, it is made where it stands."""
    decoder, ids = tiny_pair.target.get_decoder(), torch.arange(3, 15)[None]
    heard: list[int] = []
    hook = decoder.norm.register_forward_hook(lambda *_: heard.append(1)) if hooked else None
    found: list[bool] = []
    forward = regional._Ahead.forward
    monkeypatch.setattr(
        regional._Ahead, "forward", lambda self, x: (found.append(self.x is x), forward(self, x))[1]
    )
    try:
        with torch.no_grad():
            expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
            heard.clear()
            with compiled_layers(decoder):
                seen = decoder(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.allclose(seen, expected, atol=1e-6)
        assert len(heard) == hooked
        # inside a layer the tracer goes through it too, once for all layers
        assert not found if hooked else found and all(found)
        assert not any(isinstance(module, regional._Ahead) for module in decoder.modules())
    finally:
        if hook:
            hook.remove()
        forget(decoder)
