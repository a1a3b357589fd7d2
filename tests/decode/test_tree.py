"""Selection keeps a tree: every kept node's ancestors are kept, ties included."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import expansion

from eagle_lab.decode.tree import (
    candidate_depths,
    depths_of,
    largest,
    pool_size,
    select_by_counting,
    select_nodes,
)


def orphans(kept: torch.Tensor, candidates: torch.Tensor) -> int:
    """Kept candidates whose recorded parent was dropped, in one tree."""
    chosen = set(kept.tolist())
    return sum(parent >= 0 and parent not in chosen for parent in candidates[kept].tolist())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.floats(0, 1))
def test_selection_is_closed_under_ancestors_with_ties(seed, top_k, depth, ties, share):
    scores, candidates = expansion(np.random.default_rng(seed), top_k, depth, ties)
    keep = max(1, round(share * pool_size(top_k, depth)))
    kept, parents = select_nodes(scores, candidates, keep)
    assert orphans(kept[0], candidates[0]) == 0
    ranked = select_by_counting(scores, candidates, keep)
    assert torch.equal(ranked[0], kept) and torch.equal(ranked[1], parents)
    assert kept[0].tolist() == sorted(set(kept[0].tolist())) and kept.shape == parents.shape == (1, keep)
    # the links lead to the recorded parents
    nodes = [-1, *kept[0].tolist()]
    assert [nodes[p] for p in parents[0].tolist()] == candidates[0][kept[0]].tolist()
    # no dropped candidate is better than a kept one
    dropped = torch.ones(scores.shape[1], dtype=torch.bool).scatter(0, kept[0], False)
    if dropped.any():
        assert scores[0][dropped].max() <= scores[0][kept[0]].min()
    # the depth by the recording order is the depth by the links
    assert [0, *candidate_depths(top_k, depth)[kept[0]].tolist()] == depths_of(parents[0].tolist())


def test_a_plain_top_k_does_leave_orphans_so_the_property_bites():
    found = 0
    for seed in range(50):
        scores, candidates = expansion(np.random.default_rng(seed), 4, 4, True)
        # ties broken the other way round, as a top-k that promises no order may do
        order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        found += orphans((scores.shape[1] - 1 - order)[0, :20].sort().values, candidates[0])
    assert found > 0


def test_a_batch_is_selected_row_by_row():
    rows = [expansion(np.random.default_rng(seed), 5, 3, seed % 2 == 0) for seed in range(6)]
    scores, candidates = (torch.cat(part) for part in zip(*rows, strict=True))
    kept, parents = select_nodes(scores, candidates, 31)
    for row, (score, candidate) in enumerate(rows):
        alone = select_nodes(score, candidate, 31)
        assert torch.equal(kept[row], alone[0][0]) and torch.equal(parents[row], alone[1][0])
    ranked = select_by_counting(scores, candidates, 31)
    assert torch.equal(ranked[0], kept) and torch.equal(ranked[1], parents)


def test_the_largest_are_those_of_topk():
    for width, count in ((1024, 5), (130, 4), (512, 50)):
        x = torch.randn(7, width).half().float()  # ties occur
        values, ids = largest(x, count)
        assert torch.equal(values, x.topk(count).values)
        assert torch.equal(x.gather(1, ids), values) and all(len(set(row)) == count for row in ids.tolist())


def test_scores_that_are_no_numbers_stay_within_bounds():
    for scores in (torch.full((1, 20), torch.nan), torch.tensor([[0.5, torch.nan, 0.1, *[0.0] * 17]])):
        kept, parents = select_by_counting(scores, torch.full((1, 20), -1), 6)
        assert kept.shape == parents.shape == (1, 6) and int(parents.min()) >= 0 and int(parents.max()) <= 6
