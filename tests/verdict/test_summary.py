import shlex
from dataclasses import replace
from datetime import timedelta
from itertools import product

import numpy as np
import pytest
from make import ENVIRONMENT, control, make_instances, make_record

from eagle_lab import ROOT
from eagle_lab.measure.environment import Cause
from eagle_lab.measure.records import Counts, Difference, read
from eagle_lab.report.page import csv_text, moved, reasons, report
from eagle_lab.report.words import change, spread
from eagle_lab.verdict.record import (
    ArmTold,
    ComparisonRecord,
    EngineStopped,
    Forecast,
    ForkDied,
    Resumed,
    TreeChosen,
    TreeTried,
)
from eagle_lab.verdict.settings import again
from eagle_lab.verdict.stats import Decision, Reason, Why
from eagle_lab.verdict.summary import (
    CANDIDATE,
    against_baseline,
    between_steps,
    by_fork,
    calm_cycle_s,
    ceiling,
    consistency_of,
    cycle_noise,
    cycle_seconds,
    factors,
    instance_estimates,
    kept_instances,
    part_share,
    step_noise,
    summarise,
    sums,
    table,
    verdict_of,
)


def test_the_verdict_comes_from_the_record_alone():
    assert verdict_of(make_record(0.9)).decision is Decision.ADOPT
    assert verdict_of(make_record(1.1)).decision is Decision.REVERT
    assert verdict_of(make_record(1.0)).decision is Decision.NO_DIFFERENCE
    assert verdict_of(make_record(0.9, forks=1, per_fork=20)).provisional


def test_cycles_in_turn_are_judged_over_processes_with_their_control():
    found = make_instances(0.97)
    verdict = verdict_of(found)
    assert verdict.decision is Decision.ADOPT and verdict.method == "t over forks"
    assert (verdict.pairs, verdict.instances, verdict.forks) == (180, 15, 5) and not verdict.provisional
    assert verdict.low < 0.97 < verdict.high
    assert verdict_of(make_instances(1.0)).decision is Decision.NO_DIFFERENCE
    told = summarise(found)
    assert abs(told.control.estimate - 1) < 0.004 and told.rows[0].ratio == verdict.interval
    assert told.rows[0].baseline[1] == pytest.approx(50, rel=0.01)


def test_a_control_of_cycles_that_moves_makes_it_inconclusive():
    found = make_instances(0.97)
    for n, i in enumerate(found.instances):
        times = [(a, 1.03 * b, c) for a, b, c in i.seconds]
        found.instances[n] = i.model_copy(update={"seconds": times})
    assert verdict_of(found).decision is Decision.INCONCLUSIVE and Why.CONTROL_DIFFERS in whys(found)


def test_the_page_of_cycles_in_turn_reads_as_it_did(snapshot):
    found = make_instances(0.97, candidate="incremental", call=(0.00003, 0.00002))
    found.forecast = Forecast(count=15, seconds_each=2.5, half_width=0.004)
    found.finished = found.created + timedelta(minutes=3)
    for n, s in enumerate(found.samples):
        found.samples[n] = s.model_copy(update={"first_s": (0.1, 0.1)})
    snapshot(report(found, "chart.svg"), "page_cycles.md")


def whys(record):
    return {reason.why: reason for reason in verdict_of(record).reasons}


def test_dropped_pairs_do_not_count_and_too_few_left_is_inconclusive():
    record = make_record(0.9)
    record.samples = [
        s.model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)} if n < 11 else {})
        for n, s in enumerate(record.samples)
    ]
    assert verdict_of(record).decision is Decision.INCONCLUSIVE
    lost = whys(record)
    assert (lost[Why.PAIRS_LOST].count, lost[Why.PAIRS_LOST].of) == (9, 20)
    assert lost[Why.DROPPED] == Reason(why=Why.DROPPED, count=11, of=20, causes=(Cause.FOREIGN_LOAD,))
    record.samples = [s.model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)}) for s in record.samples]
    assert verdict_of(record).decision is Decision.INCONCLUSIVE and Why.NO_PAIRS in whys(record)
    assert report(record)


@pytest.mark.parametrize("ratio", [0.97, 1.03])
def test_no_verdict_against_its_own_ceiling(ratio):
    """A mask of 0.07% of the time can't make decoding 3% faster or slower: the false ADOPT of a committed ladder."""
    small = {"candidate": "incremental", "call": (0.7e-3 / 20, 0.7e-3 / 20)}
    found = make_record(ratio, **small)
    assert verdict_of(found).decision is Decision.INCONCLUSIVE
    doubt = whys(found)[Why.BEYOND_CEILING]
    assert doubt.most == pytest.approx(0.0007, rel=0.1) and doubt.times == pytest.approx(43, rel=0.15)
    # not where something else differs too, nor where the part is large enough
    other = make_record(ratio, **{**small, "candidate": "incremental,attention=tree"})
    assert verdict_of(other).decision in (Decision.ADOPT, Decision.REVERT)
    large = make_record(ratio, candidate="incremental", call=(0.05 / 20, 0.05 / 20))
    assert verdict_of(large).decision in (Decision.ADOPT, Decision.REVERT)


def test_an_interval_beyond_the_ceiling_is_doubted_though_the_part_matters():
    found = make_record(0.8, candidate="incremental", call=(0.03 / 20, 0.0001))
    assert Why.BEYOND_CEILING in whys(found)
    assert (
        verdict_of(make_record(0.97, candidate="incremental", call=(0.03 / 20, 0.0001))).decision
        is Decision.ADOPT
    )


def test_a_short_run_says_so():
    record = make_record(0.9)
    record.samples = record.samples[:13]
    assert whys(record)[Why.NOT_TAKEN] == Reason(why=Why.NOT_TAKEN, count=13, of=20)


def test_a_declared_control_that_is_gone_decides_nothing_and_is_told():
    record = make_record(0.9, control_forks=1)
    assert verdict_of(record).decision is Decision.INCONCLUSIVE and Why.NO_CONTROL in whys(record)
    record.samples += control(record, 4)
    assert verdict_of(record).decision is Decision.ADOPT
    record.samples[-1] = record.samples[-1].model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)})
    assert verdict_of(record).decision is Decision.ADOPT
    found = whys(record)[Why.DROPPED]
    assert (found.count, found.of, found.control) == (1, 4, True)


def test_a_part_that_one_arm_cannot_time_is_unmeasured_not_a_crash():
    record = make_record(0.9)
    # a replayed cycle is one span
    record.parts = [
        p.model_copy(update={"calls_s": ()} if p.arm == "candidate" else {}) for p in record.parts
    ]
    assert ceiling(record) is None and consistency_of(record) is None and "not measured" in report(record)
    record = make_record(0.9)
    # the arms parted at a near tie, and one took a cycle less
    record.parts[0] = record.parts[0].model_copy(update={"calls_s": record.parts[0].calls_s[:-1]})
    assert ceiling(record) is not None and report(record)


def test_a_control_that_moves_makes_it_inconclusive():
    record = make_record(0.9)
    record.samples += control(record, 8, 1.05)
    assert verdict_of(record).decision is Decision.INCONCLUSIVE
    assert whys(record)[Why.CONTROL_DIFFERS].interval[1] == pytest.approx(1.05)


def test_the_table_has_the_original_investigations_rows():
    rows = {row.metric: row for row in table(make_record(0.9))}
    assert rows["E2E latency"].ratio[1] == pytest.approx(0.9, abs=0.01)
    assert rows["mask construction, a call"].baseline[1] == pytest.approx(0.2, abs=0.01)
    assert rows["output throughput"].ratio[1] == pytest.approx(1 / 0.9, abs=0.02)
    assert rows["output throughput"].baseline[1] == pytest.approx(50, abs=1)


def test_the_ceiling_is_amdahls():
    top = ceiling(make_record(call=(0.005, 0.001)))  # 20 calls of 5 ms in 1 s
    assert top.share == pytest.approx(0.1, abs=0.005)
    assert top.gain == pytest.approx(0.1 / 0.9, abs=0.01)


def test_a_gain_that_the_part_cannot_explain_is_flagged():
    assert consistency_of(make_record(0.9, call=(0.0002, 0.0001))).accounts is False
    assert consistency_of(make_record(0.9, call=(0.0055, 0.0005))).accounts is True


def test_the_command_says_everything_that_the_settings_do():
    def given(**changes):
        return again(make_record(**{"pairs_of": "cycles", **changes}).settings)

    usual = given()
    assert usual.startswith("papermill notebooks/compare.ipynb out.ipynb -p target t -p draft d")
    assert usual.endswith("-p prompts p")
    assert "target" not in given(embedded=True)
    random = given(target="shape:tiny", draft="shape:tiny")
    assert "-p target shape:tiny" in random and "-p draft" not in random
    own = {"prompts": ["ids-0a", "maths-01"], "own_prompts": {"ids-0a": "1 17 42"}}
    brought = shlex.split(given(**own, load={"device_map": "auto"}))
    assert "prompts=[[1, 17, 42], *e.load_prompts('maths-01')]" in brought[2]
    assert "e.load(target='t', draft='d', device='cpu', dtype='float32', device_map='auto')" in brought[2]
    compile(brought[2], "command", "exec")
    sampled = shlex.split(given(temperature=0.7, looks=[10, 20]))
    assert sampled[:2] == ["python", "-c"]
    assert "temperature=0.7" in sampled[2] and "looks=(10, 20)" in sampled[2] and "draft='d'" in sampled[2]
    compile(sampled[2], "command", "exec")
    assert "-p minutes 2.0" in given(minutes=2.0)
    assert "pairs_of='decodes'" in shlex.split(given(pairs_of="decodes"))[2]


def test_intervals_are_written_plainly_and_never_with_infinite_ends():
    assert spread((0, 5, float("inf"))) == "5.00"
    assert change((0.9, 0.95, 1.01)) == "-5.0% [-10.0, +1.0]"
    few = make_record(0.9, forks=1, per_fork=3)
    few.parts = [p.model_copy(update={"calls_s": p.calls_s[:2]}) for p in few.parts]
    assert "inf" not in report(few) and "nan" not in report(few)


def test_the_page_reads_as_it_did(snapshot):
    record = make_record(0.9, control_forks=1)
    record.samples += control(record, 8, 1.05)
    tie = Difference(position=6, left=288, right=281, margin=0.125, tolerance=0.295)
    record.samples[3] = record.samples[3].model_copy(update={"difference": tie})
    record.samples[4] = record.samples[4].model_copy(update={"dropped": (Cause.FOREIGN_LOAD, Cause.THERMAL)})
    record.correctness = record.correctness.model_copy(update={"candidate": tie})
    record.events = [
        ForkDied(fork=1, exit_code=-9, last_words=""),
        Resumed(samples=8, commit="9876543210abcdef", dirty=True),
        TreeChosen(
            arm="candidate",
            prompts=["writing-07", "maths-07"],
            tried=[
                TreeTried(total_tokens=3, top_k=2, depth=2, seconds_a_token=0.0607),
                TreeTried(total_tokens=7, top_k=3, depth=3, seconds_a_token=None),
            ],
        ),
    ]
    cpu = record.environment.cpu.model_copy(update={"usable": 1.5, "affinity": 2, "quota": 1.5})
    record.environment = record.environment.model_copy(update={"cpu": cpu})
    snapshot(report(record, "chart.svg"), "page.md")


def test_every_reason_has_its_sentence():
    verdict = verdict_of(make_record(0.9))
    for why in Why:
        reason = Reason(
            why=why, count=1, of=2, causes=(Cause.POWER_CAP,), interval=(0.9, 1.0, 1.1), times=40.0,
            most=0.001,
        )  # fmt: skip
        (told,) = reasons(verdict.model_copy(update={"reasons": (reason,)}))
        assert told.endswith(".") and "\n" not in told and len(told) > 20, why


def test_the_committed_comparison_says_what_its_samples_support():
    record = read(ROOT / "data" / "results" / "compare-cpu-rebuild-vs-incremental.json", ComparisonRecord)
    assert record.verdict == verdict_of(record)
    page = ROOT / "data" / "results" / "compare-cpu-rebuild-vs-incremental.md"
    assert page.read_text() == report(record, "compare-cpu-rebuild-vs-incremental.svg")


def engines_record():
    """A chain of three in this kit, and in another engine that needs a fifth fewer cycles, each 10% longer."""
    record = make_record(0.88, rule="time per token", outside=True, candidate="engine=vllm")
    record.parts = []
    counts = (Counts(cycles=25, committed=50), Counts(cycles=20, committed=50))
    more = {"counts": counts, "candidate_tokens": 50, "first_s": (0.1, 0.05), "gap_s": (0.036, 0.039)}
    record.samples = [s.model_copy(update=more) for s in record.samples]
    return record


def test_two_factors_make_the_ratio():
    record = engines_record()
    found = factors(record)
    assert found.cycles[1] == pytest.approx(0.8) and found.cycle_s[1] == pytest.approx(1.1, abs=0.005)
    assert found.cycles[1] * found.cycle_s[1] == pytest.approx(verdict_of(record).estimate, abs=0.001)
    rows = {row.metric: row for row in table(record)}
    assert rows["TPOT"].baseline[1] == pytest.approx(1e3 * 0.9 / 49, abs=0.1)
    assert rows["mean_acceptance_length"].candidate[1] == 2.5 and rows["ITL"].candidate[1] == pytest.approx(
        39
    )
    assert factors(make_record(0.9)) is None  # nobody counted


def test_the_acceptance_length_is_pooled_over_cycles():
    record = engines_record()
    for n, sample in enumerate(record.samples):
        long = n % 2  # half of the texts have 40 cycles of 1 token, half 10 of 4
        told = Counts(cycles=10 if long else 40, committed=40)
        record.samples[n] = sample.model_copy(update={"counts": (told, told)})
    low, at, high = factors(record).acceptance_length.baseline
    assert low < at < high and at == pytest.approx(80 / 50)
    assert factors(record).cycles[1] == 1.0, "engines that need the same cycles say so"
    record.settings = record.settings.model_copy(update={"outside": False})
    assert factors(record) is None


def test_the_factor_that_moved_is_named():
    found = factors(engines_record())
    below, around = (0.7, 0.8, 0.9), (0.9, 1.0, 1.1)
    told = [
        moved(replace(found, cycles=one, cycle_s=other)) for one, other in product((below, around), repeat=2)
    ]
    assert told == [
        "Both moved.", "What moved is cycles needed.", "What moved is the time of a cycle.", "Neither is seen to have moved."
    ]  # fmt: skip
    assert moved(found) in report(engines_record())


def test_what_nobody_tells_is_not_told():
    record = engines_record()
    record.samples = [s.model_copy(update={"counts": None}) for s in record.samples]
    assert "Tokens a cycle (τ): baseline 2.50, candidate not told." in report(record)
    record.samples = [s.model_copy(update={"cycles": None}) for s in record.samples]
    assert "Tokens a cycle (τ): not told." in report(record)


def test_time_per_token_is_judged_where_texts_differ():
    record = engines_record()
    shorter = [s.model_copy(update={"candidate_tokens": 25}) for s in record.samples]
    record.samples = shorter
    assert verdict_of(record).estimate == pytest.approx(2 * 0.88, abs=0.01)


def test_the_table_as_csv():
    lines = csv_text(table(engines_record())).splitlines()
    assert lines[0] == (
        "metric,unit,baseline_low,baseline_estimate,baseline_high,candidate_low,candidate_estimate,candidate_high,"
        "ratio_low,ratio_estimate,ratio_high"
    )
    assert [line.partition(",")[0] for line in lines[1:]] == [row.metric for row in table(engines_record())]
    assert all(len(line.split(",")) == 11 for line in lines)


def test_a_page_of_two_engines(snapshot):
    record = engines_record()
    record.arms = [
        ArmTold(keys={"engine": "eagle_lab"}, engine="eagle_lab", version="0123abc", facts={"commit": "0123", "changes_left_out": True}),
        ArmTold(keys={"engine": "vllm"}, engine="vllm", version="0.26.0", facts={"threads": 2, "dirty": True}),
    ]  # fmt: skip
    record.by_blocks = True
    record.correctness = record.correctness.model_copy(
        update={
            "random_trees": 0,
            "unchecked": ("baseline",),
            "candidate": Difference(position=6, left=288, right=281, margin=0.5, tolerance=0.2),
        }
    )
    told = Difference(position=6, left=288, right=281, margin=0.5, tolerance=None)
    for n, where in enumerate(
        (told, Difference(position=3, left=5, right=None, margin=None, tolerance=None, unit="text"))
    ):
        record.samples[n] = record.samples[n].model_copy(update={"difference": where})
    record.events = [EngineStopped(fork=1, said="engine=vllm ended at 'decode' with exit code 9.")]
    snapshot(report(record), "page_engines.md")


@pytest.mark.parametrize("session", [1, 2])
def test_steps_that_follow_each_other_tell_through_a_drift(session):
    """A speed that wanders from cycle to cycle, more than it scatters: neighbours know more than a stretch's means."""
    rng = np.random.default_rng(0)
    order = rng.random((2000, 14, 3)).argsort(-1)
    drift = np.cumsum(rng.normal(0, 0.02, (2000, 42)), -1)
    steps = drift + rng.normal(0, 0.002, drift.shape) + 0.01 * (order.reshape(drift.shape) == session)
    found = between_steps(steps, order.reshape(drift.shape), session)
    by_session = np.take_along_axis(steps.reshape(order.shape), order.argsort(-1), -1)
    apart = against_baseline(by_session, session).mean(-1)
    assert found.mean() == pytest.approx(0.01, abs=4 * found.std() / 2000**0.5)
    assert found.std() < 0.85 * apart.std() or session == 1


def test_an_estimate_of_steps_by_hand():
    order = np.array([2, 0, 1, 1, 2, 0, 0, 1, 2])
    logs = np.array([5.0, 1.0, 2.0, 3.0, 7.0, 2.0, 1.0, 4.0, 6.0])
    # the candidate second: 7 - 3, 6 - 4; first: 5 - 1, 7 - 2
    assert between_steps(logs, order) == pytest.approx((3.0 + 4.5) / 2)
    # the control second: 2 - 1, 4 - 1; it never went first
    assert between_steps(logs, order, 1) == pytest.approx(2.0)
    assert between_steps(np.array([1.0, 9.0, 4.0]), np.array([0, 2, 1]), 1) == pytest.approx(3.0)


def test_cycles_made_at_once_are_held_against_each_baseline_by_hand():
    """One instance of two stretches, each of two slices; the order in which the sessions began plays no part."""
    one = in_slices([[[1.0, 9.0]] * 2 + [[2.0, 9.0]]] * 2)
    assert instance_estimates([one]) == pytest.approx([np.log(1.1)]), "11 seconds where the baselines take 10"
    assert instance_estimates([one], 1) == pytest.approx([0.0])
    # where the slices don't match, a cycle is held against a cycle
    unlike = in_slices([[[1.0, 9.0], [10.0], [5.0, 5.0, 2.0]]] * 2)
    assert instance_estimates([unlike]) == pytest.approx([np.log(1.2)])


def in_slices(slices):
    """An instance of cycles that were cut into slices, [stretch][session][slice] seconds."""
    one = make_instances(forks=1, per_fork=1).instances[0]
    given = {
        "slices": slices, "seconds": [[sum(session) for session in stretch] for stretch in slices],
        "order": [[2, 0, 1]] * len(slices), "tokens": [2] * len(slices),
    }  # fmt: skip
    return type(one).model_validate(one.model_dump() | given)


def test_a_machine_s_drift_moves_cycles_made_at_once_by_little():
    """Rounds in which the whole machine is three times as slow, and the candidate always 2% slower."""
    rng = np.random.default_rng(3)
    drift = np.exp(rng.choice([0, 1.1], (12, 1, 5)) + rng.normal(0, 0.001, (12, 3, 5)))
    found = in_slices((drift * np.array([1, 1, 1.02])[:, None]).tolist())
    assert instance_estimates([found]) == pytest.approx([np.log(1.02)], abs=0.001)


def test_bursts_in_some_slices_move_cycles_made_at_once_by_little():
    """A tenth of all slices takes twice as long: the weights leave a tenth of what the sums scatter by."""
    rng = np.random.default_rng(4)
    logs = rng.normal(0, 0.01, (60, 12, 3, 8)) + 0.7 * (rng.random((60, 12, 3, 8)) < 0.1)
    found = [in_slices(np.exp(one).tolist()) for one in logs]
    sums = [against_baseline(np.log(np.exp(one).sum((0, 2))), CANDIDATE) for one in logs]
    assert np.std(instance_estimates(found)) < 0.15 * np.std(sums)
    assert abs(np.mean(instance_estimates(found))) < 3 * np.std(instance_estimates(found)) / 60**0.5
    quiet = [in_slices(np.exp(one).tolist()) for one in rng.normal(0, 0.01, (60, 12, 3, 8))]
    # the two baselines' difference, over cycles of eight slices; weights cost some of it
    assert cycle_noise(quiet) == pytest.approx(0.01 / 8**0.5, rel=0.25)
    assert cycle_noise([in_slices([[[1.0]] * 3])]) == float("inf")


def test_seconds_of_a_cycle_are_told_without_what_was_late():
    """Eight slices of 10 ms; a fifth of them takes three times as long."""
    rng = np.random.default_rng(5)
    logs = np.log(0.01) + rng.normal(0, 0.002, (12, 3, 8)) + 1.1 * (rng.random((12, 3, 8)) < 0.2)
    logs[:, CANDIDATE] += np.log(1.05)
    found = in_slices(np.exp(logs).tolist())
    assert cycle_seconds(found) == pytest.approx((0.08, 0.084), rel=0.003)
    assert (calm_cycle_s([found]), calm_cycle_s([found], arm=1)) == cycle_seconds(found)
    unsliced = found.model_copy(update={"slices": ()})
    assert cycle_seconds(unsliced)[0] == pytest.approx(np.mean([s[:2] for s in found.seconds]))
    assert cycle_seconds(unsliced)[0] > 0.09


def test_the_sums_stand_beside_cycles_in_turn():
    found = make_instances(0.97)
    low, at, high = sums(found)
    logs = by_fork(
        kept_instances(found), [np.log(c / (a * b) ** 0.5) for a, b, c in (np.sum(i.seconds, 0) for i in kept_instances(found))]
    )  # fmt: skip
    assert at == pytest.approx(np.exp(np.mean([np.mean(fork) for fork in logs]))) and low < 0.97 < high
    assert summarise(found).sums == (low, at, high)
    assert sums(make_record(0.9)) is None, "nothing is weighed in whole decodes"


@pytest.mark.parametrize(("forks", "told"), [((0, 1, 2, 3, 4), True), ((1, 2), False), ((1,), True)])
def test_whole_decodes_of_two_processes_have_no_interval(forks, told):
    """Three pairs of one process have one, by their own scatter."""
    found = make_instances(0.97)
    found.samples = [s.model_copy(update={"first_s": (0.1, 0.1)}) for s in found.samples if s.fork in forks]
    alone = summarise(found).alone
    assert (alone.agrees is not None) == told == np.isfinite(alone.ratio[2]) and 0.8 < alone.ratio[1] < 1.1
    (row,) = (row for row in table(found) if row.metric == "E2E latency")
    assert np.isfinite(row.ratio[2]) == (len(forks) > 2), "three pairs are too few for signed ranks"


def test_what_an_arm_does_in_some_cycles_alone_is_told_by_all_of_the_time():
    """In a fifth of its cycles the candidate takes 20% longer: the weights call that a burst, and no verdict rests on it."""
    rng, record = np.random.default_rng(6), make_instances(1.0)
    for n, i in enumerate(record.instances):
        logs = np.log(0.006) + rng.normal(0, 0.003, (20, 3, 8))
        logs[::5, CANDIDATE] += np.log(1.2)
        sliced = in_slices(np.exp(logs).tolist())
        record.instances[n] = sliced.model_copy(update={"fork": i.fork, "iteration": i.iteration})
    assert max(map(abs, instance_estimates(record.instances))) < 0.01
    verdict = verdict_of(record)
    assert verdict.decision is Decision.INCONCLUSIVE and Why.SUMS_DIFFER in whys(record)
    low, at, high = sums(record)
    assert at == pytest.approx(1.04, abs=0.004) and low > 1.03
    assert whys(record)[Why.SUMS_DIFFER].interval[1] == pytest.approx(at / verdict.estimate, rel=1e-6)


def test_the_noise_of_a_step_is_that_of_neighbours():
    rng = np.random.default_rng(0)
    walks = [3 * n + rng.normal(0, 0.03, 400) for n in range(3)]
    assert step_noise(walks) == pytest.approx(0.03, rel=0.15)
    assert step_noise([np.array([1.0])]) == float("inf")


def test_where_every_instance_was_dropped_no_share_is_made_up():
    record = make_instances(0.9)
    record.instances = [i.model_copy(update={"dropped": (Cause.FOREIGN_LOAD,)}) for i in record.instances]
    assert part_share(record) is None and ceiling(record) is None


def test_over_machines_each_one_has_its_own_estimate(snapshot):
    from eagle_lab.measure.records import ForkLost, Place
    from eagle_lab.verdict.summary import by_machine

    found = make_instances(0.9, cluster=True)
    other = {**ENVIRONMENT, "cpu": ENVIRONMENT["cpu"] | {"name": "Another CPU"}}
    found.places = [
        Place(fork=n, machine="left" if n < 2 else "right", node=f"node{n}", environment=other if n > 1 else ENVIRONMENT)
        for n in range(5)
    ]  # fmt: skip
    found.events = [ForkLost(fork=1, machine="left", node="node1", why="node died", anew=4)]
    assert Why.OVER_MACHINES in {reason.why for reason in verdict_of(found).reasons}
    left, right = by_machine(found)
    assert (left.machine, left.verdict.forks, right.verdict.forks) == ("left", 2, 3)
    assert left.hardware != right.hardware and found.hardware == "A CPU, 2 cores and Another CPU, 2 cores"
    for one, forks in ((left, {0, 1}), (right, {2, 3, 4})):
        alone = found.model_copy(
            update={"instances": [i for i in found.instances if i.fork in forks], "places": []}
        )
        assert one.verdict.estimate == verdict_of(alone).estimate
    snapshot(report(found), "page_cluster.md")
    found.places = found.places[:2]
    assert Why.OVER_MACHINES not in {reason.why for reason in verdict_of(found).reasons}
