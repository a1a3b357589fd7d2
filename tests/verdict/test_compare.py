import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module

import pytest
from make import GOLDEN, random_pair

from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import Arm
from eagle_lab.measure import pairs
from eagle_lab.measure.lockstep import seconds_a_token
from eagle_lab.measure.records import read, write
from eagle_lab.measure.worker import WorkerDied, Workers
from eagle_lab.models.pair import load
from eagle_lab.models.prompts import Prompt
from eagle_lab.report.page import report
from eagle_lab.report.words import render
from eagle_lab.runtime.progress import progress
from eagle_lab.verdict.agreement import agree
from eagle_lab.verdict.compare import (
    ArmsDisagree,
    Interrupted,
    NothingMeasured,
    compare,
    control_forks,
    plan_forks,
)
from eagle_lab.verdict.record import ComparisonRecord, ForkDied, Resumed, TreeChosen
from eagle_lab.verdict.stats import Decision, Reason, Why
from eagle_lab.verdict.summary import CANDIDATE, factors, outlook, verdict_of

module = import_module("eagle_lab.verdict.compare")  # the package's name is the function

SMALL = {"top_k": 4, "depth": 3, "total_tokens": 16, "max_new_tokens": 8, "progress": False}
PROMPTS = [[1, 124, 306, 281], [1, 245, 323]]
KNOWN = [[1, 124, 306, 281, 69, 192, 471, 312]]  # of golden.json: the golden head knows such text


def two(pair, folder, baseline, candidate, **more):
    """Two iterations of two arms in this process."""
    usual = {"prompts": PROMPTS, "iterations": 2, "forks": 1, "results_dir": folder, **SMALL}
    return compare(pair, baseline=baseline, candidate=candidate, **usual | more)


@pytest.fixture
def broken_builder(monkeypatch):
    def build(parents):
        mask = rebuild(parents).clone()
        mask[-1, 0] = False
        return mask

    monkeypatch.setitem(MASK_BUILDERS, "broken", build)
    return "broken"


def test_a_comparison_keeps_every_sample_and_judges(tiny_pair, tmp_path):
    found = compare(
        tiny_pair, candidate="doubling", prompts=PROMPTS, iterations=7, forks=1, results_dir=tmp_path, **SMALL
    )
    record = read(found.path, ComparisonRecord)
    assert record == found.record
    assert len(record.instances) == 7 and len(record.samples) == 1 and len(record.parts) == 2
    assert record.settings.baseline == "rebuild" and record.settings.delta == 0.01
    assert record.correctness.candidate is None
    assert list(tmp_path.iterdir()) == [found.path]
    assert found.verdict.provisional
    assert verdict_of(record) == record.verdict == found.verdict
    assert found.verdict.method == "t over instances" and found.verdict.instances == 7


def test_pairs_of_decodes_are_kept_and_judged_too(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "foreign_load", lambda *_: 0.0)
    found = two(tiny_pair, tmp_path, "rebuild", "doubling", iterations=7, pairs_of="decodes")
    assert len(found.record.samples) == 7 and not found.record.instances
    assert found.verdict.method == "signed rank" and found.verdict.pairs == 7


def test_a_run_of_some_minutes_says_before_what_it_can_tell_and_ends_in_time(tiny_pair, tmp_path):
    told = []
    began = time.monotonic()
    found = compare(
        tiny_pair, candidate="doubling", prompts=PROMPTS, minutes=0.1, forks=1, results_dir=tmp_path,
        on_forecast=told.append, **SMALL,
    )  # fmt: skip
    assert told == [found.record.forecast] and told[0].seconds_each > 0
    assert 2 <= len(found.record.instances) < found.record.settings.iterations == 700
    assert time.monotonic() - began < 60
    # not short of anything: the minutes were what was asked for
    assert not {r.why for r in found.verdict.reasons} & {Why.NOT_TAKEN, Why.PAIRS_LOST}
    after = outlook(found.record)
    assert after.wanted < after.half_width and after.more_s > 0
    assert "was expected" in report(found.record) or told[0].half_width is None


@pytest.mark.parametrize(("named", "unit", "total"), [({}, "second", 6), ({"iterations": 9}, "instance", 9)])
def test_the_bar_of_minutes_alone_counts_the_time(tiny_pair, tmp_path, monkeypatch, named, unit, total):
    bars = []

    def bar_of(*given, shown):
        bars.append(progress(*given))
        return bars[-1]

    monkeypatch.setattr(module, "bar_of", bar_of)
    found = two(tiny_pair, tmp_path, "rebuild", "doubling", minutes=0.1, **{"iterations": None} | named)
    (bar,) = bars
    assert bar.unit == unit and 0 < bar.total <= total and bar.desc == f"{unit}s"
    assert 0 < bar.n <= bar.total and (not named or bar.n == len(found.record.instances))


def test_whoever_listens_sees_a_running_estimate_and_can_end_the_run(tiny_pair, tmp_path):
    seen = []

    def listen(sofar):
        seen.append(sofar.verdict)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        two(tiny_pair, tmp_path, "rebuild", "doubling", iterations=6, on_sample=listen)
    assert [v.instances for v in seen] == [1, 2, 3] and not seen[0].known and seen[1].known
    (path,) = tmp_path.glob("*.json")
    assert stopped.value.path == path and f"resume={str(path)!r}" in str(stopped.value)
    whole = two(tiny_pair, tmp_path, "rebuild", "doubling", iterations=6, resume=path)
    assert [i.iteration for i in whole.record.instances] == list(range(6))
    assert len(whole.record.samples) == 1


def test_an_identical_arm_is_never_adopted_or_reverted_lightly(tiny_pair, tmp_path):
    found = two(tiny_pair, tmp_path, "rebuild", "rebuild", iterations=5, alpha=1e-4)
    # at the usual alpha five instances can by now be enough for NO_DIFFERENCE; at this one they can't exclude anything
    assert found.verdict.decision is Decision.INCONCLUSIVE


def test_arms_that_disagree_are_not_timed(tiny_pair, tmp_path, broken_builder):
    with pytest.raises(ArmsDisagree, match="'broken' differs from the reference"):
        two(tiny_pair, tmp_path, "rebuild", broken_builder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda parents: None, "it returned None"),
        (lambda parents: rebuild(parents).float(), "it returned dtype float32; it must be bool"),
        (lambda parents: parents[99], "it raised IndexError in line"),
    ],
)
def test_a_builder_that_gives_no_mask_is_one_sentence(tiny_pair, tmp_path, monkeypatch, build, words):
    monkeypatch.setitem(MASK_BUILDERS, "mine", build)
    with pytest.raises(ArmsDisagree, match=words):
        two(tiny_pair, tmp_path, "rebuild", "mine")


def test_different_tokens_without_a_tie_stop_the_run(tiny_pair, tmp_path, monkeypatch):
    real = module.run_arm

    def wrong(pair, plan, arm, iteration):
        done = real(pair, plan, arm, iteration)
        if plan.arms[arm].strategy.mask == "doubling":
            done.tokens[2] = (done.tokens[2] + 1) % 500
        return done

    monkeypatch.setattr(module, "run_arm", wrong)
    with pytest.raises(ArmsDisagree, match="decode different tokens"):
        two(tiny_pair, tmp_path, "rebuild", "doubling")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidate": "incremenal"}, "did you mean 'incremental'"),
        ({"candidate": "cuda"}, "needs a CUDA"),
        ({"baseline": "runtime=cuda_graph,mask=doubling"}, "needs a CUDA"),
        ({"iterations": 0}, "iterations is 0"),
        ({"total_tokens": 999}, "only 52 candidates"),
        ({"prompts": [[]]}, "prompt is empty"),
        ({"prompts": [[1] * 1020]}, "context of 1024"),
        ({"prompts": [[100000]]}, "not a token id"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"looks": (2, 3)}, "last look"),
        ({"looks": (2, "x")}, "looks.1 is 'x'"),
        ({"prompts": 5}, "prompts is 5"),
        ({"results_dir": 5}, "results_dir is 5"),
    ],
)
def test_bad_settings_are_one_sentence_before_any_work(tiny_pair, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(module, "run_arm", lambda *_, **__: pytest.fail("decoded before checking"))
    settings = {**SMALL, "prompts": PROMPTS, "iterations": 4, "results_dir": tmp_path, **options}
    with pytest.raises(ValueError, match=words):
        compare(tiny_pair, **settings)
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_cannot_be_written_is_one_sentence(tiny_pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        compare(tiny_pair, prompts=PROMPTS, iterations=2, results_dir=tmp_path / "file", **SMALL)


@pytest.mark.parametrize("pairs_of", ["cycles", "decodes"])
@pytest.mark.parametrize(("iterations", "forks"), [(20, 5), (7, 3), (5, 5), (4, 1), (100, 20)])
def test_the_iterations_are_dealt_out_whole(iterations, forks, pairs_of):
    work = plan_forks(iterations, forks, pairs_of)
    main = [fork for fork in work if not fork.control]
    assert sorted(i for fork in main for i in fork.iterations) == list(range(iterations))
    assert max(len(f.iterations) for f in main) - min(len(f.iterations) for f in main) <= 1
    assert sum(fork.control for fork in work) == control_forks(forks, pairs_of)
    assert (sum(fork.wholes for fork in work) in (1, 2)) == (pairs_of == "cycles")
    assert len({fork.number for fork in work}) == len(work)


def test_fresh_processes_a_control_and_one_that_dies(tiny_pair, tmp_path, monkeypatch):
    class Fragile(Workers):
        def messages(self, fork):
            for message in super().messages(fork):
                yield message
                if "process" in message and fork.number == 1:
                    os.kill(message["process"], signal.SIGKILL)

    options = {"iterations": 8, "forks": 2, "pairs_of": "decodes"}
    monkeypatch.setattr(module, "Workers", Fragile)
    found = two(tiny_pair, tmp_path, "rebuild", "doubling", **options)
    taken = {(s.fork, s.control) for s in found.record.samples}
    assert taken == {(0, False), (2, True)}
    (died,) = found.record.events
    assert isinstance(died, ForkDied) and (died.fork, died.exit_code) == (1, -9)
    assert Reason(why=Why.NOT_TAKEN, count=4, of=8) in found.verdict.reasons
    monkeypatch.setattr(module, "Workers", Workers)
    whole = two(tiny_pair, tmp_path, "rebuild", "doubling", resume=found.path, **options)
    assert len([s for s in whole.record.samples if not s.control]) == 8
    assert {s.fork for s in whole.record.samples} == {0, 1, 2}
    with pytest.raises(ValueError, match="seed differ"):
        two(tiny_pair, tmp_path, "rebuild", "doubling", seed=5, resume=found.path, **options)


def test_records_of_other_machines_or_that_are_none_are_not_resumed(tiny_pair, tmp_path):
    options = {"candidate": "doubling", "prompts": PROMPTS, "iterations": 2, "forks": 1, **SMALL}
    found = compare(tiny_pair, results_dir=tmp_path, **options)

    def moved(name, cpu=None, **environment):
        record = read(found.path, ComparisonRecord)
        here = record.environment
        update = {"cpu": here.cpu.model_copy(update=cpu or {}), **environment}
        record.environment = here.model_copy(update=update)
        write(record, tmp_path / name)
        return {**options, "results_dir": tmp_path, "resume": tmp_path / name}

    with pytest.raises(ValueError, match="can't be resumed here: it was begun with .*999 cores"):
        compare(tiny_pair, **moved("there.json", cpu={"usable": 999.0}))
    cut = json.loads(found.path.read_text()) | {"samples": [{}]}
    (tmp_path / "cut.json").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match="is no whole comparison record"):
        compare(tiny_pair, results_dir=tmp_path, resume=tmp_path / "cut.json", **options)
    with pytest.raises(ValueError, match="own_prompts differ"):
        compare(
            tiny_pair, results_dir=tmp_path, resume=found.path, **{**options, "prompts": [[1, 2], [3, 4]]}
        )
    again = compare(tiny_pair, **moved("older.json", commit="0" * 40))
    event = again.record.events[-1]
    assert isinstance(event, Resumed) and event.samples == 2 and event.commit != "0" * 40
    assert len(again.record.instances) == 2


def test_a_comparison_in_which_no_process_can_begin_is_an_error_at_the_first(
    tiny_pair, tmp_path, monkeypatch
):
    begun = []

    class Lost(Workers):
        def messages(self, fork):
            begun.append(fork.number)
            yield {"process": 1}
            raise WorkerDied(fork.number, 1, "FileNotFoundError: the head", begun=False)

    monkeypatch.setattr(module, "Workers", Lost)
    with pytest.raises(WorkerDied, match="fork 0 could not begin: .*FileNotFoundError: the head"):
        compare(tiny_pair, prompts=PROMPTS, iterations=8, forks=4, results_dir=tmp_path, **SMALL)
    assert begun == [0]


def test_a_comparison_whose_every_process_is_killed_measured_nothing(tiny_pair, tmp_path, monkeypatch):
    class Killed(Workers):
        def messages(self, fork):
            yield {"process": 1}
            raise WorkerDied(fork.number, -9, "", begun=False)

    monkeypatch.setattr(module, "Workers", Killed)
    with pytest.raises(NothingMeasured, match="no pair was taken: fork 1 ended with exit code -9"):
        compare(tiny_pair, prompts=PROMPTS, iterations=4, forks=2, results_dir=tmp_path, **SMALL)
    (path,) = tmp_path.glob("*.json")
    record = read(path, ComparisonRecord)
    assert len(record.events) == 2 and record.finished is None and record.verdict is None


def test_the_records_command_gives_the_callers_own_prompts(tiny_pair, tmp_path, monkeypatch):
    import eagle_lab

    found = compare(tiny_pair, prompts=PROMPTS, iterations=2, forks=1, results_dir=tmp_path, **SMALL)
    python, _, code = shlex.split(found.record.command)
    assert python == "python"
    again = []
    monkeypatch.setattr(module, "RESULTS", tmp_path / "again")
    monkeypatch.setattr(eagle_lab, "compare", lambda *a, **k: again.append(compare(*a, **k)))
    exec(code, {})
    assert again[0].record.settings == found.record.settings


def test_a_look_ends_a_run_of_one_process(tiny_pair, tmp_path, monkeypatch):
    real = module.fork_messages

    def clear(pair, plan, fork, *rest):
        for message in real(pair, plan, fork, *rest):
            if "instance" in message:
                sample = message["instance"]
                times = ((1.0, 1.0 + 0.001 * (sample.iteration % 2), 2.0 + 0.001 * sample.iteration),)
                message["instance"] = sample.model_copy(
                    update={"seconds": times, "slices": (), "order": ((0, 1, 2),), "dropped": ()}
                )
            yield message

    monkeypatch.setattr(module, "fork_messages", clear)
    arms = ("rebuild", "doubling,attention=tree")
    found = two(tiny_pair, tmp_path, *arms, iterations=30, looks=(10, 20, 30))
    assert found.record.stopped_early == len(found.record.instances) == 10
    assert found.verdict.decision is Decision.REVERT and len(found.record.parts) == 2
    whole = two(tiny_pair, tmp_path, *arms, iterations=12)
    assert len(whole.record.instances) == 12 and whole.record.stopped_early is None


def test_a_pair_that_no_fresh_process_can_load_is_refused_before_any_work(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_arm", lambda *_, **__: pytest.fail("decoded before checking"))
    options = {"prompts": PROMPTS, "iterations": 8, "forks": 2, "results_dir": tmp_path, **SMALL}
    with pytest.raises(ValueError, match="put together by hand.*forks=1"):
        compare(replace(tiny_pair, origin={}), **options)
    with pytest.raises(ValueError, match="torchrun.*forks=1"):
        compare(replace(tiny_pair, origin={**tiny_pair.origin, "tp_plan": "auto"}), **options)
    with pytest.raises(ValueError, match="no memory for the pair .* GiB free and it needs .* GiB; .*forks=1"):
        compare(replace(tiny_pair, needed_bytes=2**50), **options)
    assert not list(tmp_path.iterdir())


def test_fresh_processes_load_the_pair_as_it_was_loaded(tmp_path):
    pair = load("shape:tiny", device="cpu", verbose=False)  # its weights are random: no folder to name
    found = two(pair, tmp_path, "rebuild", "doubling", forks=2)
    assert not found.record.events and len(found.record.instances) == 2
    golden = GOLDEN / "target", GOLDEN / "draft_official"
    spread = load(*golden, device="cpu", device_map={"": "cpu"}, verbose=False)
    found = compare(spread, prompts=PROMPTS, iterations=2, forks=2, results_dir=tmp_path, **SMALL)
    assert not found.record.events and len(found.record.instances) == 2
    assert found.record.settings.load == {"device_map": "{'': 'cpu'}"}


SCRIPT = """
import sys
from eagle_lab import load
from eagle_lab.verdict.compare import compare
pair = load(sys.argv[1] + "/target", sys.argv[1] + "/draft_official", device="cpu")
compare(pair, candidate="doubling", prompts=[[1, 124, 306, 281], [1, 245, 323]], iterations=3000, forks=1, top_k=4, depth=3,
        total_tokens=16, max_new_tokens=8, progress=False, results_dir=sys.argv[2])
"""


def test_a_killed_comparison_leaves_its_pairs(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(GOLDEN), str(tmp_path)])
    try:
        deadline = time.time() + 120
        while time.time() < deadline:
            files = list(tmp_path.glob("*.json"))
            if files and len(read(files[0], ComparisonRecord).instances) >= 3:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    record = read(files[0], ComparisonRecord)
    assert len(record.instances) >= 3
    assert record.finished is None and record.verdict is None
    verdict = verdict_of(record)
    assert verdict.decision is Decision.INCONCLUSIVE
    assert {reason.of for reason in verdict.reasons if reason.why is Why.NOT_TAKEN} == {3000}


def test_every_decode_of_a_comparison_has_the_attention_that_was_asked_for(tmp_path):
    """A target that caps its scores can't do with sdpa: neither the arms nor the target alone may fall back to it."""
    pair = random_pair("gemma2", attn_logit_softcapping=0.5, query_pre_attn_scalar=8, sliding_window=64)
    prompts = [[5, 9, 7, 31], [44, 12, 8]]
    found = two(pair, tmp_path, "attention=eager", "doubling,attention=eager", prompts=prompts)
    assert len(found.record.instances) == 2 and found.record.correctness.baseline is None
    assert agree(pair, [5, 9], [3], [4], Decoding.of(8, "attention=eager")) is not None
    with pytest.raises(ValueError, match="use the strategy attention=eager"):
        compare(pair, prompts=prompts, iterations=2, forks=1, results_dir=tmp_path, **SMALL)


def test_an_attention_that_drops_what_the_target_asks_for_is_refused_before_any_work(tmp_path):
    pair = random_pair("gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    for arms in (("attention=eager", "attention=tree"), ("attention=tree", "attention=eager")):
        with pytest.raises(ValueError, match="asks its attention for s_aux, which attention=tree would drop"):
            two(pair, tmp_path, *arms, prompts=[[1, 2, 3]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [("rebuild", "total_tokens=1,top_k=1,depth=1"), ("plain", "doubling"), ("doubling", "plain")],
)
def test_arms_of_unlike_cycles_step_in_turn_and_are_told_by_two_factors(
    tiny_pair, tmp_path, baseline, candidate
):
    done = two(tiny_pair, tmp_path, baseline, candidate, prompts=KNOWN, max_new_tokens=16)
    record = read(done.path, ComparisonRecord)
    assert record.settings.rule == "same text" and record.settings.pairs_of == "cycles"
    assert not any(i.difference for i in record.instances)
    found = factors(record)
    assert (found is None) == all(i.cycles(0) == i.cycles(CANDIDATE) for i in record.instances)
    plain = [arm.keys.get("plain", False) for arm in record.arms]
    if any(plain):  # plain decoding commits one token a cycle
        row = found.acceptance_length
        assert (row.baseline, row.candidate)[plain.index(True)][1] == 1.0
        assert (found.cycles[1] < 1) == plain[0]


def test_a_head_beside_another_is_compared_on_the_same_target(tiny_pair, tmp_path):
    from eagle_lab.models.checkpoints import save_draft

    save_draft(tiny_pair.head, tmp_path / "same", "specforge")
    done = two(tiny_pair, tmp_path / "records", "rebuild", f"draft={tmp_path / 'same'}")
    record = done.record
    assert record.arms[1].keys["draft"] == str(tmp_path / "same") != record.arms[0].keys["draft"]
    # the same weights in another dialect need the same cycles
    assert all(i.cycles(0) == i.cycles(CANDIDATE) for i in record.instances) and factors(record) is None


def test_another_temperature_is_told_by_the_token(tiny_pair, tmp_path):
    done = two(tiny_pair, tmp_path, "rebuild", "temperature=3")
    assert done.record.settings.rule == "time per token"
    assert any(i.difference for i in done.record.instances)  # told, and no error


def test_the_candidate_inherits_and_the_record_s_command_says_the_same(tiny_pair, tmp_path):
    done = two(tiny_pair, tmp_path, "doubling,attention=tree", "incremental")
    assert done.record.settings.candidate == "incremental"
    assert done.record.arms[1].keys["attention"] == "tree"


def test_a_dry_run_says_what_would_be_done(tiny_pair, snapshot, monkeypatch):
    monkeypatch.setattr(module, "run_arm", lambda *_, **__: pytest.fail("decoded"))
    found = module.planned(
        tiny_pair, "plain", "doubling,temperature=1", prompts=PROMPTS, iterations=6, minutes=None, forks=2, max_new_tokens=8,
        shape=TreeShape(4, 3, 16), sampling=Sampling(), pairs_of=None, seed=0, delta=0.01, alpha=0.05, looks=(),
    )  # fmt: skip
    snapshot(render("planned.j2", s=found.settings, arms=found.told), "planned.txt")


def test_a_tree_is_chosen_beyond_the_compared_prompts(tiny_pair, tmp_path, monkeypatch):
    cost = {3: 0.3, 7: 0.2, 15: 0.1, 31: 0.4, 63: float("nan")}
    asked = []

    def timed(pair, arm, shapes, prompts, *_):
        asked.append((arm, [p.ids for p in prompts]))
        return [cost[shape.total_tokens] for shape in shapes]

    monkeypatch.setattr(module, "seconds_a_token", timed)
    prompts = [*PROMPTS, [1, 5, 6], [1, 7, 8], [1, 9], [1, 10]]
    found = two(tiny_pair, tmp_path, "doubling", "total_tokens=auto", prompts=prompts)
    assert found.record.settings.candidate == "top_k=4,depth=4,total_tokens=15"
    assert [(arm.strategy.mask, ids) for arm, ids in asked] == [
        ("doubling", [tuple(ids) for ids in prompts[2:5]])
    ]
    (event,) = read(found.path, ComparisonRecord).events
    assert event.arm == "candidate" and event.chosen.total_tokens == 15 and len(event.tried) == 5
    assert event.tried[-1].seconds_a_token is None
    words = render("event.j2", e=event, record=found.record)
    assert (
        "15 nodes was chosen on 3 prompts" in words
        and "31 nodes 400" in words
        and "63 nodes nothing" in words
    )
    begun = {"instances": found.record.instances[:1], "finished": None, "verdict": None}
    write(found.record.model_copy(update=begun), found.path)
    cost[15] = 1.0
    resumed = two(tiny_pair, tmp_path, "doubling", "total_tokens=auto", prompts=prompts, resume=found.path)
    assert resumed.record.settings == found.record.settings and len(asked) == 1, "its tree is kept"
    assert [type(e) for e in resumed.record.events] == [TreeChosen, Resumed]
    cost[15] = 0.1
    again = two(
        tiny_pair, tmp_path, "total_tokens=auto", "incremental"
    )  # no prompt is beyond, and the candidate inherits
    assert again.record.settings.baseline == "top_k=4,depth=4,total_tokens=15" and len(asked[-1][1]) == 2
    assert again.record.settings.candidate == "incremental"


def test_the_tree_that_is_fastest_to_decode_is_measured(tiny_pair, tmp_path):
    found = two(tiny_pair, tmp_path, "plain", "doubling,total_tokens=auto", max_new_tokens=16)
    (event,) = found.record.events
    assert all(tree.seconds_a_token > 0 for tree in event.tried)
    assert f"total_tokens={event.chosen.total_tokens}" in found.record.settings.candidate
    shapes = [TREES[3], TREES[7]]
    told = seconds_a_token(tiny_pair, Arm(plain=False), shapes, [Prompt("p", "own", "", (1, 5, 6))], 1, 0)
    assert all(map(math.isnan, told))  # one token is the first cycle's


@pytest.mark.parametrize(
    ("candidate", "said"),
    [("plain,total_tokens=auto", "plain decoding drafts nothing"), ("total_tokens=auto,code=HEAD", "measured in this process")],
)  # fmt: skip
def test_a_tree_that_can_not_be_chosen(tiny_pair, tmp_path, candidate, said):
    with pytest.raises(ValueError, match=said):
        two(tiny_pair, tmp_path, "rebuild", candidate)
    assert not list(tmp_path.iterdir())


def test_a_pair_without_a_tokenizer_takes_random_ids_in_place_of_a_selection(tiny_pair):
    assert tiny_pair.tokenizer is None
    found = module.planned(
        tiny_pair, "rebuild", "doubling", prompts="train", iterations=3, minutes=None, forks=1, max_new_tokens=8,
        shape=TreeShape(2, 2, 4), sampling=Sampling(), pairs_of=None, delta=0.01, alpha=0.05, seed=0, looks=(),
    )  # fmt: skip
    assert found.settings.prompts == ("random-0", "random-1", "random-2")
    assert found.settings.own_prompts.keys() == set(found.settings.prompts), "the record can be made again"
    assert len(set(found.settings.own_prompts.values())) == 3
