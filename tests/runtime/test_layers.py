"""Parts of a decoder compiled: few compilations for all layers, the same numbers, and nothing left behind."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from make import forget
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaModel

from eagle_lab.runtime import layers as regional
from eagle_lab.runtime.layers import KEPT, ROTARY, compiled_layers, compiled_parts
from eagle_lab.train.packing import Reader

IDS = torch.arange(3, 15)[None]


def output(decoder, ids=IDS):
    with torch.no_grad():
        return decoder(input_ids=ids, use_cache=False).last_hidden_state


def norms_of(graph):
    return sum(node.target is torch.rsqrt for node in graph.graph.nodes)


@pytest.fixture
def ran(monkeypatch):
    """Of each run of something compiled, how many norms are in it.

    Without torch.compile's code generator, which takes minutes on a CPU: what is traced is what counts here.
    """
    found: list[int] = []

    def backend(graph, inputs):
        def run(*args):
            found.append(norms_of(graph))
            return graph.forward(*args)

        return run

    compile = torch.compile
    monkeypatch.setattr(
        regional.torch, "compile", lambda f, **options: compile(f, backend=backend, **options)
    )
    torch._dynamo.reset()
    counters.clear()
    return found


@pytest.fixture
def decoder(tiny_pair):
    """Of the pair that all tests share, so without what an earlier one compiled for it."""
    decoder = tiny_pair.target.get_decoder()
    forget(decoder)
    yield decoder
    forget(decoder)


# layers: the first and the others; of the parts: norm, MLP and rotation; beside the layers the angles
@pytest.mark.parametrize("inside, graphs", [(compiled_layers, 3), (compiled_parts, 3)])
def test_what_is_compiled_serves_all_layers(decoder, ran, inside, graphs):
    home = sys.modules[type(decoder).__module__]
    before, modules, expected = getattr(home, ROTARY), dict(decoder.named_modules()), output(decoder)
    with inside(decoder):
        found = output(decoder)
    assert ran and torch.allclose(found, expected, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    forget(decoder)
    assert not any(KEPT in vars(place) for place in (home, *decoder.modules()))
    assert getattr(home, ROTARY) is before and dict(decoder.named_modules()) == modules
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_a_target_reads_rows_of_many_shapes(tiny_pair, decoder, ran):
    """As on CUDA, where the layers are compiled: more compilations than torch's limit for one function."""
    lengths = range(4, 10)
    for length in lengths:
        one = torch.arange(length)[None]
        rows = {"ids": one + 3, "document": one * 0, "positions": one, "answer": one > 1}
        reader = Reader(tiny_pair.target, (1,), rows)
        expected = reader.read([0])
        reader.device = torch.device("cuda")  # of which it asks the kind alone
        found = reader._run(rows)
        assert torch.allclose(found["final"], expected.final, atol=1e-6)
        assert torch.allclose(found["taps"], expected.taps, atol=1e-6)
    layers = len(decoder.layers)
    assert sorted(ran) == sorted([0, 3, *[2] * (layers - 1)] * len(lengths))


def test_what_was_compiled_does_not_keep_the_model(ran):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    decoder = LlamaModel(config)
    with compiled_layers(decoder):
        output(decoder)
    gone = weakref.ref(decoder.layers[0])
    del decoder
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("hooked", [None, "register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_makes_the_norm_that_reads_its_output(decoder, ran, monkeypatch, hooked):
    """No norm is made twice; where somebody listens to one, each is made where it stands."""
    expected, layers = output(decoder), len(decoder.layers)
    heard: list[int] = []
    hook = getattr(decoder.norm, hooked)(lambda *_: heard.append(1)) if hooked else None
    eager: list[nn.Module] = []
    forward = type(decoder.norm).forward

    def listening(norm, x):
        if not torch.compiler.is_compiling():
            eager.append(norm)
        return forward(norm, x)

    monkeypatch.setattr(type(decoder.norm), "forward", listening)
    try:
        with compiled_layers(decoder):
            for _ in range(2):
                assert torch.allclose(output(decoder), expected, atol=1e-6)
            waiting = [module for module in decoder.modules() if isinstance(module, regional._Ahead)]
            assert len(waiting) == (0 if hooked else layers)
            assert all(module.x is None and module.y is None for module in waiting)
        assert not eager and len(heard) == (2 if hooked else 0)
        apart = [1, *[2] * layers]  # the last norm, and two in each layer
        ahead = [3, *[2] * (layers - 1)]  # the first layer's own, and in each layer the one after it
        assert sorted(ran) == sorted([0, *(apart if hooked else ahead)] * 2)
    finally:
        if hook:
            hook.remove()


@pytest.mark.parametrize("index", [0, -1])
def test_a_hook_may_give_another_tensor_than_its_layer(decoder, ran, index):
    hook = decoder.layers[index].register_forward_hook(lambda module, args, out: out + 1)
    try:
        expected = output(decoder)
        with compiled_layers(decoder):
            assert torch.allclose(output(decoder), expected, atol=1e-6)
    finally:
        hook.remove()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.input_layernorm(x)), None


class _GivesTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(_Layer() for _ in range(3)), nn.RMSNorm(8)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return self.norm(x)


def test_of_a_layer_that_gives_a_tuple_nothing_is_made_ahead(ran):
    decoder, x = _GivesTuples(), torch.randn(5, 8)
    with torch.no_grad():
        expected = decoder(x)
        with compiled_layers(decoder):
            assert torch.allclose(decoder(x), expected, atol=1e-6)
    # every layer and the last norm run compiled: the first layer, the others and the norm
    assert len(ran) == len(decoder.layers) + 1 and counters["stats"]["unique_graphs"] == 3
