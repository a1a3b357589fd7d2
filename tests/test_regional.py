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
