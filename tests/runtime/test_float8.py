"""Products of 8-bit numbers: what rounding may cost, the library's product against its definition, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import output, small_decoder
from torch import nn

from eagle_lab.runtime.kernels.float8 import (
    FLOAT8,
    Float8Linear,
    bytes_saved,
    float8_product,
    quantizable,
    quantize,
    rounded,
)
from eagle_lab.runtime.layers import compiled_layers
from eagle_lab.runtime.projections import fuse_in_memory, fused, in_8_bits, lone
from eagle_lab.runtime.swap import swapped


@pytest.fixture
def decoder():
    return small_decoder()


@given(
    st.integers(0, 2**31),
    st.floats(-30, 30),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_row_is_rounded_as_well_as_e4m3_can(seed, power, rows, dtype):
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x = (x * torch.logspace(-4, 4, 48)).to(dtype)
    values, scale = rounded(x)
    assert values.dtype == FLOAT8 and scale.shape == (rows, 1) and scale.dtype == torch.float32
    assert torch.equal(values.float().abs().amax(-1), torch.full((rows,), 448.0))
    off = (values.double() * scale.double() - x.double()).abs()
    # half of a step: 2^-4 of a normal number, 2^-10 of the scale below 2^-6
    assert bool((off <= torch.maximum(x.double().abs() / 16, scale.double() / 1024) * (1 + 1e-6)).all())


def test_rows_of_zeros_stay_zeros():
    values, scale = rounded(torch.zeros(2, 16))
    assert torch.equal(values.float(), torch.zeros(2, 16)) and bool((scale > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 5, 32), (3, 4, 32), (7, 32)])
def test_the_product_is_that_of_the_rounded_numbers(shape, dtype):
    torch.manual_seed(0)
    x, linear = torch.randn(shape).to(dtype), nn.Linear(32, 48).to(dtype)
    found = Float8Linear(linear)
    (rows, scales), weight = rounded(x), found.weight.double() * found.scale.double()[:, None]
    wanted = (rows.double() * scales.double()) @ weight.t() + linear.bias.double()
    got = found(x)
    assert got.shape == (*shape[:-1], 48) and got.dtype == dtype
    # a product's and a sum's rounding in the output's dtype
    assert torch.allclose(
        got.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps * 4
    )
    # each row by itself: the others of a batch don't matter
    alone = torch.cat(
        [float8_product(row[None], found.weight, found.scale, found.unit) for row in x.view(-1, 32)]
    )
    assert torch.allclose(alone.view(got.shape) + linear.bias, got, atol=4 * torch.finfo(dtype).eps)


def test_a_quantized_decoder_shares_products_and_gives_the_same(decoder):
    plain, before = output(decoder), sum(p.numel() * p.element_size() for p in decoder.parameters())
    saved = bytes_saved(decoder.layers)
    assert quantize(decoder.layers) == 14
    expected = output(decoder)
    off = float((expected - plain).norm() / plain.norm())
    assert 0 < off < 0.1
    assert before - sum(p.numel() * p.element_size() for p in decoder.parameters()) == saved
    weights = copy.deepcopy(decoder.state_dict())
    assert fuse_in_memory(decoder) == 4
    after = decoder.state_dict()
    assert all(torch.equal(weights[name].float(), after[name].float()) for name in weights)
    modules = dict(decoder.named_modules())
    for product in ("library", "early"):
        with fused(decoder, product) as found:
            assert (found.groups, found.early) == (4, 0)
            assert type(decoder.layers[0].mlp.up_proj) is not Float8Linear
            assert torch.allclose(output(decoder), expected, atol=1e-5)
    assert dict(decoder.named_modules()) == modules
    assert lone(decoder, "transposed") == []


def test_8_bit_projections_stand_in_for_a_while_and_share_products(decoder):
    plain, modules = output(decoder), dict(decoder.named_modules())
    weights = {name: weight.data_ptr() for name, weight in decoder.named_parameters()}
    places = in_8_bits(decoder, "head=fp8")
    assert dict(decoder.named_modules()) == modules
    assert {name: weight.data_ptr() for name, weight in decoder.named_parameters()} == weights
    assert torch.equal(output(decoder), plain)
    with swapped(places):
        rounded_once = output(decoder)
        with fused(decoder) as found:
            assert found.groups == 4
            assert torch.allclose(output(decoder), rounded_once, atol=1e-5)
    quantize(decoder.layers)  # the same numbers for good
    assert torch.equal(output(decoder), rounded_once) and not torch.equal(rounded_once, plain)


def test_a_quantized_layer_compiles_whole(decoder):
    quantize(decoder.layers)
    fuse_in_memory(decoder)
    expected = output(decoder)
    torch._dynamo.reset()
    with fused(decoder), compiled_layers(decoder):
        found = output(decoder)
    # a number on the edge between two is rounded to either
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_what_cannot_be_quantized_is_refused_before_anything_is_changed(decoder):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            quantize(decoder.layers)
        assert not any(isinstance(m, Float8Linear) for m in decoder.modules())

    whole = decoder.layers[1].mlp.up_proj
    decoder.layers[1].mlp.up_proj = nn.Linear(32, 40)
    refused("multiples of 16, and 1.mlp.up_proj has 32 inputs and 40 outputs")
    decoder.layers[1].mlp.up_proj = whole
    hook = whole.register_forward_hook(lambda *_: None)
    refused("1.mlp.up_proj is hooked")
    hook.remove()
    decoder.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 16, 16))
    refused(r"0.mlp \(LlamaMLP\) holds a matrix of another kind")
    del decoder.layers[0].mlp.experts
    assert len(list(quantizable(decoder.layers))) == 14
    assert len(list(quantizable(decoder))) == 14  # its embeddings are looked up
    decoder.layers[1].mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(ValueError, match="head=fp8 needs sizes that are multiples of 16"):
        in_8_bits(decoder, "head=fp8")


def test_a_long_sum_stays_finite_in_float16():
    """The bytes' sum is without its scales: of 4,096 numbers near 448 it is past float16's largest."""
    torch.manual_seed(0)
    linear = nn.Linear(4096, 32, bias=False)
    x = torch.randn(3, 4096)
    found = Float8Linear(linear)(x.half())
    assert found.dtype == torch.float16 and bool(found.isfinite().all())
    exact = linear(x)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
