"""The verdict's arithmetic: known answers, scipy as the second opinion, symmetry, and what must be refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from eagle_lab.verdict.stats import (
    Decision,
    Reason,
    Verdict,
    Why,
    calm_rounds,
    calm_weights,
    hodges_lehmann,
    judge,
    judge_instances,
    look_alpha,
    median_interval,
    paired_interval,
    signed_rank_interval,
    t_interval,
)

DRAWS = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_draws():
    """Every test meets the same draws, alone or among others."""
    DRAWS.bit_generator.state = np.random.default_rng(7).bit_generator.state


def fork(ratio: float, n: int = 20, noise: float = 0.004) -> list[tuple[float, float]]:
    base = DRAWS.uniform(0.5, 2, n)
    return list(zip(base, base * ratio * np.exp(DRAWS.normal(0, noise, n)), strict=True))


# --- estimate and intervals


def test_hodges_lehmann_of_three_by_hand():
    # Walsh averages of 1, 2, 6: 1, 1.5, 2, 3.5, 4, 6
    assert hodges_lehmann([1.0, 2.0, 6.0]) == 2.75


def test_signed_rank_interval_known_answer():
    # Tables: n = 8 rejects at 5% two-sided where T <= 3, so the ends are the 4th Walsh averages from each end.
    d = np.array([1.0, 2, 4, 8, 16, 32, 64, 128])
    walsh = sorted((a + b) / 2 for i, a in enumerate(d) for b in d[i:])
    assert signed_rank_interval(d, 0.05) == (walsh[3], walsh[-4])


@pytest.mark.parametrize(("alpha", "smallest"), [(0.05, 6), (0.1, 5), (0.05 / 3, 7), (0.01, 8)])
def test_too_few_pairs_have_an_infinite_interval(alpha, smallest):
    assert np.isinf(signed_rank_interval(np.arange(smallest - 1.0), alpha)).all()
    assert np.isfinite(signed_rank_interval(np.arange(float(smallest)), alpha)).all()


@pytest.mark.parametrize(
    ("n", "alpha"), [(5, 0.1), (6, 0.05), (7, 0.05), (8, 0.01), (20, 0.05), (20, 0.1), (40, 0.01)]
)
def test_interval_ends_are_where_scipys_p_crosses_alpha(n, alpha):
    d = DRAWS.standard_t(3, n)
    low, high = signed_rank_interval(d, alpha)

    def p(shift: float) -> float:
        return scipy_stats.wilcoxon(d - shift, method="exact").pvalue

    step = 1e-9
    assert p(low - step) <= alpha < p(low + step)
    assert p(high + step) <= alpha < p(high - step)


def test_a_batch_equals_one_by_one():
    d = DRAWS.normal(size=(3, 4, 9))
    low, high = signed_rank_interval(d)
    for i in np.ndindex(3, 4):
        assert (low[i], high[i]) == signed_rank_interval(d[i])
        assert hodges_lehmann(d)[i] == hodges_lehmann(d[i])


def test_t_interval_equals_scipys():
    x = DRAWS.normal(size=5)
    expected = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert t_interval(x) == pytest.approx(tuple(expected))


def test_median_interval_equals_scipys_quantile_test():
    x = DRAWS.exponential(size=20)
    low, middle, high = median_interval(x)
    expected = scipy_stats.quantile_test(x, p=0.5).confidence_interval(0.95)
    assert (low, high) == (expected.low, expected.high)
    assert middle == np.median(x)
    assert np.isinf(median_interval(x[:5])[0])
    for wrong in ([], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError):
            median_interval(wrong)


def test_paired_interval_is_judges():
    pairs = np.array(fork(0.9))
    verdict = judge([pairs])
    assert paired_interval(pairs[:, 0], pairs[:, 1]) == (verdict.low, verdict.estimate, verdict.high)
    with pytest.raises(ValueError):
        paired_interval([1.0, 2.0], [1.0])


# --- decisions


@pytest.mark.parametrize(
    ("ratio", "decision"), [(0.95, Decision.ADOPT), (1.06, Decision.REVERT), (1.0, Decision.NO_DIFFERENCE)]
)
@pytest.mark.parametrize("forks", [1, 5])
def test_clear_cases(ratio, decision, forks):
    verdict = judge([fork(ratio) for _ in range(forks)])
    assert verdict.decision is decision
    assert verdict.low < verdict.estimate < verdict.high
    assert verdict.low < ratio * 1.01 and verdict.high > ratio / 1.01
    assert verdict.provisional == (forks < 5)
    assert verdict.pairs == 20 * forks


def whys(verdict):
    return [reason.why for reason in verdict.reasons]


def test_a_verdict_prints_as_its_bare_numbers():
    d = 0.953
    verdict = judge([[(1.0, d)] * 4] * 5)
    assert str(verdict) == "ADOPT 0.953 [0.953, 0.953], 20 pairs in 5 processes"
    one = judge([[(1.0, 1.0)] * 20])
    assert str(one) == "NO_DIFFERENCE 1.000 [1.000, 1.000], 20 pairs in 1 process, provisional"
    assert Reason(why=Why.PROVISIONAL, count=1, of=5) in one.reasons
    few = judge([[(1.0, 1.25)] * 2])
    assert str(few) == "INCONCLUSIVE 1.250, 2 pairs in 1 process, provisional"
    none = few.model_copy(update={"pairs": 0, "forks": 0, "estimate": math.nan})
    assert str(none) == "INCONCLUSIVE, 0 pairs in 0 processes, provisional"


def test_a_significant_but_small_change_is_not_adopted():
    verdict = judge([fork(0.996, 60, 0.002)])
    assert verdict.high < 1
    assert verdict.decision is Decision.NO_DIFFERENCE


def test_a_change_near_delta_with_a_wide_interval_is_inconclusive_and_says_why():
    wide = judge([[(1.0, 0.993 + x / 500) for x in range(-20, 21, 2)]])
    assert wide.decision is Decision.INCONCLUSIVE
    assert whys(wide)[0] is Why.HOLDS_ONE
    narrow = judge([[(1.0, 0.9904 + x / 10_000) for x in range(-20, 21, 2)]])
    assert narrow.decision is Decision.INCONCLUSIVE
    assert whys(narrow)[0] is Why.SMALL


def test_few_pairs_in_one_fork_are_inconclusive():
    verdict = judge([fork(0.5, 5)])
    assert verdict.decision is Decision.INCONCLUSIVE
    assert (verdict.low, verdict.high) == (0.0, math.inf)
    assert Why.NO_INTERVAL in whys(verdict) and Reason(why=Why.FEW_PAIRS, count=5, of=6) in verdict.reasons


def test_min_pairs():
    pairs = [fork(0.9, 4) for _ in range(5)]
    assert judge(pairs, min_pairs=20).decision is Decision.ADOPT
    assert judge(pairs, min_pairs=21).decision is Decision.INCONCLUSIVE


def test_ties_in_every_pair_and_between_pairs():
    assert judge([[(2.0, 2.0)] * 20]).decision is Decision.NO_DIFFERENCE
    coarse = judge([[(1.0, 0.95)] * 15 + [(1.0, 1.0)] * 5])  # a clock of few steps
    assert coarse.decision is Decision.ADOPT
    assert coarse.low == pytest.approx(0.95)


def test_a_change_of_exactly_delta_counts_both_ways():
    assert judge([[(1.0, 1.02)] * 20], delta=0.02).decision is Decision.REVERT
    assert judge([[(1.02, 1.0)] * 20], delta=0.02).decision is Decision.ADOPT


def test_forks_count_once_each_however_many_pairs_they_kept():
    forks = [[(1.0, 0.9)] * 3, [(1.0, 1.0)] * 30]
    assert judge(forks).estimate == pytest.approx(math.sqrt(0.9))


def test_two_forks_use_t_with_one_degree_of_freedom():
    verdict = judge([[(1.0, 0.94)] * 10, [(1.0, 0.95)] * 10])
    expected = scipy_stats.ttest_1samp(np.log([0.94, 0.95]), 0).confidence_interval(0.95)
    assert np.log([verdict.low, verdict.high]) == pytest.approx(tuple(expected))
    assert verdict.decision is Decision.INCONCLUSIVE
    assert verdict.provisional


def test_unlike_forks_are_inconclusive_though_each_alone_would_adopt_or_revert():
    forks = [fork(r, 20, 0.001) for r in (0.9, 1.1, 0.93, 1.08, 1.0)]
    assert judge(forks[:1]).decision is Decision.ADOPT
    assert judge(forks).decision is Decision.INCONCLUSIVE


# --- the A/A control, looks


def test_a_sound_control_changes_nothing():
    forks = [fork(0.95) for _ in range(5)]
    control = [[(1.0, 1.001), (1.0, 0.999), (1.0, 1.0)] * 4]
    assert judge(forks, control=control).decision is Decision.ADOPT


@pytest.mark.parametrize(
    ("ratio", "n"),
    [(1.004, 20), (1.03, 4), (0.96, 20)],  # it excludes 1; its estimate is beyond delta; both
)
def test_a_faulty_control_makes_it_inconclusive_and_says_why(ratio, n):
    verdict = judge([fork(0.95) for _ in range(5)], control=[[(1.0, ratio)] * n])
    assert verdict.decision is Decision.INCONCLUSIVE
    assert verdict.reasons[0].why is Why.CONTROL_DIFFERS
    assert verdict.reasons[0].interval[1] == pytest.approx(ratio)


def test_look_alpha():
    assert look_alpha(0.05, (10, 15, 20)) == pytest.approx(0.05 / 3)
    for looks in ((), (0, 5), (10, 10), (20, 10)):
        with pytest.raises(ValueError):
            look_alpha(0.05, looks)


# --- what is refused


@pytest.mark.parametrize(
    ("forks", "words"),
    [
        ([], "no pairs at all"),
        ([[]], "holds no pairs"),
        ([fork(1.0), []], "Number 2 of the forks holds no pairs"),
        ([[(1.0, math.nan)] * 8], "positive finite"),
        ([[(1.0, math.inf)] * 8], "positive finite"),
        ([[(1.0, 0.0)] * 8], "positive finite"),
        ([[(1.0, -1.0)] * 8], "positive finite"),
        ([(1.0, 2.0), (1.0, 2.0)], "list of"),  # pairs without their fork
        ([[1.0] * 8, [2.0] * 8], "list of"),  # two unpaired samples
        ([[(1.0, 2.0, 3.0)] * 8], "list of"),
        ([[(1.0, 2.0), (1.0,)]], "list of"),
        ([[("a", "b")] * 8], "list of"),
        ([[(1.0, None)] * 8], "positive finite"),
        ([None], "list of"),
        (None, "list with a list of pairs for each fork"),
        (iter([fork(1.0)]), "list with a list of pairs for each fork"),
    ],
)
def test_anything_but_pairs_of_times_is_one_clear_sentence(forks, words):
    with pytest.raises(ValueError, match=words) as error:
        judge(forks)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    if forks:
        with pytest.raises(ValueError, match="control forks"):
            judge([fork(1.0)], control=forks)


@pytest.mark.parametrize(
    "wrong", [{"delta": 0.0}, {"delta": 1.0}, {"alpha": 0.0}, {"alpha": 0.5}, {"delta": math.nan}]
)
def test_thresholds_out_of_range(wrong):
    with pytest.raises(ValueError, match="must lie"):
        judge([fork(1.0)], **wrong)


# --- properties

TIMES = st.floats(1e-4, 1e4)
FORKS = st.lists(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=12), min_size=1, max_size=6)
NEAR = st.floats(0.97, 1.03).map(lambda x: (1.0, x))
NEAR_FORKS = st.lists(st.lists(NEAR, min_size=1, max_size=12), min_size=1, max_size=6)
OPPOSITE = {Decision.ADOPT: Decision.REVERT, Decision.REVERT: Decision.ADOPT}


@settings(deadline=None, max_examples=150)
@given(FORKS | NEAR_FORKS)
def test_swapping_the_arms_inverts_the_ratio_and_the_decision(forks):
    one, other = judge(forks), judge([[(c, b) for b, c in pairs] for pairs in forks])
    assert other.estimate == pytest.approx(1 / one.estimate)
    assert other.low == pytest.approx(1 / one.high if one.high else math.inf)
    assert other.decision is OPPOSITE.get(one.decision, one.decision)


@settings(deadline=None, max_examples=100)
@given(FORKS | NEAR_FORKS, st.sampled_from([1e-9, 1e-3, 1024.0]))
def test_the_unit_of_time_does_not_matter(forks, unit):
    one, other = judge(forks), judge([[(unit * b, unit * c) for b, c in pairs] for pairs in forks])
    assert other.estimate == pytest.approx(one.estimate)
    assert other.low == pytest.approx(one.low)


@settings(deadline=None, max_examples=200)
@given(FORKS | NEAR_FORKS)
def test_a_decision_keeps_its_promises(forks):
    v = judge(forks)
    assert v.low <= v.estimate * (1 + 1e-12) and v.estimate <= v.high * (1 + 1e-12)
    assert v.low <= v.equivalence[0] and v.equivalence[1] <= v.high
    if v.decision is Decision.ADOPT:
        assert v.high < 1 and v.estimate <= 1 / 1.01 + 1e-12
    if v.decision is Decision.REVERT:
        assert v.low > 1 and v.estimate >= 1.01 - 1e-12
    if v.decision is Decision.NO_DIFFERENCE:
        assert v.equivalence[0] > 1 / 1.01 and v.equivalence[1] < 1.01
    assert v.reasons
    assert Verdict.model_validate(json.loads(json.dumps(v.model_dump(mode="json"), allow_nan=False))) == v


SLICES = arrays(np.float64, (5, 3, 4), elements=st.floats(-9, 2))


@settings(deadline=None)
@given(SLICES, st.floats(-1, 1))
def test_slices_that_are_longer_by_a_factor_move_the_estimate_by_it_and_no_weight(logs, by):
    slower = logs + np.array([0, 0, by])[:, None]
    assert calm_weights(slower) == pytest.approx(calm_weights(logs), rel=1e-3)
    (was, rounds, base_s), found = calm_rounds(logs, 2, (0, 1)), calm_rounds(slower, 2, (0, 1))
    assert found.ratio == pytest.approx(was + by, abs=1e-5) and found.base_s == pytest.approx(
        base_s, rel=1e-5
    )
    assert rounds.mean() == pytest.approx(was, abs=1e-5)
    assert found.rounds - found.ratio == pytest.approx(rounds - was, abs=1e-3)


@settings(deadline=None)
@given(SLICES, st.permutations(range(3)), st.permutations(range(5)), st.floats(-3, 3))
def test_weights_favour_no_session_no_round_and_no_unit(logs, sessions, rounds, unit):
    found = calm_weights(logs[:, sessions][rounds] + unit)
    assert found == pytest.approx(calm_weights(logs)[:, sessions][rounds], rel=1e-3)
    assert calm_rounds(logs[:, [1, 0, 2]], 1, (0,)).ratio == pytest.approx(
        calm_rounds(logs, 0, (1,)).ratio, abs=1e-5
    )


def test_what_is_true_of_every_round_every_round_says():
    """A session 5% slower throughout, half of whose rounds were three times as slow for all: none of them scatters."""
    logs = np.log(3.0) * (np.arange(12) % 2)[:, None, None] + np.zeros((12, 3, 4))
    logs[:, 2, 3] += math.log(1.2)
    found = calm_rounds(logs, 2, (0, 1))
    assert found.ratio == pytest.approx(math.log(1.05)) and found.rounds == pytest.approx([found.ratio] * 12)


def test_sums_that_clearly_say_otherwise_hold_a_verdict_back():
    rng = np.random.default_rng(0)
    forks = [rng.normal(0, 0.002, 3) for _ in range(5)]
    sums = [fork + 0.04 + rng.normal(0, 0.002, 3) for fork in forks]
    assert judge_instances(forks, pairs=180).decision is Decision.NO_DIFFERENCE
    found = judge_instances(forks, pairs=180, sums=sums)
    assert found.decision is Decision.INCONCLUSIVE
    (doubt,) = (r for r in found.reasons if r.why is Why.SUMS_DIFFER)
    assert doubt.interval[0] < math.exp(0.04) < doubt.interval[2] and doubt.interval[0] > 1.03
    undecided = [fork + x for fork, x in zip(forks, (0.03, -0.03, 0.02, -0.02, 0.0), strict=True)]
    found = judge_instances(undecided, pairs=180, sums=[fork + 0.04 for fork in undecided])
    assert found.decision is Decision.INCONCLUSIVE and Why.SUMS_DIFFER not in {r.why for r in found.reasons}


@pytest.mark.parametrize(("at", "by"), [(0.0, 0.002), (0.06, 0.02)])
def test_sums_that_would_end_alike_or_scatter_widely_hold_nothing_back(at, by):
    rng = np.random.default_rng(0)
    forks = [at + rng.normal(0, 0.002, 3) for _ in range(5)]
    alone = judge_instances(forks, pairs=180)
    alike = [fork + by + rng.normal(0, 0.0002, 3) for fork in forks]
    wide = [fork + rng.normal(0, 0.05, 3) for fork in forks]
    assert alone.decision is (Decision.REVERT if at else Decision.NO_DIFFERENCE)
    assert (
        judge_instances(forks, pairs=180, sums=alike) == alone == judge_instances(forks, pairs=180, sums=wide)
    )


def test_a_disturbed_round_of_one_slice_hardly_counts_and_its_other_slices_do():
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 0.01, (12, 3, 4))
    logs[5, 1, 2] += 1.0
    weights = calm_weights(logs)
    assert weights[5, 1, 2] < 1e-3 * np.median(weights) < min(weights[5, 1, 1], weights[5, 0, 2])
    at, rounds, base_s = calm_rounds(logs, 2, (0, 1))
    assert base_s == pytest.approx(4, rel=0.02), "four slices of a second, without the late one"
    assert rounds.mean() == pytest.approx(at, abs=1e-4) and abs(at) < 0.01
