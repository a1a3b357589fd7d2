"""Recorded trees are those that decoding draws, and come back whole; the family is equal on all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from make import parents_first

from eagle_lab.decode.generate import stream
from eagle_lab.decode.masks import MASK_BUILDERS, build_all, rebuild
from eagle_lab.decode.strategy import unavailable
from eagle_lab.decode.tree import depths_of
from eagle_lab.measure import recorded_trees as trees

PROMPTS = [[1, 5, 9, 20, 33], [7, 7, 40, 2, 11, 300]]


@pytest.fixture(scope="module")
def recorded(tiny_pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("trees") / "tiny.npz"
    return trees.record(tiny_pair, PROMPTS, path, cycles=3, expansions={(4, 3): (7, 15), (5, 4): (60,)})


def test_recorded_trees_are_those_of_decoding(tiny_pair, recorded):
    found = trees.read(7, recorded)
    assert (found.top_k, found.depth, found.parents.shape) == (4, 3, (6, 7))
    for number, prompt in enumerate(PROMPTS):
        cycles = stream(tiny_pair, prompt, 40, top_k=4, depth=3, total_tokens=7)
        drawn = [next(cycles).parents[1:] for _ in range(3)]
        assert found.parents[3 * number : 3 * number + 3].tolist() == [list(parents) for parents in drawn]


def test_larger_sizes_are_drawn_at_the_same_positions(tiny_pair, recorded):
    for size, top_k, depth in ((15, 4, 3), (60, 5, 4)):
        found = trees.read(size, recorded)
        drawn = next(stream(tiny_pair, PROMPTS[0], 40, top_k=top_k, depth=depth, total_tokens=size))
        assert found.parents[0].tolist() == list(drawn.parents[1:])


def test_what_is_missing_is_said(recorded, tmp_path):
    with pytest.raises(ValueError, match="no recorded trees of 8 tokens; recorded are 7, 15, 60"):
        trees.read(8, recorded)
    with pytest.raises(
        ValueError, match="gone.npz is not there; record it with `python -m eagle_lab record trees`"
    ):
        trees.read(8, tmp_path / "gone.npz")


def test_the_shipped_trees_are_whole_and_small():
    assert trees.DEFAULT.stat().st_size < 500_000
    with np.load(trees.DEFAULT) as file:
        assert json.loads(str(file["about"]))["draft"] == "draft-smollm2-135m"
    for size in trees.SIZES:
        found = trees.read(size)
        assert found.parents.shape[0] >= 32 and found.parents.shape[1] == size
        assert parents_first(found.parents[0].tolist())
        assert 2 <= max(max(depths_of(row)) for row in found.parents.tolist()) <= found.depth + 1


@pytest.mark.parametrize("size", trees.SIZES)
def test_the_family_is_equal_on_the_shipped_trees(size):
    found = trees.read(size)
    some = found.parents[:: max(1, size // 31)]
    wanted = build_all(rebuild, some)
    for name in MASK_BUILDERS:
        if name.startswith("incremental") and size > 255 or unavailable("mask", name, "cpu"):
            continue
        assert torch.equal(build_all(MASK_BUILDERS[name], some, found.depth + 1), wanted), name
