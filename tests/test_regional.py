"""Parts of a decoder compiled: one compilation for all layers, the same numbers, and nothing left behind."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.utils import counters

from eagle_lab import regional
from eagle_lab.regional import ROTARY, compiled_layers, compiled_parts


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator, which takes minutes on a CPU: what is traced is what counts here."""
    compile = torch.compile
    monkeypatch.setattr(
        regional.torch, "compile", lambda f, **options: compile(f, backend="eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("inside, graphs", [(compiled_layers, 1), (compiled_parts, 3)])
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
    assert getattr(home, ROTARY) is before and not any(
        "forward" in vars(module) for module in decoder.modules()
    )
