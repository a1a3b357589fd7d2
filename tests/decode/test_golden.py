"""Decoding against what the official implementation did with the same tiny pair (tests/golden/README.md)."""

from __future__ import annotations

import json

import pytest
import torch
from make import GOLDEN

from eagle_lab import generate, generate_plain
from eagle_lab.decode.masks import rebuild

CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
RUNS = [(case, run) for case in CASES for run in case["runs"]]
NAMES = [f"{c['total_tokens']}-nodes-prompt-of-{len(r['prompt'])}" for c, r in RUNS]


@pytest.fixture
def endless(tiny_pair, monkeypatch):
    """The tiny pair without an end-of-sequence id: the recorded runs go on after it."""
    monkeypatch.setattr(tiny_pair.target.generation_config, "eos_token_id", None)
    monkeypatch.setattr(tiny_pair.target.config, "eos_token_id", None)
    assert not tiny_pair.eos
    return tiny_pair


def sizes(case):
    return {name: case[name] for name in ("top_k", "depth", "total_tokens")}


@pytest.mark.parametrize(("case", "run"), RUNS, ids=NAMES)
def test_every_recorded_cycle_is_reproduced(endless, case, run):
    wanted = run["cycles"]
    # the recording went on to the end of its last cycle, past max_new_tokens
    count = sum(len(cycle["committed"]) for cycle in wanted) + 1
    found = generate(endless, run["prompt"], count, **sizes(case))
    assert len(found.cycles) == len(wanted)
    for ours, theirs in zip(found.cycles, wanted, strict=True):
        assert ours.prefix == theirs["prefix"]
        assert list(ours.tokens) == theirs["tokens"]
        assert list(ours.parents) == theirs["parents"]
        assert list(ours.depths) == theirs["depths"]
        assert list(ours.committed) == theirs["committed"]
        assert ours.bonus == theirs["bonus"]
        assert ours.scores == pytest.approx(theirs["scores"], abs=1e-3)
    assert found.acceptance_length == pytest.approx((count - 1) / len(wanted))


@pytest.mark.parametrize(("case", "run"), RUNS, ids=NAMES)
def test_exactly_the_recorded_tokens(endless, case, run):
    found = generate(endless, run["prompt"], case["max_new_tokens"], **sizes(case))
    assert found.tokens == run["new_tokens"]
    assert generate_plain(endless, run["prompt"], case["max_new_tokens"]).tokens == run["new_tokens"]


@pytest.mark.parametrize(("case", "run"), RUNS, ids=NAMES)
def test_the_first_trees_retrieve_indices(case, run):
    first = run["cycles"][0]
    mask = rebuild(torch.tensor(first["parents"][1:]))
    leaves = [node for node in range(len(mask)) if mask[:, node].sum() == 1]
    paths = [mask[leaf].nonzero()[:, 0].tolist() for leaf in leaves]
    width = max(map(len, paths))
    padded = [path + [-1] * (width - len(path)) for path in paths]
    assert padded == run["retrieve_indices_of_first_cycle"]


def test_decoding_ends_at_the_first_end_of_sequence(tiny_pair):
    case, run = next((c, r) for c, r in RUNS if 2 in r["new_tokens"])
    expected = run["new_tokens"][: run["new_tokens"].index(2) + 1]
    assert generate(tiny_pair, run["prompt"], case["max_new_tokens"], **sizes(case)).tokens == expected
    assert generate_plain(tiny_pair, run["prompt"], case["max_new_tokens"]).tokens == expected


def test_the_recording_can_disagree(endless, monkeypatch):
    """A head with one changed weight drafts other trees, so the comparison above is not vacuous; the tokens stay."""
    case, run = RUNS[0]
    weight = endless.head.fc.weight
    kept = weight.clone()
    weight.mul_(1.2)
    try:
        found = generate(endless, run["prompt"], case["max_new_tokens"], **sizes(case))
    finally:
        weight.copy_(kept)
    assert [list(c.tokens) for c in found.cycles] != [c["tokens"] for c in run["cycles"]]
    assert found.tokens == run["new_tokens"]
