"""The first investigation's figures: the contradiction is found; consistent figures pass; claims follow the records."""

from __future__ import annotations

import copy

import pytest
import torch

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.tree import check_parents, depths_of
from eagle_lab.studies import seed_claims
from eagle_lab.studies.seed_audit import arithmetic, claimed_shares, figures, load_seed, most_calls
from eagle_lab.studies.seed_claims import (
    CLAIMS,
    CONFIRMED,
    REFUTED,
    UNSUPPORTED,
    audit_words,
    findings,
    tally,
)
from eagle_lab.studies.seed_masks import (
    BUILDERS,
    clone_part,
    growth,
    milliseconds,
    random_tree,
    ratio,
    time_masks,
)


@pytest.fixture
def seed():
    return load_seed()


def test_the_figures_are_those_published(seed):
    found = figures(seed)
    assert found["whole"] == pytest.approx((1.19773, 1.26066))
    assert found["part"] == pytest.approx((0.00020, 0.00223))
    assert claimed_shares(seed) == (0.02, 0.20)
    assert most_calls(seed) == 53  # 51.2 tokens were decoded, so 52 cycles, and the prompt's


def test_its_own_arithmetic_is_right_and_its_shares_are_not(seed):
    found = {check.what: check for check in arithmetic(seed)}
    for right in ("end-to-end change", "mask construction, times as long", "throughput change"):
        assert found[right].agrees, right
    assert found["calls a run, by the end-to-end change"].recomputed == "31"
    for wrong in ("calls a run, by the shares", "the mask's share before", "the mask's share after"):
        assert not found[wrong].agrees, wrong
    assert "53 calls" in audit_words(seed) and "draft step" in audit_words(seed)


def consistent(seed):
    """The same report with shares that its own 31 calls make."""
    fixed = copy.deepcopy(seed)
    for claim in fixed["claims"]:
        claim["quote"] = claim["quote"].replace("only 2%", "only 0.5%").replace("it 20%", "it 5.5%")
    return fixed


def test_consistent_figures_pass(seed):
    fixed = consistent(seed)
    assert claimed_shares(fixed) == (0.005, 0.055)
    assert all(c.agrees for c in arithmetic(fixed) if "calls" in c.what or "share" in c.what)
    assert "One number of calls" in audit_words(fixed)
    by_id = {f.id: f for f in findings(fixed, {}, {}, {})}
    assert by_id["mask-20-percent"].finding == UNSUPPORTED


def masks(times, nodes=(63, 255, 511, 1023)):
    """A mask record with a builder's time as a multiple of rebuild's, or as a function of the size."""
    rows = []
    for n in nodes:
        for builder in BUILDERS:
            scale = times[builder](n) if callable(times[builder]) else times[builder]
            jitter = [1 + 0.001 * k for k in range(8)]
            rows.append(
                {
                    "nodes": n,
                    "builder": builder,
                    "samples": [
                        [n * 1e-6 * j, n * 1e-6 * scale * j * (1 + 1e-4 * k)] for k, j in enumerate(jitter)
                    ],
                }
            )
    return rows


def seed_record(times, gpu=None, whole=1.002, differs=False):
    samples = [
        {"fork": f, "iteration": i, "control": False, "dropped": None, "new_tokens": 50, "cycles": 20, "prompt": "p",
         "baseline_s": 1.0, "candidate_s": whole * (1 + 1e-3 * (i - 1)), **({"difference": "tie"} if differs and not i else {})}
        for f in range(5) for i in range(4)
    ]  # fmt: skip
    settings = {
        "iterations": 20,
        "forks": 5,
        "delta": 0.01,
        "alpha": 0.05,
        "looks": [],
        "target": "x/SmolLM2",
        "baseline": "rebuild",
        "candidate": "incremental",
    }
    return {
        "environment": {"gpu": gpu, "cpu": {"name": "CPU", "cores": 2}},
        "settings": settings,
        "comparison": {"settings": settings, "samples": samples, "parts": [], "events": []},
        "masks": masks(times),
    }


USUAL = {"rebuild": 1.0, "incremental": 2.5, "incremental_inplace": 2.0, "doubling": 0.3}


def test_claims_follow_the_records(seed):
    here = {"cpu": seed_record(USUAL)}
    found = {f.id: f.finding for f in findings(seed, here, {}, {})}
    assert found["mask-2-percent"] == found["mask-20-percent"] == REFUTED
    assert found["complexity"] == found["clone-overhead"] == REFUTED
    assert found["helps-cpu-only"] == found["helps-large-trees"] == found["too-small"] == REFUTED
    assert found["output-consistent"] == CONFIRMED
    # a CPU's record doesn't settle what was claimed of a GPU
    about_a_gpu = ("end-to-end-slower", "mask-11x-slower", "baseline-optimal", "helps-custom-kernel")
    assert all(found[claim] == UNSUPPORTED for claim in about_a_gpu)


def test_other_records_turn_the_findings(seed):
    other = {
        "rebuild": 1.0,
        "incremental": lambda n: 2.0 if n < 500 else 0.5,
        "incremental_inplace": 0.1,
        "doubling": 1.5,
    }
    found = {
        f.id: f.finding
        for f in findings(
            seed, {"cpu": seed_record({**other, "incremental_inplace": 0.95}, differs=True)}, {}, {}
        )
    }
    assert found["helps-large-trees"] == CONFIRMED and found["too-small"] != REFUTED
    assert found["clone-overhead"] == CONFIRMED  # over half of its time goes away without the clone
    assert found["output-consistent"] == UNSUPPORTED
    faster = {"cpu": seed_record({**USUAL, "incremental": 0.8})}
    assert {f.id: f.finding for f in findings(seed, faster, {}, {})}["helps-cpu-only"] == CONFIRMED


def test_a_gpus_record_decides_what_is_about_a_gpu(seed):
    gpu = {"name": "NVIDIA H100 80GB HBM3"}
    same = {
        f.id: f.finding
        for f in findings(
            seed, {"h100": seed_record({**USUAL, "incremental": 10.0}, gpu, whole=1.053)}, {}, {}
        )
    }
    assert same["mask-11x-slower"] == CONFIRMED and same["end-to-end-slower"] == CONFIRMED
    less = {
        f.id: f.finding
        for f in findings(
            seed, {"h100": seed_record({**USUAL, "incremental": 3.0}, gpu, whole=1.005)}, {}, {}
        )
    }
    assert less["mask-11x-slower"] == REFUTED and less["end-to-end-slower"] == REFUTED
    # two machines of which only one finds the size decide nothing
    two = {name: seed_record({**USUAL, "incremental": at}, gpu) for name, at in (("a", 10.0), ("b", 5.0))}
    near = findings(seed, two, {}, {})
    (eleven,) = (f for f in near if f.id == "mask-11x-slower")
    assert eleven.finding == UNSUPPORTED and "not what we find" in eleven.words


def test_without_any_record_nothing_is_made_up(seed):
    found = findings(seed, {}, {}, {})
    assert [f.id for f in found] == [claim["id"] for claim in seed["claims"]]
    assert all(f.words.strip() for f in found)
    assert {f.finding for f in found if f.id not in ("mask-2-percent", "mask-20-percent", "complexity")} == {
        UNSUPPORTED
    }
    assert "14 claims" in tally(found)


def test_a_claim_without_a_rule_is_an_error(seed, monkeypatch):
    monkeypatch.setattr(seed_claims, "CLAIMS", {k: v for k, v in CLAIMS.items() if k != "complexity"})
    with pytest.raises(ValueError, match="no rule for the claim 'complexity'"):
        findings(seed, {}, {}, {})


def test_mask_figures_from_known_samples():
    rows = masks({**USUAL, "incremental": lambda n: 2.5 * (n + 1) / 64})
    low, at, high = ratio(rows, "doubling", 63)
    assert low <= 0.3001 <= high and at == pytest.approx(0.3, rel=0.01)
    assert growth(rows, "rebuild") == pytest.approx(1, abs=0.02)
    assert growth(rows, "incremental") == pytest.approx(2, abs=0.02)
    assert clone_part(rows, 63) == pytest.approx(0.2, abs=0.01)
    assert milliseconds(rows, "rebuild", 63) == pytest.approx(0.063, rel=0.01)


@pytest.mark.parametrize("nodes", [1, 63, 511, 1023])
def test_random_trees_are_trees_of_the_size_and_depth_asked_for(nodes):
    parents = random_tree(nodes, torch.Generator().manual_seed(3)).tolist()
    assert len(parents) == nodes
    check_parents(parents)
    assert max(depths_of(parents)) <= 8


def test_builders_are_timed_in_pairs_and_a_wrong_one_is_refused(monkeypatch):
    rows = time_masks("cpu", ("rebuild", "doubling"), (15,), iterations=6, trees=2)
    assert [(m["builder"], len(m["samples"])) for m in rows] == [("rebuild", 6), ("doubling", 6)]
    assert all(t > 0 for m in rows for pair in m["samples"] for t in pair)
    monkeypatch.setitem(MASK_BUILDERS, "wrong", lambda parents: ~rebuild(parents))
    with pytest.raises(ValueError, match="'wrong' differs"):
        time_masks("cpu", ("wrong",), (15,), iterations=6, trees=2)
