"""Every attention against the definition; the ways that only a GPU has are skipped without one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import interpreted, needs_gpu, skip_where_it_cannot_loop

from eagle_lab.decode.attention import ATTENTIONS, BY_TEXT, SPLIT, attention_bias, tree_visibility, visibility
from eagle_lab.decode.strategy import unavailable

CPU_ATTENTIONS = [name for name in ATTENTIONS if unavailable("attention", name, "cpu") is None]


def definition(query, key, value, seen, scale):
    """One row, one head, one query at a time, in float64; seen bool [B, n, S]."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                slots = seen[b, i].nonzero()[:, 0]
                keys, values = key[b, h // groups, slots].double(), value[b, h // groups, slots].double()
                weights = (keys @ query[b, h, i].double() * scale).softmax(0)
                out[b, h, i] = (weights @ values).to(query.dtype)
    return out


def case(rows, kv_heads, groups, nodes, extra, lengths, spare, seed, size=8):
    """Random queries, keys and values, a mask whose nodes see themselves, and who sees which slot, by hand."""
    make = torch.Generator().manual_seed(seed)
    columns = nodes + extra
    window = max(lengths) + columns + spare
    query = torch.randn(rows, kv_heads * groups, nodes, size, generator=make)
    key, value = (torch.randn(rows, kv_heads, window, size, generator=make) for _ in range(2))
    mask = torch.rand(rows, nodes, columns, generator=make) < 0.4
    mask[:, range(nodes), range(nodes)] = True
    seen = torch.zeros(rows, nodes, window, dtype=torch.bool)
    for row, length in enumerate(lengths):
        seen[row, :, :length] = True
        seen[row, :, length : length + columns] = mask[row]
    return query, key, value, mask, seen, window


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5),
    st.integers(0, 3), st.integers(0, 4), st.integers(0, 99),
)  # fmt: skip
def test_every_attention_equals_the_definition(lengths, kv_heads, groups, nodes, extra, spare, seed):
    """Rows of different length, groups of heads, columns beyond the nodes, a window longer than what is used."""
    rows = len(lengths)
    query, key, value, mask, seen, window = case(rows, kv_heads, groups, nodes, extra, lengths, spare, seed)
    expected = definition(query, key, value, seen, 0.3)
    for name in CPU_ATTENTIONS:
        kinds = [(window, False)] + ([(lengths[0], True)] if rows == 1 else [])
        for limit, exact in kinds:
            seen_by = visibility(name, mask, torch.tensor(lengths), limit, exact, window, torch.float32)
            got = ATTENTIONS[name](query, key, value, seen_by, 0.3)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_growing_cache_gives_fewer_keys_than_the_mask_has_columns():
    """The head's later draft nodes have no keys yet; every attention cuts its mask to what is there."""
    query, key, value, mask, seen, _ = case(1, 1, 2, 2, 4, [5], 0, 0)
    expected = definition(query, key[:, :, :7], value[:, :, :7], seen[:, :, :7], 0.3)
    for name in CPU_ATTENTIONS:
        seen_by = visibility(name, mask, torch.tensor([5]), 5, True, 11, torch.float32)
        got = ATTENTIONS[name](query, key[:, :, :7], value[:, :, :7], seen_by, 0.3)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_tree_visibility_by_its_definition():
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    length, window = torch.tensor([2, 5]), 11
    seen = tree_visibility(mask, length, window)
    for row in range(2):
        for node in range(3):
            for slot in range(window):
                after = slot - int(length[row])
                expected = after < 0 or (after < 4 and bool(mask[row, node, after]))
                assert seen[row, node, slot] == expected
    bias = attention_bias(seen, torch.float32)
    assert torch.equal(bias[:, 0] == 0, seen)
    assert bias.min() == torch.finfo(torch.float32).min


def test_split_attentions_are_taken_away_after_use(tiny_pair):
    """A model left with an attention that only the kit can feed would fail in anybody else's hands."""
    from eagle_lab import generate, stream

    before = tiny_pair.target.config._attn_implementation
    generate(tiny_pair, [1, 2, 3], 4, strategy="tree", top_k=2, depth=2, total_tokens=4)
    assert tiny_pair.target.config._attn_implementation == before
    cycles = stream(tiny_pair, [1, 2, 3], 8, strategy="tree", top_k=2, depth=2, total_tokens=4)
    next(cycles)
    assert tiny_pair.target.config._attn_implementation not in SPLIT
    tiny_pair.target.set_attn_implementation("tree")
    try:
        with pytest.raises(
            ValueError, match="attention 'tree' needs the visibility that eagle_lab's decoding passes"
        ):
            tiny_pair.target(torch.tensor([[1, 2, 3]]))
    finally:
        tiny_pair.target.set_attn_implementation(before)


def test_the_fused_attention_says_what_it_needs():
    assert "needs a CUDA GPU" in unavailable("attention", "tree_fused", "cpu")
    assert unavailable("attention", "tree", "cpu") is None


INTERPRETED = """
import sys

import torch
from eagle_lab.runtime.kernels import tree_attention
from test_attention import case, definition

short = sys.argv[1] == "short"
tree_attention.SHORT = 512 if short else 0
setattr(tree_attention, "part_kernel" if short else "whole_kernel", None)  # the other one can't have run
# several splits, some of them empty; tiles smaller than a split; one split, and as many rows for one program as there may be
for changed in (
    {"COLUMNS": 16}, {"COLUMNS": 64, "TILE_BYTES": 1024}, {"COLUMNS": 16, "PROGRAMS": 3}, {"COLUMNS": 16, "PROGRAMS": 1},
):
    vars(tree_attention).update(changed)
    for lengths, kv_heads, groups, nodes, extra, spare, seed in (
        ([5], 1, 3, 4, 0, 0, 0), ([3, 9], 2, 2, 5, 3, 4, 1), ([0, 40], 1, 1, 3, 0, 0, 2), ([17], 1, 7, 11, 0, 2, 3),
        ([150, 33], 2, 2, 5, 1, 90, 4), ([127], 1, 2, 4, 0, 0, 5), ([128], 1, 1, 1, 0, 300, 6),
    ):
        query, key, value, mask, seen, _ = case(len(lengths), kv_heads, groups, nodes, extra, lengths, spare, seed)
        longer = torch.cat((key, key), 2)[:, :, : key.shape[2]]  # a window of a longer buffer, as the caches give it
        got = tree_attention.tree_attention(query, longer, value, torch.tensor(lengths), mask, 0.3)
        torch.testing.assert_close(got, definition(query, key, value, seen, 0.3), atol=1e-5, rtol=1e-5)
    query, key, value, mask, seen, _ = case(1, 1, 2, 2, 4, [5], 0, 0)
    mask[:, :, 2:] = False
    seen[:, :, 7:] = False
    key[:, :, 7:] = value[:, :, 7:] = float("nan")  # slots that a growing cache does not have yet must not be read
    got = tree_attention.tree_attention(query, key[:, :, :7], value[:, :, :7], torch.tensor([5]), mask, 0.3)
    torch.testing.assert_close(got, definition(query, key, value, seen, 0.3), atol=1e-5, rtol=1e-5)
assert tree_attention.rows_each(77, 1) == 64
print("equal")
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
@pytest.mark.parametrize("window", ["splits", "short"])
def test_the_kernels_under_triton_s_interpreter(window):
    """What they compute, not how fast: the interpreter runs them on the CPU, in a process of its own."""
    done = interpreted(Path(__file__).parent, INTERPRETED, window)
    skip_where_it_cannot_loop(done)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
def test_a_program_s_share_fills_a_large_gpu():
    from eagle_lab.runtime.kernels.tree_attention import rows_each, split_count

    splits = ((40, 1), (256, 9), (4096, 1), (4096, 16), (65536, 16), (65536, 8), (65536, 256), (384, 12288))
    assert [split_count(window, programs) for window, programs in splits] == [1, 4, 64, 16, 16, 33, 1, 1]
    rows = ((192, 3), (256, 8), (256, 33), (256, 256), (3, 9999))
    assert [rows_each(count, lanes) for count, lanes in rows] == [16, 16, 32, 64, 64]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
@pytest.mark.parametrize("name", ["whole_kernel", "part_kernel", "join_kernel"])
def test_a_kernel_that_starts_early_waits_before_it_touches_memory(name, for_h100):
    """Compiled for an H100, not run."""
    from eagle_lab.runtime.kernels import tree_attention

    kernel = getattr(tree_attention, name)
    sizes = {"D": 64, "WIDE": 64, "ROWS": 16, "COLS": 64, "SPLITS": 5, "SCALE": 0.125}
    fixed = {n: v for n, v in (sizes | {"EARLY": True}).items() if n in kernel.arg_names}
    types = dict.fromkeys(("query", "key", "value"), "*bf16") | {"length": "*i64", "mask": "*i8"}
    types |= {"part": "*fp32", "total": "*fp32", "out": "*bf16"}
    ptx = for_h100(kernel, fixed, types, num_warps=8)["ptx"]
    assert not re.search(r"(ld|st)\.global|cp\.async", ptx[: ptx.index("griddepcontrol.wait")])
    assert "griddepcontrol.launch_dependents" in ptx


@needs_gpu
@pytest.mark.parametrize("lengths", [[3000, 1300], [300, 700], [130, 41]])  # in splits, and in one program
@pytest.mark.parametrize("size", [8, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_on_a_gpu(dtype, size, lengths):
    *tensors, mask, seen, window = case(2, 2, 4, 20, 0, lengths, 9, 0, size)
    tensors, scale = [t.to(dtype) for t in tensors], size**-0.5
    expected = definition(*(t.float() for t in tensors), seen, scale)
    tensors = [t.cuda() for t in tensors]
    lengths = torch.tensor(lengths).cuda()
    got = ATTENTIONS["tree_fused"](
        *tensors, visibility("tree_fused", mask.cuda(), lengths, window, False, window, dtype), scale
    )
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
def test_one_window_is_as_long_as_the_kernel_for_short_ones_reads():
    from eagle_lab.runtime.kernels import tree_attention

    assert BY_TEXT["tree_fused"] == tree_attention.SHORT
