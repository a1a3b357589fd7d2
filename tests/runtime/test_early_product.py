"""Products that ask for their weights early: what they compute, and when they are used."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from make import GOLDEN, forget, interpreted, needs_gpu, skip_where_it_cannot_loop
from torch import nn
from transformers import AutoModelForCausalLM

from eagle_lab import generate, generate_plain
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import new_session
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.decode.tree import TreeShape
from eagle_lab.models.pair import load
from eagle_lab.runtime import projections
from eagle_lab.runtime.projections import fuse_in_memory, fused
from eagle_lab.verdict.agreement import agree, settle

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
SHAPES = [
    (64, 960, 576),
    (64, 3072, 576),
    (10, 576, 1536),
    (1, 33, 40),
    (9, 96, 1728),
    (37, 50, 130),
    (64, 31, 513),
]
STREAMED = [
    (37, 200, 3840),
    (64, 70, 4096),
    (10, 65, 14336),
    (1, 16385, 3712),
    (64, 16385, 384),
]  # in float16
RUNS = json.loads((GOLDEN / "golden.json").read_text())["cases"][0]["runs"]

INTERPRETED = """
import torch
from eagle_lab.runtime.kernels.early_product import early_product
from test_early_product import SHAPES

for rows, outputs, inputs in SHAPES:
    x, weight = torch.randn(1, rows, inputs), torch.randn(outputs, inputs)
    torch.testing.assert_close(early_product(x, weight), x @ weight.T, atol=1e-3, rtol=1e-4)
    # rows of a longer tensor, which do not lie next to each other
    torch.testing.assert_close(early_product(x[..., ::2], weight[:, ::2].clone()), x[..., ::2] @ weight[:, ::2].T, atol=1e-3, rtol=1e-4)
two = torch.randn(2, 5, 48)
torch.testing.assert_close(early_product(two, torch.ones(3, 48)), two @ torch.ones(48, 3), atol=1e-3, rtol=1e-4)
for wrong in (torch.ones(3, 47), torch.ones(3, 48, dtype=torch.float16), torch.ones(48, 3).T):
    try:
        early_product(two, wrong)
    except ValueError as error:
        assert "needs a contiguous weight [outputs, 48]" in str(error)
    else:
        raise AssertionError(wrong)
print("equal")
"""  # fmt: skip


STREAMING = """
import torch
from eagle_lab.runtime.kernels.early_product import early_product
from test_early_product import STREAMED

for rows, outputs, inputs in STREAMED:
    # whole numbers are exact; the interpreter has no bfloat16
    x, weight = torch.randint(0, 3, (1, rows, inputs)).half(), torch.randint(-1, 2, (outputs, inputs)).half()
    assert torch.equal(early_product(x, weight).float(), (x.float() @ weight.float().T).half().float())
print("equal")
"""


def test_the_kernel_under_triton_s_interpreter():
    done = interpreted(Path(__file__).parent, INTERPRETED)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_streaming_kernel_under_triton_s_interpreter():
    done = interpreted(Path(__file__).parent, STREAMING)
    skip_where_it_cannot_loop(done)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_product_is_cut_so_that_all_of_it_is_covered():
    from eagle_lab.runtime.kernels.early_product import MOST_ROWS, MOST_SPLITS, WIDEST, plan

    for rows, outputs, inputs in SHAPES:
        for item in (2, 4):
            cut = plan(rows, outputs, inputs, item)
            assert cut is not None and inputs * item <= cut.splits * WIDEST and 1 <= cut.splits <= MOST_SPLITS
    assert plan(64, 3072, 576).outputs == 64 and plan(64, 3072, 576).warps == 8
    assert plan(MOST_ROWS + 1, 64, 64) is None
    assert plan(1, 49152, 576) is None  # a vocabulary
    assert plan(1, 64, WIDEST // 2 * MOST_SPLITS + 1) is None
    assert plan(1, 8192, 256, 4) is not None and plan(1, 16384, 256, 4) is None


def test_a_large_product_is_streamed_in_whole_turns_that_fit_into_shared_memory():
    from eagle_lab.runtime.kernels.early_product import (
        H100_SHARED,
        MOST_ROWS,
        MOST_SPLITS,
        STREAMS,
        TURN,
        plan,
        stages_in,
    )

    large = [*STREAMED, (64, 28672, 4096), (3, 4096, 14336), (20, 128256, 2048)]
    for rows, outputs, inputs, item in [
        *((*shape, 2) for shape in large),
        (64, 64, 256, 1),
        (10, 4096, 12288, 1),
    ]:
        cut = plan(rows, outputs, inputs, item)
        assert cut.stages > 0 and rows <= cut.rows <= MOST_ROWS and 1 <= cut.splits <= MOST_SPLITS
        assert inputs * item % (cut.splits * TURN) == 0
        assert cut.splits == 1 or cut.splits * -(-outputs // cut.outputs) <= STREAMS
        # what one asks for is what is launched on an H100, and fewer stages where a program has less memory
        assert stages_in(cut, H100_SHARED) == cut.stages > stages_in(cut, 101_376) >= 1
    assert plan(64, 4096, 14336).splits == 2 and plan(64, 28672, 4096).splits == 1
    assert plan(65, 28672, 4096) is None and plan(64, 28672, 4100) is None  # too many rows; no whole turns
    assert plan(64, 28672, 4096, 4) is None  # numbers of four bytes


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_compiles_it_for_an_h100_and_only_weights_are_read_before_the_wait(shape, early, for_h100):
    """As it is launched for these shapes. What Triton makes first names the parameters, so it says what is read where."""
    from eagle_lab.runtime.kernels import early_product

    kernel, cut = early_product.product_kernel, early_product.plan(*shape)
    sizes = early_product.extents(cut, shape[2])
    fixed = {"ROWS": cut.rows, "OUTPUTS": cut.outputs, **sizes, "EARLY": early}
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16" if cut.splits == 1 else "*fp32"}
    made = for_h100(kernel, fixed, types, num_warps=cut.warps)
    ptx = made["ptx"]
    assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == early
    if not early:
        return
    _, top, body = re.split(r"(tt\.func .*\n)", made["ttir"])
    x, weight, out = re.findall(r"(%\w+): !tt\.ptr", top)
    before, after = re.split(r".*(?:grid_dependency_wait|griddepcontrol\.wait).*", body)
    assert not used(x, before) and not used(out, before) and used(weight, before)
    assert used(x, after) and used(out, after)
    loads = 1 + (sizes["REST"] > 0)
    assert before.count("tt.load ") == after.count("tt.load ") == loads
    # and it stays so: weights are asked for before the wait, and nothing is written
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert "ld.global" in before and "st.global" not in before


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("shape", [shape for shape in STREAMED if shape[2] % 256 == 0])
def test_triton_compiles_the_streaming_one_for_an_h100_and_nothing_is_read_before_the_wait(
    shape, dtype, early, for_h100
):
    from eagle_lab.runtime.kernels import early_product

    item = 2 if dtype == "bf16" else 1
    cut = early_product.plan(*shape, item)
    fixed = {
        "ROWS": cut.rows, "OUTPUTS": cut.outputs, "TURN": early_product.TURN // item, "AHEAD": early_product.AHEAD, "EARLY": early,
    }  # fmt: skip
    types = {"x": f"*{dtype}", "weight": f"*{dtype}", "out": "*bf16" if cut.splits == 1 else "*fp32"}
    aligned = ("x", "weight", "out", "inputs", "span")
    made = for_h100(
        early_product.stream_kernel, fixed, types, aligned, num_warps=cut.warps, num_stages=cut.stages
    )
    ptx = made["ptx"]
    assert (
        "wgmma" in ptx and "cp.async.cg" in ptx
    )  # whole lines of weights, as one is multiplied the next come
    for instruction in (
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
        "cp.async.bulk.prefetch.L2",
    ):
        assert (instruction in ptx) == early
    if early:
        before = ptx[: ptx.index("griddepcontrol.wait")]
        assert "prefetch.L2" in before and "ld.global" not in before and "cp.async.cg" not in before
        _, top, body = re.split(r"(tt\.func .*\n)", made["ttir"])
        x, weight, out = re.findall(r"(%\w+): !tt\.ptr", top)
        first, _ = re.split(r".*(?:grid_dependency_wait|griddepcontrol\.wait).*", body)
        assert not used(x, first) and not used(out, first) and used(weight, first)


def used(value: str, lines: str) -> bool:
    """Whether a value of Triton's intermediate form is an operand there."""
    return re.search(rf"{value}\b", lines) is not None


def test_the_shapes_are_cut_with_a_rest_and_without():
    from eagle_lab.runtime.kernels.early_product import extents, plan

    found = [(extents(plan(*shape), shape[2]), plan(*shape), shape[2]) for shape in SHAPES]
    assert {sizes["REST"] > 0 for sizes, _, _ in found} == {True, False}
    for sizes, cut, inputs in found:
        span, first, rest = sizes["SPAN"], sizes["FIRST"], sizes["REST"]
        assert span * cut.splits >= inputs and first <= span <= first + rest
        assert all(size & (size - 1) == 0 for size in (first, rest))


def test_the_logits_are_made_early_alone_where_their_weight_is_plain(monkeypatch):
    from eagle_lab.runtime.layers import compiled_early

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made = []

    def product(x, weight):
        made.append(tuple(weight.shape))
        return x @ weight.T

    monkeypatch.setitem(projections.MATMULS, "early", product)
    x, logits = torch.randn(2, 8), nn.Linear(8, 40, bias=False)
    with torch.no_grad():
        expected = logits(x)
        with compiled_early(logits, 2):
            assert torch.equal(logits(x), expected) and made == [(40, 8)]
        assert "forward" not in vars(logits)
        biased, hooked = nn.Linear(8, 40), nn.Linear(8, 40, bias=False)
        hooked.register_forward_hook(lambda *_: None)
        for other in (biased, hooked):
            with compiled_early(other, 2):
                other(x)
        with compiled_early(logits, 65), compiled_early(None, 2):  # too many rows; no such projection
            logits(x)
    assert len(made) == 1


def test_8_bit_projections_take_the_early_product_alone_and_in_groups(monkeypatch):
    from eagle_lab.runtime.kernels import float8
    from eagle_lab.runtime.kernels.float8 import quantize

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(256, 48, bias=False), nn.Linear(256, 48, bias=False)
            self.down_proj, self.narrow = nn.Linear(256, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x):
            both = torch.cat((self.gate_proj(x), self.up_proj(x)), -1).repeat(1, 3)[..., :256]
            return self.narrow(self.down_proj(both))

    made = []

    def multiply(rows, weight, unit, dtype):
        made.append(tuple(weight.shape))
        return float8.library(rows, weight, unit, dtype)

    monkeypatch.setitem(projections.MULTIPLIES, "early", multiply)
    mlp, x = Mlp(), torch.randn(3, 256)
    quantize(mlp)
    fuse_in_memory(mlp)
    with torch.no_grad():
        expected = mlp(x)
        with fused(mlp, "early", rows=3) as count:
            assert (count.groups, count.early) == (1, 2)
            assert torch.allclose(mlp(x), expected, atol=1e-5)
        assert made == [(96, 256), (16, 256)]  # the narrow one's inputs are no whole turn


def test_few_rows_are_the_kernel_s_and_others_the_library_s(monkeypatch):
    from eagle_lab.runtime.kernels import early_product

    made = []

    def kernel(x, weight):
        made.append(tuple(x.shape))
        return x @ weight.T

    monkeypatch.setattr(early_product, "early_product", kernel)
    weight = torch.randn(32, 16)
    for rows in (3, early_product.MOST_ROWS + 1):
        x = torch.randn(1, rows, 16)
        assert torch.allclose(projections.early(x, weight), x @ weight.T, atol=1e-5)
    assert made == [(1, 3, 16)]


def test_lone_projections_and_groups_are_counted_and_put_back(monkeypatch):
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
            self.down_proj, self.biased = nn.Linear(12, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x):
            return self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))

    made = []

    def product(x, weight):
        made.append(tuple(weight.shape))
        return x @ weight.T

    monkeypatch.setitem(projections.MATMULS, "early", product)
    mlp = Mlp()
    fuse_in_memory(mlp)
    before, x = dict(mlp.named_modules()), torch.randn(3, 8)
    with torch.no_grad():
        expected = mlp(x)
        with fused(mlp, product="early") as count:
            assert (count.groups, count.early) == (1, 2)
            assert torch.allclose(mlp(x), expected, atol=1e-6)
            assert made == [(24, 8), (8, 12)] and mlp.biased is before["biased"]
        assert dict(mlp.named_modules()) == before
        with fused(mlp) as count:
            assert (count.groups, count.early) == (1, 0) and mlp.down_proj is before["down_proj"]


@needs_gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in (torch.float32, torch.bfloat16, torch.float16)]
    + [(s, d) for s in STREAMED for d in (torch.bfloat16, torch.float16)],
)
def test_the_kernel_on_a_gpu_launched_early_or_not(shape, dtype):
    from eagle_lab.runtime.early_launch import early_launches
    from eagle_lab.runtime.kernels.early_product import early_product

    rows, outputs, inputs = shape
    x = torch.randint(0, 3, (rows, inputs), device="cuda").to(dtype)
    weights = torch.randint(-1, 2, (8, outputs, inputs), device="cuda").to(dtype)

    def chain(x, weights, product):
        # each product's input is written by a kernel that reads the product before; whole numbers are exact in every dtype
        found = [product(x, weights[0])]
        for weight in weights[1:]:
            x = x.roll(1, 0) + found[-1][:1, :1] * 0
            found.append(product(x, weight))
        return torch.stack(found)

    expected = chain(x.double(), weights.double(), lambda a, b: a @ b.T)
    got = chain(x, weights, early_product)
    assert torch.equal(got, expected.to(dtype))
    torch._dynamo.reset()
    with early_launches(x.device):
        compiled = torch.compile(lambda x, weights: chain(x, weights, early_product), dynamic=False)
        first = compiled(x, weights)
        assert torch.equal(first, got)
        for _ in range(50):
            assert torch.equal(compiled(x, weights), first)


@needs_gpu
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(64, 4096, 14336), (10, 28672, 4096), (4, 77, 512)])
def test_8_bit_weights_are_multiplied_as_the_library_does(rows, outputs, inputs):
    from eagle_lab.runtime.early_launch import early_launches
    from eagle_lab.runtime.kernels.float8 import float8_product, rounded

    x = torch.randn(2, rows // 2, inputs, device="cuda", dtype=torch.bfloat16)
    weight, scale = rounded(torch.randn(outputs, inputs, device="cuda"))
    unit = scale.new_ones(())
    arguments = (x, weight, scale[:, 0].clone(), unit)
    exact = x.double() @ (weight.double() * scale.double()).T
    torch._dynamo.reset()
    with early_launches(x.device):
        compiled = torch.compile(float8_product, dynamic=False)
        found = compiled(*arguments, projections.early_8_bits)
        assert all(torch.equal(compiled(*arguments, projections.early_8_bits), found) for _ in range(20))
    alone = float8_product(*arguments, projections.early_8_bits)
    assert found.shape == alone.shape == (2, rows // 2, outputs) and found.dtype == torch.bfloat16
    # a row's rounding is the same for both, so they differ by how they add and round the sum
    library = float8_product(*arguments) if outputs % 16 == 0 else alone
    for got in (found, alone, library):
        assert (got.double() - exact).norm() < 0.05 * exact.norm()
        assert (got.double() - library.double()).norm() < 0.005 * exact.norm()


def widened(folder):
    """The golden target's folder with MLPs of 3840 in place of 160, whose products down are streamed: the same function, its
    160 spread at random between zeros, so that each split has some."""
    target = AutoModelForCausalLM.from_pretrained(GOLDEN / "target", dtype=torch.float32)
    torch.manual_seed(0)
    for layer in target.model.layers:
        at = torch.randperm(3840)[:160]
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer.mlp, name).weight
            shape = [3840 if n == dim else size for n, size in enumerate(weight.shape)]
            weight.data = torch.zeros(shape).index_copy(dim, at, weight.data)
    target.config.intermediate_size = 3840
    target.save_pretrained(folder)
    return folder


def test_the_widened_target_decodes_as_the_golden_one_does(tiny_pair, tmp_path):
    wide = load(widened(tmp_path), GOLDEN / "draft_official", device="cpu", dtype="float32", verbose=False)
    for run in RUNS:
        assert generate(wide, run["prompt"], 24).tokens == generate(tiny_pair, run["prompt"], 24).tokens


@needs_gpu
def test_a_bfloat16_decode_whose_products_are_streamed_agrees_with_the_library_s(tmp_path, monkeypatch):
    """With 64 rows, a whole tree, and with one."""
    from eagle_lab.runtime.kernels import early_product

    launch, streamed = early_product._launch, set()

    def spy(x, weight, dtype, early):
        if early_product.plan(x.shape[0], *weight.shape).stages:
            streamed.add((x.shape[0], *weight.shape))
        return launch(x, weight, dtype, early)

    monkeypatch.setattr(early_product, "_launch", spy)
    pair = load(widened(tmp_path), GOLDEN / "draft_official", device="cuda", dtype="bfloat16", verbose=False)
    strategies = [
        f"compile+cuda_graph,doubling,attention=tree_fused,product={name}" for name in ("library", "early")
    ]
    for run in RUNS:
        for decode in (generate, generate_plain):
            library, early = (decode(pair, run["prompt"], 48, strategy=s).tokens for s in strategies)
            where = agree(pair, run["prompt"], library, early, Decoding.of(48, strategies[1]))
            settle(where, f"product=early against product=library, {decode.__name__}")
    assert streamed == {(64, 64, 3840), (1, 64, 3840)}


def test_a_verification_of_too_many_rows_is_refused_before_anything_is_compiled(tiny_pair):
    plan = parse("doubling,attention=tree,product=early,runtime=compile+cuda_graph")
    few, many = (new_session(tiny_pair, plan, TreeShape(10, 7, n), Sampling(), 1, 256) for n in (63, 64))
    before = dict(tiny_pair.target.named_modules())
    try:
        with few.regional():
            assert few.fused.early > 8  # some in each layer
        with (
            pytest.raises(ValueError, match=r"no projection whose product of 65 rows.*use product=library\."),
            many.regional(),
        ):
            raise AssertionError("not refused")
        assert dict(tiny_pair.target.named_modules()) == before
    finally:
        forget(tiny_pair.target)
