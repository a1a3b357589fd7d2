"""Check: finds the smallest tree a builder gets wrong, and explains each kind of mistake in one sentence."""

from __future__ import annotations

import pytest
import torch
from make import parents_first

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.strategy import unavailable
from eagle_lab.verdict.mask_check import check, own, random_shapes, shrink, small_trees, told, without


def parent_only(parents):
    mask = torch.eye(len(parents) + 1, dtype=torch.bool)
    mask[:, 0] = True
    mask[torch.arange(len(parents)) + 1, parents] = True
    return mask


def wrong_above_forty(parents):
    mask = rebuild(parents)
    if len(parents) > 40:
        mask[7, 7] = False
    return mask


@pytest.mark.parametrize("name", list(MASK_BUILDERS))
def test_the_kits_own_builders_pass(name):
    if reason := unavailable("mask", name, "cpu"):
        pytest.skip(f"{reason}.")
    finding = check(MASK_BUILDERS[name], recorded=[[0, 0, 1, 1, 3]], name=name)
    assert finding.ok and finding.trees == 153 + 200 + 1


def test_the_smallest_failing_tree_is_the_smallest_there_is():
    finding = check(parent_only)
    assert not finding.ok and finding.parents == (0, 1, 2)
    assert "hides node 1 from node 3, though it is an ancestor (1 of 16 entries are wrong)" in finding.fault
    assert torch.equal(finding.expected, rebuild(torch.tensor([0, 1, 2]))) and not finding.actual[3, 1]


def test_a_mistake_that_only_large_trees_show_is_shrunk_to_the_edge():
    finding = check(wrong_above_forty)
    assert len(finding.parents) == 41
    assert parents_first(finding.parents)


def test_a_recorded_tree_can_be_the_one_that_shows_it():
    tree = [0] * 6 + [6] * 6 + [12] * 60

    def build(parents):
        mask = rebuild(parents)
        return mask if len(parents) < 72 else ~mask

    assert check(build).ok
    assert not check(build, recorded=[tree]).ok


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: None, "returned None: is there a `return`"),
        (lambda p: [[True]], "returned a list; it must return a torch.Tensor"),
        (lambda p: torch.eye(len(p), dtype=torch.bool), "returned shape 1×1; a tree of 2 nodes needs 2×2"),
        (lambda p: torch.tensor(True), "returned shape a single number"),
        (lambda p: rebuild(p).float(), "returned dtype float32; it must be bool"),
        (lambda p: rebuild(p).to_sparse(), "returned a sparse_coo tensor; it must be a dense one"),
        ("no function", "'str' object is not callable"),
        (lambda p: rebuild(p).to("meta"), "returned a mask on meta, but the tree is on cpu"),
        (lambda p: (rebuild(p), p.zero_())[0].add(p.add_(1).sum() > 99), "changed `parents` in place"),
        (lambda p: rebuild(p)[99], "raised IndexError in line"),
        (lambda p: torch.ones(len(p) + 1, len(p) + 1, dtype=torch.bool), "lets node 0 attend to node 1"),
        (
            lambda p: torch.zeros(len(p) + 1, len(p) + 1, dtype=torch.bool),
            "hides node 0 from node 0, though it is itself",
        ),
    ],
)
def test_each_mistake_has_its_sentence(build, words):
    finding = check(build, name="mine")
    assert not finding.ok and finding.fault.startswith("'mine' ") and words in finding.fault, finding.fault
    assert finding.parents == (0,)
    # a mask that is wrong is shown by its tree; what returns none says no more by it
    assert ("Smallest failing tree: parents [0]." in finding.fault) == (finding.actual is not None)
    assert "eagle_lab" not in finding.fault and "Traceback" not in finding.fault


def test_a_batched_builder_is_given_a_batch():
    def build(parents):
        assert parents.ndim == 2
        return torch.stack([rebuild(row) for row in parents])

    build.batched = True
    assert check(build, random_trees=5).ok


def test_small_trees_are_all_there_are():
    assert [len([t for t in small_trees(5) if len(t) == n]) for n in range(1, 6)] == [1, 2, 6, 24, 120]


def test_random_trees_are_trees_and_differ():
    trees = list(random_shapes(60, seed=1))
    for tree in trees:
        assert parents_first(tree)
    assert len(set(trees)) > 50 and trees == list(random_shapes(60, seed=1))


def test_taking_out_a_node_lifts_its_children():
    assert without((0, 1, 1, 2), 1) == (0, 0, 1)
    assert shrink(lambda p: None, (0, 1, 2, 3), "cpu") == (0,)


def test_an_error_out_of_the_readers_code_names_their_line():
    def mine(parents):
        return parents[10**6]

    try:
        mine(torch.zeros(3))
    except IndexError as error:
        assert own(mine) and "raised IndexError in line" in told(mine, error, "mine")
        assert "return parents[10**6]" in told(mine, error, "mine")
    assert told(rebuild, ValueError("depth is 0."), "rebuild") == "depth is 0."
    assert told(rebuild, KeyError("x"), "rebuild") == "KeyError: 'x'"
