"""Projections that share one product: the same numbers, in any order, and the modules put back as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from make import output, small_decoder
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from eagle_lab.models.checkpoints import save_draft
from eagle_lab.runtime import layers as regional
from eagle_lab.runtime.layers import compiled_layers
from eagle_lab.runtime.projections import (
    MATMULS,
    fuse_in_memory,
    fused,
    in_pieces,
    lone,
    transposed,
    whole,
)
from eagle_lab.runtime.swap import swapped

IDS = torch.arange(12)[None]


@pytest.fixture
def decoder():
    return small_decoder()


def test_weights_that_lie_together_are_what_they_were(decoder):
    before, expected = copy.deepcopy(decoder.state_dict()), output(decoder)
    assert fuse_in_memory(decoder) == 4  # attention and MLP of two layers
    after = decoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(output(decoder), expected)
    attention = decoder.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(whole(weights), torch.cat(weights))
    moved = copy.deepcopy(decoder).double().layers[0].mlp
    assert whole([moved.gate_proj.weight, moved.up_proj.weight]) is None


def test_fused_projections_give_the_same_and_are_put_back(decoder):
    expected, modules = output(decoder), dict(decoder.named_modules())
    with fused(decoder) as none:  # nothing lies together yet
        assert none.groups == 0
    fuse_in_memory(decoder)

    with fused(decoder) as found:
        assert found.groups == 4
        assert torch.allclose(output(decoder), expected, atol=1e-5)
        mlp = decoder.layers[0].mlp
        x, other = torch.randn(3, 32), torch.randn(3, 32)
        gate, up = modules["layers.0.mlp.gate_proj"], modules["layers.0.mlp.up_proj"]
        # the other order, and an input that changes before all parts were taken
        assert torch.allclose(mlp.up_proj(x), up(x), atol=1e-5)
        assert torch.allclose(mlp.gate_proj(other), gate(other), atol=1e-5)
        assert torch.allclose(mlp.up_proj(other), up(other), atol=1e-5)
        assert mlp.up_proj.shared.x is None and mlp.up_proj.shared.y is None
        # one part alone, and again after its input was written over
        assert torch.allclose(mlp.up_proj(x), up(x), atol=1e-5)
        x.copy_(other)
        assert torch.allclose(mlp.up_proj(x), up(other), atol=1e-5)
    assert dict(decoder.named_modules()) == modules


def test_a_compiled_layer_has_one_product_a_group_and_gives_its_output_and_a_norm(decoder, monkeypatch):
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(regional.torch, "compile", lambda f, **options: compile(f, backend=keep, **options))
    torch._dynamo.reset()
    counters.clear()
    expected = output(decoder)
    fuse_in_memory(decoder)
    with fused(decoder), compiled_layers(decoder):
        assert torch.allclose(output(decoder), expected, atol=1e-5)
    products = [sum(node.target is nn.functional.linear for node in graph.graph.nodes) for graph in graphs]
    # of a layer, instead of seven: of the first, whose norm nobody has made, and of the others; the angles have none
    assert sorted(products) == [0, 4, 4]
    layer = graphs[products.index(4)]
    # what the layer gives, and the next one's norm of it
    assert len(next(node for node in layer.graph.nodes if node.op == "output").args[0]) == 2
    assert not counters["graph_break"]


def test_projections_with_a_bias_or_of_another_kind_stay_as_they_are(decoder):
    attention, mlp = decoder.layers[0].self_attn, decoder.layers[1].mlp
    attention.q_proj = nn.Linear(32, 32, bias=True)
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    assert fuse_in_memory(decoder) == 2
    decoder.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    with fused(decoder) as found:
        assert found.groups == 1


def test_a_head_that_lies_together_is_saved_whole(tiny_pair, tmp_path):
    head = copy.deepcopy(tiny_pair.head)
    assert fuse_in_memory(head) == 2
    save_draft(head, tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in tiny_pair.head.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 5, 32), (3, 4, 32), (7, 32)])
def test_the_weight_before_the_rows_gives_the_same_product(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(48, 32)
    assert torch.allclose(transposed(x, weight), x @ weight.t(), atol=1e-5)


def test_each_projection_alone_is_made_as_asked_and_put_back(decoder):
    expected, modules = output(decoder), dict(decoder.named_modules())
    places = lone(decoder, "transposed")
    assert len(places) == 2 * 7, "four of attention and three of the MLP in each layer"
    with swapped(places):
        assert torch.allclose(output(decoder), expected, atol=1e-5)
        assert decoder.layers[1].mlp.down_proj is not modules["layers.1.mlp.down_proj"]
    assert dict(decoder.named_modules()) == modules


@pytest.mark.parametrize("product", ["library", "transposed"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 5, 64), (2, 3, 64)])
def test_a_product_in_pieces_is_the_whole_one_and_pauses_between_them(decoder, product, shape):
    """Also in how it lies in memory, which what reads it depends on."""
    pauses = []
    head = nn.Linear(64, 130, bias=False)
    model = nn.ModuleDict({"decoder": decoder, "head": head, "small": nn.Linear(64, 2, bias=False)})
    own = model._modules
    places = [
        p for p in in_pieces([model], product, 64 * 130 // 5, 9, lambda: pauses.append(1)) if p[0] is own
    ]
    assert [name for _, name, _ in places] == ["head"]
    x = torch.randn(shape)
    whole = MATMULS[product](x, head.weight)
    with swapped(places):
        found = model["head"](x)
    assert torch.allclose(found, whole, atol=1e-5) and len(pauses) == 4
    assert found.stride() == whole.stride()
    assert model["head"] is head
    assert max(p[2].pieces for p in in_pieces([model], product, 1, 3, print)) == 3


def test_a_projection_with_a_bias_or_a_hook_stays_as_it_is(decoder):
    decoder.layers[0].mlp.gate_proj = nn.Linear(32, 48, bias=True)
    decoder.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert len(lone(decoder, "transposed")) == 2 * 7 - 2
