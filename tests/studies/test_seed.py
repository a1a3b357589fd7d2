"""The first investigation: its contradiction is found, consistent figures pass, and claims follow the records."""

from __future__ import annotations

import pytest
from make import LAWS, make_record, make_sweep

from eagle_lab.measure.records import Difference, read, record_path, write
from eagle_lab.studies import seed as study
from eagle_lab.studies.seed import Finding, SeedRecord, SeedSettings, audit, findings, ours


@pytest.fixture
def published():
    return study.published()


def with_shares(published, *shares):
    arms = {
        name: arm.model_copy(update={"mask_share": share})
        for (name, arm), share in zip(published.arms.items(), shares, strict=True)
    }
    return published.model_copy(update={"arms": arms})


def test_its_own_arithmetic_is_right_and_its_shares_are_not(published):
    found = audit(published)
    assert (found.latency, found.mask_ratio, found.throughput) == pytest.approx(
        (5.254, 11.15, -5.006), abs=1e-3
    )
    assert found.calls == pytest.approx((31.0, 119.8, 113.1), abs=0.05)
    assert found.most_calls == 53  # 51.2 tokens were decoded, so 52 cycles, and the prompt's
    assert found.fits_ms == pytest.approx((10, 11.15)) and not found.consistent
    assert [name for name, fits in found.agrees.items() if not fits] == [
        "tokens", "calls_by_shares", "share_before", "share_after"
    ]  # fmt: skip


def test_figures_that_fit_are_not_flagged(published):
    fixed = audit(with_shares(published, 0.005, 0.055))  # 31 calls' shares, rounded as one would print them
    assert fixed.consistent and [name for name, fits in fixed.agrees.items() if not fits] == ["tokens"]
    few = published.model_copy(update={"settings": {**published.settings, "max_new_tokens": 5}})
    speeds = {
        n: a.model_copy(update={"tokens_per_second": 5.0})
        for n, a in with_shares(few, 0.005, 0.055).arms.items()
    }
    assert not audit(few.model_copy(update={"arms": speeds})).consistent  # more calls than tokens
    # a slower part in a faster whole
    arm = published.arms["candidate"].model_copy(update={"latency_ms": 1000.0})
    assert not audit(published.model_copy(update={"arms": {**published.arms, "candidate": arm}})).consistent


def times(scale):
    return lambda n: LAWS["rebuild"](n) * (scale(n) if callable(scale) else scale)


USUAL = {"rebuild": 1.0, "incremental": 2.5, "incremental_inplace": 2.0, "doubling": 0.3}


def of_machine(gpu, ratio=1.002, mask=2.5, call_s=2e-4, differs=False, **builders):
    """Our records of one machine: a redone experiment, and a sweep with each builder's time over rebuild's."""
    device = "cuda" if gpu else "cpu"
    swept = make_sweep({name: times(scale) for name, scale in {**USUAL, **builders}.items()}, device=device)
    compared = make_record(ratio, call=(call_s, mask * call_s), candidate="incremental")
    if differs:
        tie = Difference(position=1, left=1, right=2, margin=0.0, tolerance=0.1)
        compared.samples[0] = compared.samples[0].model_copy(update={"difference": tie})
    settings = SeedSettings(target="x/SmolLM2", tokens=50, stated_acceptance=None)
    common = {name: getattr(swept, name) for name in ("created", "command", "environment")}
    done = SeedRecord(**common, settings=settings, comparison=compared)
    return ours(gpu, {"one": done}, {}, {"sweep": swept})


NOTHING = ours(True, {}, {}, {})


def test_a_machines_numbers_are_its_own():
    found = of_machine(False)
    assert found.machine == "A CPU, 2 cores" and found.best == "doubling" and found.kernel_s is None
    assert found.ratios["incremental", 63][1] == pytest.approx(2.5, rel=0.02)
    assert found.without_clone == pytest.approx(0.2, abs=0.02)
    assert found.growths["incremental"][1] == pytest.approx(1, abs=0.02)
    (decoded,) = found.decodes.values()
    assert decoded.mask[1] == pytest.approx(2.5, rel=0.02) and decoded.same == decoded.pairs == 20
    assert decoded.shares == pytest.approx((0.004, 0.01), rel=0.05)
    assert ours(True, {}, {}, {"sweep": make_sweep(LAWS)}).machine is None


CONFIRMED, REFUTED, UNSUPPORTED = Finding
LARGE_HALF = {"incremental": lambda n: 2.0 if n < 500 else 0.5}
CPU, GPU = ({"gpu": gpu} for gpu in (False, True))


@pytest.mark.parametrize(
    ("finding", "records", "claims"),
    [
        (REFUTED, CPU, "mask-2-percent mask-20-percent complexity clone-overhead helps-cpu-only helps-large-trees too-small"),
        (CONFIRMED, CPU, "output-consistent"),
        # a CPU's record doesn't settle what was claimed of a GPU
        (UNSUPPORTED, CPU, "end-to-end-slower revert mask-11x-slower baseline-optimal helps-custom-kernel"),
        (UNSUPPORTED, CPU | {"differs": True}, "output-consistent"),
        (CONFIRMED, CPU | LARGE_HALF, "helps-large-trees"),
        (UNSUPPORTED, CPU | LARGE_HALF, "too-small"),
        # over half of its time goes away without the clone
        (CONFIRMED, CPU | {"incremental_inplace": 0.95}, "clone-overhead"),
        (CONFIRMED, CPU | {"incremental": 0.8}, "helps-cpu-only"),
        (CONFIRMED, CPU | {"rebuild": lambda n: n / 63, "incremental": 1.0}, "complexity"),
        (CONFIRMED, GPU | {"cuda": 0.3}, "helps-custom-kernel"),
        (UNSUPPORTED, GPU | {"cuda": 1.2, "doubling": 0.95}, "baseline-optimal"),
        (CONFIRMED, GPU | {"ratio": 1.053, "mask": 10.0, "incremental": 10.0}, "end-to-end-slower mask-11x-slower"),
        (REFUTED, GPU | {"ratio": 1.005, "mask": 3.0, "incremental": 3.0}, "end-to-end-slower mask-11x-slower"),
        # two numbers of which only one has the size decide nothing
        (UNSUPPORTED, GPU | {"mask": 10.0}, "mask-11x-slower"),
        (CONFIRMED, GPU | {"ratio": 1.1, "call_s": 1e-2, "mask": 1.5}, "revert"),
        (REFUTED, GPU | {"ratio": 0.9, "call_s": 1e-2, "mask": 0.5}, "revert"),
        (UNSUPPORTED, GPU | {"ratio": 1.0}, "revert"),
    ],
)  # fmt: skip
def test_claims_follow_the_records(published, finding, records, claims):
    here = of_machine(**records)
    found = findings(published, *((NOTHING, here) if records["gpu"] else (here, NOTHING)))
    assert {claim: found[claim] for claim in claims.split()} == dict.fromkeys(claims.split(), finding)


def test_shares_that_fit_are_not_refuted(published):
    fair = with_shares(published, 0.005, 0.055)
    assert findings(fair, NOTHING, NOTHING)["mask-20-percent"] == Finding.UNSUPPORTED


def test_without_any_record_nothing_is_made_up(published):
    found = findings(published, NOTHING, NOTHING)
    assert list(found) == [claim.id for claim in published.claims]
    by_itself = {claim for claim, finding in found.items() if finding != Finding.UNSUPPORTED}
    assert by_itself == {"mask-2-percent", "mask-20-percent"}


def test_a_claim_without_a_rule_is_an_error(published, monkeypatch):
    monkeypatch.setattr(study, "CLAIMS", {k: v for k, v in study.CLAIMS.items() if k != "complexity"})
    with pytest.raises(ValueError, match="no rule for the claim 'complexity'"):
        findings(published, NOTHING, NOTHING)


@pytest.mark.parametrize(("stated", "tokens"), [(None, 50), (3.0, 17)])
def test_the_experiment_is_done_again_and_kept(tiny_pair, monkeypatch, tmp_path, stated, tokens):
    asked = {}

    class Done:
        record = make_record(target="x/SmolLM2")

    monkeypatch.setattr(study, "compare", lambda pair, **options: asked.update(options) or Done)
    monkeypatch.setattr(study, "stated_acceptance", lambda pair: stated)
    kept = study.redo(tiny_pair, iterations=2, forks=1)
    assert asked["max_new_tokens"] == tokens
    assert (asked["baseline"], asked["candidate"]) == ("rebuild", "incremental")
    assert kept.settings.stated_acceptance == stated and len(kept.comparison.samples) == 20
    write(kept, record_path(kept, tmp_path))
    assert read(tmp_path / "seed-cpu-smollm2.json", SeedRecord) == kept
