"""Every mask builder that can run here equals the reference, on thousands of trees of every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import shaped, special

from eagle_lab.decode.masks import MASK_BUILDERS, build_all, mask_builder, rebuild
from eagle_lab.decode.strategy import unavailable
from eagle_lab.decode.tree import depths_of

HERE = [name for name in MASK_BUILDERS if not unavailable("mask", name, "cpu")]
FAST = [name for name in HERE if name not in ("rebuild", "incremental", "incremental_inplace", "triton")]


def brute_force(parents: list[int]) -> np.ndarray:
    """The mask from its meaning, one ancestor after another; shares no code with any builder."""
    mask = np.zeros((len(parents) + 1, len(parents) + 1), bool)
    for row in range(len(parents) + 1):
        node = row
        while True:
            mask[row, node] = True
            if node == 0:
                break
            node = parents[node - 1]
    return mask


def test_the_reference_is_the_definition():
    for nodes in (1, 2, 3, 17, 64, 200):
        for parents in special(nodes).values():
            assert np.array_equal(rebuild(parents).numpy(), brute_force(parents.tolist()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70))
def test_thousands_of_small_trees_by_every_builder(seed, nodes, reach):
    trees = shaped(np.random.default_rng(seed).random((8, nodes)), reach)
    wanted = build_all(rebuild, trees)
    assert np.array_equal(wanted[0].numpy(), brute_force(trees[0].tolist()))
    for name in HERE:
        if name == "triton":
            continue  # the interpreter has its own test
        assert torch.equal(build_all(MASK_BUILDERS[name], trees), wanted), name
        assert torch.equal(build_all(MASK_BUILDERS[name], trees, nodes), wanted), name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 64))
def test_thousands_of_trees_at_once(seed, nodes):
    trees = shaped(np.random.default_rng(seed).random((100, nodes)), nodes)
    doubled = build_all(MASK_BUILDERS["doubling"], trees)
    assert torch.equal(build_all(MASK_BUILDERS["walk"], trees), doubled)
    for name in ("bitpacked", "host_walk"):
        assert torch.equal(build_all(MASK_BUILDERS[name], trees), doubled), name
    assert torch.equal(doubled[0], rebuild(trees[0]))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(256, 2048), st.sampled_from([40, 400, 2048]))
def test_large_trees(seed, nodes, reach):
    parents = shaped(np.random.default_rng(seed).random(nodes), reach)
    wanted = rebuild(parents)
    for name in FAST:
        assert torch.equal(MASK_BUILDERS[name](parents), wanted), name


@pytest.mark.parametrize("nodes", [1, 2, 7, 8, 31, 32, 62, 63, 64, 65, 127, 128, 511, 2047, 2048])
def test_chains_stars_combs_and_sizes_at_word_edges(nodes):
    for shape, parents in special(nodes).items():
        if nodes > 600 and shape in ("chain", "broom"):
            continue  # below, once: some builders take a step a level
        wanted = rebuild(parents)
        for name in FAST:
            assert torch.equal(MASK_BUILDERS[name](parents), wanted), (name, shape)


def test_the_longest_chain():
    parents = torch.arange(2048)
    for name in ("doubling", "bitpacked", "host_walk"):
        assert torch.equal(MASK_BUILDERS[name](parents), torch.ones(2049, 2049, dtype=torch.bool).tril()), (
            name
        )


@pytest.mark.parametrize("name", ["doubling", "walk"])
def test_levels_bound_the_work_and_too_few_would_be_wrong(name):
    parents = shaped(np.random.default_rng(3).random((4, 63)), 20)
    depth = max(max(depths_of(row.tolist())) for row in parents)
    assert torch.equal(MASK_BUILDERS[name](parents, levels=depth), build_all(rebuild, parents))
    chain = torch.arange(64)
    assert not torch.equal(MASK_BUILDERS[name](chain, levels=9), rebuild(chain))


@pytest.mark.parametrize("name", ["doubling", "walk"])
def test_device_builders_read_nothing_back(name):
    parents = torch.zeros(2, 12, dtype=torch.int64, device="meta")  # has no values to read
    assert MASK_BUILDERS[name](parents, levels=8).shape == (2, 13, 13)


def test_a_builder_that_cannot_run_here_says_why_and_is_never_replaced():
    assert {"triton", "cuda"} <= set(MASK_BUILDERS)
    assert unavailable("mask", "cuda", "cpu") == "mask=cuda needs a CUDA GPU, but the device is cpu"
    with pytest.raises(ValueError, match="mask=cuda needs a CUDA GPU, but the device is cpu"):
        MASK_BUILDERS["cuda"](torch.arange(4))


def test_triton_without_the_interpreter_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "mask=triton needs" in str(unavailable("mask", "triton", "cpu"))
    with pytest.raises(ValueError, match="mask=triton needs"):
        MASK_BUILDERS["triton"](torch.arange(4))
    monkeypatch.setattr("eagle_lab.runtime.needs.find_spec", lambda name: None)
    assert "not installed" in str(unavailable("mask", "triton", "cuda"))


def test_a_readers_builder_has_a_name_of_its_own():
    for name in ("rebuild", "triton"):
        with pytest.raises(ValueError, match="is the kit's own"):
            mask_builder(name)
    for name in ("", "a,b", "mask=a", rebuild):  # the last: the decorator without its parentheses
        with pytest.raises(ValueError, match="needs a name of letters"):
            mask_builder(name)
    try:
        first = mask_builder("mine")(lambda parents: rebuild(parents))
        second = mask_builder("mine")(lambda parents: rebuild(parents))  # a cell that is run again
        assert MASK_BUILDERS["mine"] is second is not first and unavailable("mask", "mine", "cpu") is None
    finally:
        MASK_BUILDERS.pop("mine", None)
