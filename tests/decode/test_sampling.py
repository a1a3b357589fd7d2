"""Acceptance on given trees: which path is kept, and how a token is drawn."""

from __future__ import annotations

import pytest
import torch

from eagle_lab.decode.masks import rebuild
from eagle_lab.decode.sampling import Sampling, accept, choose, distribution
from eagle_lab.decode.tree import depths_of


def run(tokens, parents, choice, width):
    """`accept` on one tree; → the path's real nodes."""
    path, count = accept(
        torch.tensor([tokens]), torch.tensor([parents]), rebuild(torch.tensor(parents))[None],
        torch.tensor([depths_of(parents)]), torch.tensor([choice]), width,
    )  # fmt: skip
    assert path.shape == (1, width)
    nodes = path[0].tolist()
    assert all(node == nodes[int(count) - 1] for node in nodes[int(count) :]), "padding repeats the last node"
    return nodes[: int(count)]


#        0: 7
#       /      \
#   1: 3      2: 5
#    |        /    \
#   3: 4   4: 6   5: 8
#                  |
#                 6: 9
TOKENS, PARENTS = [7, 3, 5, 4, 6, 8, 9], [0, 0, 1, 2, 2, 5]


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ([1, 0, 0, 0, 0, 0, 0], [0]),
        ([3, 1, 0, 0, 0, 0, 0], [0, 1]),
        ([3, 4, 0, 0, 0, 0, 0], [0, 1, 3]),
        ([5, 4, 1, 0, 0, 9, 0], [0, 2]),
        ([5, 4, 6, 0, 0, 9, 0], [0, 2, 4]),
        ([5, 4, 8, 0, 0, 1, 0], [0, 2, 5]),
        ([5, 4, 8, 0, 0, 9, 0], [0, 2, 5, 6]),
        ([1, 4, 8, 0, 0, 9, 0], [0]),
    ],
)
def test_the_path_of_the_targets_choices(choice, path):
    assert run(TOKENS, PARENTS, choice, 5) == path


def test_a_tree_as_wide_as_its_pad():
    assert run([1, 2, 3], [0, 1], [2, 3, 9], 3) == [0, 1, 2]


def test_rows_of_a_batch_are_independent():
    parents = torch.tensor([PARENTS, PARENTS])
    mask = torch.stack([rebuild(row) for row in parents])
    choice = torch.tensor([[3, 4, 0, 0, 0, 0, 0], [5, 4, 8, 0, 0, 9, 0]])
    path, count = accept(
        torch.tensor([TOKENS] * 2), parents, mask, torch.tensor([depths_of(PARENTS)] * 2), choice, 4
    )
    assert count.tolist() == [3, 4]
    assert path.tolist() == [[0, 1, 3, 3], [0, 2, 5, 6]]


def test_greedy_takes_the_first_of_equal_logits():
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]), Sampling())[0].tolist() == [1]


LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])


def test_temperature():
    for temperature in (0.3, 1.0, 2.0):
        expected = (LOGITS.double() / temperature).softmax(-1)
        assert torch.allclose(distribution(LOGITS, Sampling(temperature)), expected)


@pytest.mark.parametrize(("kept", "ids"), [(1, [1]), (2, [1, 4]), (3, [1, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_best(kept, ids):
    found = distribution(LOGITS, Sampling(1.0, top_k_sampling=kept))[0]
    assert found.nonzero()[:, 0].tolist() == ids
    assert torch.allclose(found[ids], LOGITS[0, ids].double().softmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    whole = LOGITS[0].double().softmax(-1)
    order = [1, 4, 2, 0, 3]
    for count in range(1, 6):
        reach = float(whole[order[:count]].sum())
        found = distribution(LOGITS, Sampling(1.0, top_p=min(reach - 1e-9, 1.0)))[0]
        assert sorted(found.nonzero()[:, 0].tolist()) == sorted(order[:count])
        assert float(found.sum()) == pytest.approx(1.0)


def test_the_same_as_transformers_warpers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(50, 40, dtype=torch.float64) * 3
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    scores = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, scores))
    assert torch.allclose(distribution(logits, Sampling(0.7, 0.8, 12)), scores.softmax(-1))


def test_a_draw_inverts_the_cumulative_distribution():
    p = distribution(LOGITS, Sampling(1.0))[0]
    edges = p.cumsum(0)
    for token in range(5):
        low = 0.0 if token == 0 else float(edges[token - 1])
        for uniform in (low + 1e-9, (low + float(edges[token])) / 2, float(edges[token]) - 1e-9):
            draw = choose(LOGITS, Sampling(1.0), torch.tensor([uniform], dtype=torch.float64))[0]
            assert draw.tolist() == [token]


def test_a_draw_never_gives_an_id_of_probability_zero():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1.0 - 2**-53, 3)):
        assert choose(logits, Sampling(1.0), torch.tensor([uniform], dtype=torch.float64))[0].tolist() == [
            token
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k_sampling": -1}, "top_k_sampling is -1"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": None}, "top_p is None"),
        ({"top_k_sampling": 1.5}, "top_k_sampling is 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_sampling_needs_its_uniform_numbers():
    with pytest.raises(ValueError, match="one uniform number a row"):
        choose(LOGITS, Sampling(1.0))
