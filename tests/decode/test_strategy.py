"""Strategies as text, and the refusal of what cannot run."""

from __future__ import annotations

import ast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_lab import ROOT
from eagle_lab.decode import masks
from eagle_lab.decode.attention import ATTENTIONS
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import AXES, Decoding, Strategy, check, parse, unavailable, waits_for_host
from eagle_lab.decode.tree import TreeShape
from eagle_lab.runtime import needs
from eagle_lab.runtime.projections import MATMULS

CHOICES = {axis: st.sampled_from(list(names)) for axis, names in AXES.items()}


@given(st.builds(Strategy, **CHOICES))
def test_a_strategy_s_text_parses_back(plan):
    assert parse(str(plan)) == plan
    assert parse(plan) is plan


def test_every_attention_and_product_is_a_choice():
    assert list(AXES["attention"]) == list(ATTENTIONS)
    assert list(AXES["product"]) == list(MATMULS)


@given(st.builds(Strategy, **CHOICES), st.randoms(use_true_random=False))
def test_any_order_of_axes_and_spaces_parses(plan, random):
    parts = [f" {axis} = {getattr(plan, axis)} " for axis in AXES]
    random.shuffle(parts)
    assert parse(",".join(parts)) == plan


def test_a_bare_name_is_enough_where_one_axis_knows_it():
    assert parse("cuda_graph,doubling,tree,concat") == Strategy("doubling", "cuda_graph", "concat", "tree")
    assert parse("compile+cuda_graph").runtime == "compile+cuda_graph"
    assert parse("rebuild") == Strategy()
    with pytest.raises(
        ValueError,
        match="'eager' is a choice of runtime and attention; write runtime=eager or attention=eager",
    ):
        parse("eager")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the strategy is empty"),
        ("dubling", r"did you mean 'doubling'"),
        ("runtim=eager", "strategy axis 'runtim' is unknown; did you mean 'runtime'"),
        ("runtime=cuda", r"runtime strategy 'cuda' is unknown"),
        ("doubling,rebuild", "names the mask twice"),
        (3, "not int"),
    ],
)
def test_bad_text_is_refused_with_a_hint(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("cuda_graph,doubling", 1, "runtime=cuda_graph needs a CUDA GPU, but the device is cpu"),
        ("compile+cuda_graph,doubling", 1, "needs a CUDA GPU"),
        ("attention=tree_fused", 1, "attention=tree_fused needs a CUDA GPU"),
        ("product=early,compile+cuda_graph", 1, "needs a CUDA GPU"),
        ("concat", 2, "cache=concat holds one prompt, but the batch has 2"),
    ],
)
def test_what_cannot_run_here_is_refused_not_replaced(text, rows, message):
    with pytest.raises(ValueError, match=message):
        check(text, "cpu", rows)


def test_early_products_go_with_compiled_pieces_alone(monkeypatch):
    monkeypatch.setattr(needs, "missing", lambda what, needed, device: None)
    assert check("early,doubling,tree,compile+cuda_graph", "cpu").product == "early"
    for runtime in ("eager", "compile", "cuda_graph"):
        for tree in (True, False):
            with pytest.raises(
                ValueError, match="so it goes with runtime=compile.cuda_graph and not with runtime="
            ):
                check(f"early,doubling,tree,runtime={runtime}", "cpu", tree=tree)
    for attention in ("sdpa", "eager"):
        with pytest.raises(
            ValueError, match=f"attention=tree or tree_fused and not with attention={attention}"
        ):
            check(f"early,doubling,compile+cuda_graph,attention={attention}", "cpu")


def test_a_head_in_8_bits_needs_a_gpu_that_multiplies_such_numbers(monkeypatch):
    assert check("head=fp8", "cpu").head == "fp8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for own, runs in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=own: own)
        assert (unavailable("head", "fp8", "cuda") is None) == runs
        assert unavailable("head", "full", "cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        ValueError,
        match=r"head=fp8 needs a GPU of compute capability 8.9 or newer, and cuda has 8.0\.",
    ):
        check("head=fp8", "cuda")
    assert check("head=fp8", "cuda", tree=False).head == "fp8"  # plain decoding has no head


def test_a_host_loop_does_not_go_with_fixed_shapes(monkeypatch):
    monkeypatch.setattr(needs, "missing", lambda what, needed, device: None)
    with pytest.raises(
        ValueError,
        match="mask=rebuild loops on the host, so it goes with runtime=eager and not with runtime=cuda_graph; .*doubling",
    ):
        check("runtime=cuda_graph", "cpu")
    with pytest.raises(ValueError, match="cache=concat changes its shapes"):
        check("compile,concat,doubling", "cpu")
    assert check("cuda_graph,doubling", "cpu").runtime == "cuda_graph"
    assert check("cuda_graph", "cpu", tree=False).mask == "rebuild"  # plain decoding builds no mask


def test_waiting_for_the_host_is_found_by_watching(monkeypatch):
    assert [name for name in masks.MASK_BUILDERS if not waits_for_host(name)] == [
        "doubling", "walk", "triton", "cuda",
    ]  # fmt: skip

    def reads_one_value(parents):
        return torch.eye(int(parents.max()) + 1, dtype=torch.bool)

    def shape_by_values(parents):
        return torch.eye(4, dtype=torch.bool)[parents >= 0]

    def own_words(parents):
        raise RuntimeError("Cannot copy out of meta tensor; item()")  # words of an error say nothing

    def on_the_device(parents):
        return torch.ones(len(parents) + 1, len(parents) + 1, dtype=torch.bool).tril()

    for build, waits in (
        (reads_one_value, True),
        (shape_by_values, True),
        (own_words, False),
        (on_the_device, False),
    ):
        monkeypatch.setitem(masks.MASK_BUILDERS, "mine", build)
        assert waits_for_host("mine") == waits
        assert bool(AXES["mask"]["mine"].goes_with) == waits
    for name in ("rebuild", "carried", "bitpacked", "host_walk"):  # as they are marked
        monkeypatch.setitem(
            masks.MASK_BUILDERS, "mine", lambda parents, name=name: masks.MASK_BUILDERS[name](parents)
        )
        assert waits_for_host("mine"), name
    reads_one_value.host = False  # a builder may say so itself
    monkeypatch.setitem(masks.MASK_BUILDERS, "mine", reads_one_value)
    assert not waits_for_host("mine")


def test_an_unknown_name_lists_the_axes_with_their_choices():
    with pytest.raises(ValueError) as caught:
        parse("dubling")
    first, _, *lines = str(caught.value).splitlines()
    assert first == "strategy 'dubling' is unknown; did you mean 'doubling'?"
    assert [line.split(":")[0].strip() for line in lines] == list(AXES)
    assert lines[2] == "  cache: static, concat"


def test_compile_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in unavailable("runtime", "compile", "cpu")
    with pytest.raises(ValueError, match="neither .CXX nor g.. nor clang.. is here"):
        check("compile,doubling", "cpu")


def test_no_decode_inside_the_kit_leaves_its_strategy_to_the_default():
    """A caller's strategy goes wherever its text goes: every call in the package names one, or hands on a `Decoding`."""
    takes = {"generate": "strategy", "generate_plain": "strategy", "stream": "strategy", "agree": "decoding"}
    left = []
    for path in sorted((ROOT / "eagle_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            named = {keyword.arg for keyword in node.keywords}
            if (owner, name) == ("Decoding", "of"):
                given = len(node.args) > 1 or named & {"strategy", None}
            elif name in takes and isinstance(node.func, ast.Name):
                given = len(node.args) > 4 or named & {takes[name], None}
            else:
                continue
            if not given:
                left.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not left
    with pytest.raises((TypeError, ValueError)):
        Decoding(shape=TreeShape(), sampling=Sampling(), max_new_tokens=4)
