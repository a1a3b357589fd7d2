"""The fused selection of children against plain torch: by Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import interpreted, needs_gpu

from eagle_lab.runtime import kernels

needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="the package triton is not installed"
)

KINDS = ("random", "ties", "flat", "low", "holes", "sure")


def case(kind, rows, nodes, vocabulary, dtype, seed):
    """Logits of one kind, in a longer buffer, and scores of the nodes, two of them often equal."""
    make = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, nodes + 1, vocabulary + 3, generator=make) * 3
    if kind == "ties":
        # the largest are 0.0 and -0.0 in turns, which are equal
        whole = torch.where(
            whole > -1, torch.tensor([0.0, -0.0]).repeat(vocabulary + 3)[: vocabulary + 3], -1.0
        )
    elif kind == "flat":
        whole = torch.full_like(whole, -2.0)
    elif kind == "low":
        whole = whole * 1000 - 30000
    elif kind == "holes":  # fewer finite logits than children, at times
        whole[torch.rand(whole.shape, generator=make) < 0.9] = -torch.inf
        whole[..., vocabulary // 2] = 1.0
    elif kind == "sure":
        whole[..., vocabulary // 3] = 90.0
    score = -torch.randint(0, 3, (rows, nodes + 1, 2), generator=make) / 3
    return whole.to(dtype)[:, 1:, :vocabulary], score[:, 1:, 0]


def right(got, logits, score, k):
    """The four tensors are what stable sorts give, up to the rounding of a logarithm."""
    ids, scores, chosen, best = (t.cpu() for t in got)
    rows, nodes, _ = logits.shape
    x, score = logits.cpu().double(), score.cpu()
    values, wanted = (t[..., :k] for t in x.sort(dim=-1, descending=True, stable=True))
    assert ids.dtype == chosen.dtype == torch.int64 and torch.equal(ids, wanted.flatten(1))
    expected = score[..., None] + values - x.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(scores, expected.flatten(1).float(), atol=2e-5, rtol=2e-5)
    assert (scores.view(rows, nodes, k) <= score[..., None]).all()
    # the second selection is exact: that of the scores that were returned
    first = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(chosen, first.indices[:, :k]) and torch.equal(best, first.values[:, :k])


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 90), st.integers(1, 16),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99),
)  # fmt: skip
def interpreted_property(rows, nodes, vocabulary, k, dtype, seed):
    """Chunks of 16: one to six of a row, the last one short; every kind, as hypothesis' own draw left one out."""
    from eagle_lab.runtime.kernels.top_children import top_children

    k = min(k, vocabulary)
    for kind in KINDS:
        logits, score = case(kind, rows, nodes, vocabulary, dtype, seed)
        right(top_children(logits, score, k), logits, score, k)


def interpreted_checks() -> None:
    """The kernels in the interpreter; run in a process that has TRITON_INTERPRET=1."""
    from eagle_lab.runtime.kernels import top_children as module

    assert kernels.interpreted()
    for kind in ("random", "holes"):  # sizes as on a GPU: two chunks, the second one short
        logits, score = case(kind, 1, 2, 1500, torch.bfloat16, 0)
        right(module.top_children(logits, score, 10), logits, score, 10)
    module.LARGEST = 32
    interpreted_property()
    logits, score = case("random", 1, 16, 40, torch.float32, 1)
    right(module.top_children(logits, score, 16), logits, score, 16)
    nothing = torch.full((1, 2, 40), -torch.inf)  # plain torch gives NaN here
    ids, scores, chosen, _ = module.top_children(nothing, torch.zeros(1, 2), 3)
    assert (
        ids.tolist() == [[0, 1, 2, 0, 1, 2]]
        and (scores == -torch.inf).all()
        and chosen.tolist() == [[0, 1, 2]]
    )
    print("interpreted: equal")


@needs_triton
def test_the_kernels_under_triton_s_interpreter():
    """What they compute, not how fast."""
    code = "import test_top_children; test_top_children.interpreted_checks()"
    done = interpreted(Path(__file__).parent, code)
    assert done.stdout.strip() == "interpreted: equal", done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    "shape, k, message",
    [
        ((1, 2, 40), 17, r"k is 17; the kernel keeps 1 to 16 children of a node\."),
        ((1, 2, 40), 0, r"k is 0; the kernel keeps 1 to 16 children of a node\."),
        ((1, 2, 5), 6, r"k is 6, more than the vocabulary of 5\."),
        ((1, 17, 40), 4, r"a frontier of 17 nodes; the kernel takes 1 to 16\."),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(shape, k, message):
    from eagle_lab.runtime.kernels.top_children import top_children

    with pytest.raises(ValueError, match=message):
        top_children(torch.zeros(shape), torch.zeros(shape[:2]), k)
    with pytest.raises(ValueError, match="do not lie next to each other"):
        top_children(torch.zeros(1, 40, 2).transpose(1, 2), torch.zeros(1, 2), 4)


@needs_triton
def test_a_full_graph_has_it_as_one_operator():
    """Traced, not run: torch.compile takes the function whole, with no break and nothing beside it."""
    from eagle_lab.runtime.kernels.top_children import top_children

    names = []

    class Traced(Exception):
        pass

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        raise Traced

    with pytest.raises(Exception, match="Traced"):
        torch.compile(top_children, fullgraph=True, backend=backend)(
            torch.zeros(1, 10, 32000), torch.zeros(1, 10), 10
        )
    assert [name for name in names if "getitem" not in name] == ["eagle_lab.top_children.default"]


@needs_triton
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("chunk, splits", [(1024, 8), (4096, 8)])
def test_triton_compiles_them_for_an_h100(chunk, splits, early, for_h100):
    from eagle_lab.runtime.kernels import top_children

    types = {
        "logits": "*bf16", "peak": "*fp32", "total": "*fp32", "score": "*fp32", "scores": "*fp32",
        "best": "*fp32",
    }  # fmt: skip
    types |= dict.fromkeys(("part", "ids", "chosen"), "*i64")
    sizes = {"K": 10, "SPLITS": splits, "EARLY": early}
    for kernel, fixed in (
        (top_children.chunk_kernel, sizes | {"CHUNK": chunk}),
        (
            top_children.merge_kernel,
            sizes | {"R": 10, "ROWS": 16, "PARTS": splits, "LISTED": 16 * splits, "NODES": 128},
        ),
    ):
        made = for_h100(kernel, fixed, types, num_warps=8)
        ptx = made["ptx"]
        assert ".target sm_90" in ptx and len(made["cubin"]) > 0
        assert ("griddepcontrol.wait" in ptx) == early
        if early:
            assert not re.search(r"(ld|st)\.global|cp\.async", ptx[: ptx.index("griddepcontrol.wait")])


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_on_a_gpu(dtype):
    """Plain, inside torch.compile's one graph, and replayed from a CUDA graph over other logits."""
    from eagle_lab.runtime.kernels.top_children import top_children

    compiled = torch.compile(top_children, fullgraph=True)
    static = torch.zeros(1, 10, 32000, dtype=dtype, device="cuda"), torch.zeros(1, 10, device="cuda")
    top_children(*static, 10)  # compiled by Triton before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = top_children(*static, 10)
    for seed, kind in enumerate(KINDS):
        logits, score = (t.cuda() for t in case(kind, 1, 10, 32000, dtype, seed))
        right(top_children(logits, score, 10), logits, score, 10)
        right(compiled(logits, score, 10), logits, score, 10)
        static[0].copy_(logits)
        static[1].copy_(score)
        graph.replay()
        right(out, logits, score, 10)
    for rows, nodes, vocabulary, k in (
        (3, 1, 8192, 10),
        (2, 16, 1000, 16),
        (1, 10, 128256, 10),
        (1, 1, 7, 1),
    ):
        logits, score = (t.cuda() for t in case("ties", rows, nodes, vocabulary, dtype, 0))
        right(top_children(logits, score, k), logits, score, k)
