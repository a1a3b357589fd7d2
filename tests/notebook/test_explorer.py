"""The explorer without a browser: runs, stops, checks, compares; a reader's mistakes come back as sentences."""

from __future__ import annotations

import csv
import re
import shutil
import time

import pytest
import torch
from make import GOLDEN
from traitlets import TraitError

from eagle_lab.decode import strategy
from eagle_lab.decode.generate import generate
from eagle_lab.decode.masks import MASK_BUILDERS, mask_builder, rebuild
from eagle_lab.decode.strategy import check, parse, unavailable
from eagle_lab.measure.records import read
from eagle_lab.notebook import controls, explorer, tried
from eagle_lab.notebook.explorer import Explorer

PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]


@pytest.fixture
def own_builders():
    """Whatever a test adds is taken away again."""
    before = dict(MASK_BUILDERS)
    yield
    MASK_BUILDERS.clear()
    MASK_BUILDERS.update(before)


@pytest.fixture
def lab(tiny_pair, tmp_path, own_builders):
    sizes = {"total_tokens": 12, "depth": 3, "top_k": 4, "max_new_tokens": 16}
    return Explorer(tiny_pair, PROMPT, iterations=2, trees=[[0, 0, 1]], results_dir=tmp_path, **sizes)


def until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "that did not come"
        time.sleep(0.002)


def text(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_a_run_shows_the_text_of_generate_coloured_by_how_it_came(lab, tiny_pair):
    run = lab.run(wait=True)
    done = generate(tiny_pair, PROMPT, 16, total_tokens=12, depth=3, top_k=4)
    assert [token for token, _ in run.tokens] == done.tokens
    words = lab.controls.story.value.partition("eagle-story")[2]
    assert text("<" + words).split() == [f"#{token}" for token in done.tokens]
    depths = [depth for _, depth in run.tokens]
    expected = [d for cycle in done.cycles for d in range(len(cycle.committed))] + [0]
    assert depths == expected[:16] and max(depths) > 0
    assert run.acceptance_length == done.acceptance_length
    assert f"{run.acceptance_length:.2f} τ" in text(lab.controls.meter.value)


def test_the_cycle_view_has_the_chart_its_link_and_the_stage_times(lab):
    run = lab.run(wait=True)
    chart, script, bars = lab.controls.cycle_view.outputs
    kind = "application/vnd.plotly.v1+json"
    best = max(len(c.committed) for c in run.cycles)
    assert f"{best - 1} of 12 drafted tokens accepted" in chart["data"][kind]["layout"]["title"]["text"]
    assert "plotly_hover" in script["data"]["text/html"]
    assert any("tree_mask" in name for name in bars["data"][kind]["data"][0]["y"])
    lab.controls.cycle.value = 2
    assert "Cycle 2:" in lab.controls.cycle_view.outputs[0]["data"][kind]["layout"]["title"]["text"]


def test_stop_ends_between_two_cycles(lab):
    lab.controls.max_new_tokens.value = 400
    lab.run()
    c = lab.controls
    until(lambda: "decoding" in c.run.status.value)
    assert c.run.start.disabled and not c.run.stop.disabled
    assert c.compare.stop.disabled and c.check.start.disabled  # each work has a Stop of its own
    lab.stop()
    assert "stopping" in c.run.status.value or not lab.work.running
    assert lab.work.wait(30)
    assert lab.last.stopped and 0 < len(lab.last.tokens) < 400
    assert not c.run.start.disabled and c.run.stop.disabled
    assert len(lab.last.stages) == len(lab.last.cycles)
    assert "stopped" in c.meter.value and "Stopped" in c.run.status.value


@pytest.mark.parametrize("cycles", [0, 2])
def test_the_kernels_own_interrupt_ends_a_run_as_stop_does(lab, monkeypatch, cycles):
    real = explorer.cycles

    def interrupted(*args, **options):
        for number, cycle in enumerate(real(*args, **options)):
            if number == cycles:
                raise KeyboardInterrupt
            yield cycle

    monkeypatch.setattr(explorer, "cycles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run(wait=True)
    assert not lab.controls.run.start.disabled
    if cycles:
        assert lab.last.stopped and len(lab.last.cycles) == len(lab.last.stages) == cycles
        assert "stopped" in lab.controls.meter.value
    else:
        assert lab.last is None


def test_a_long_prompt_is_said_to_be_read_before_the_first_token(lab, monkeypatch):
    said = []
    lab.controls.run.status.observe(lambda change: said.append(text(change["new"]).strip()), "value")
    lab.run(wait=True)
    assert said == ["starting…", "preparing…", "reading the prompt, 8 tokens…", "decoding…", ""]


def test_plain_decoding_is_an_arm_that_decodes_the_same_text(lab):
    first = lab.run(wait=True)
    lab.controls.arm.value = "plain"
    plain = lab.run(wait=True)
    assert plain.tokens and [t for t, _ in plain.tokens] == [t for t, _ in first.tokens]
    assert plain.acceptance_length == 1.0
    assert lab.controls.cycle_view not in lab.controls.result.children
    rows = [entry.row for entry in lab.entries]
    assert [row.arm for row in rows] == ["mask=rebuild", "plain"]
    assert rows[1].total_tokens is None and rows[1].tau == 1.0 and rows[0].tau > 1
    with pytest.raises(ValueError, match="no mask to check"):
        lab.check(wait=True)


def stale(lab):
    said = "not what the controls say" in lab.controls.about.value
    assert said == ("eagle-stale" in lab.controls.result._dom_classes)
    return said


def hidden(lab):
    return not lab.controls.findings.children


def test_a_result_says_what_it_is_of_and_dims_as_soon_as_the_controls_say_something_else(lab):
    c = lab.controls
    lab.run(wait=True)
    assert "rebuild 12 nodes, depth 3, top_k 4 · greedy · 16 tokens · cpu" in text(c.about.value)
    assert not stale(lab)
    changes = {
        "arm": "doubling", "more": "attention=eager", "total_tokens": 11, "depth": 2, "top_k": 5, "temperature": 0.5,
        "max_new_tokens": 9, "prompt": "1 2",
    }  # fmt: skip
    for name, value in changes.items():
        before = getattr(c, name).value
        getattr(c, name).value = value
        assert stale(lab), name
        getattr(c, name).value = before
        assert not stale(lab), name
    c.baseline.value = "doubling"
    assert not stale(lab)  # a run isn't of the baseline
    c.more.value = "no such arm"
    assert stale(lab)


def test_a_row_brings_its_result_and_its_controls_back(lab):
    c = lab.controls
    first = lab.run(wait=True)
    c.total_tokens.value, c.arm.value = 7, "doubling"
    second = lab.run(wait=True)
    assert len(c.tried.options) == 2 and c.tried.index == 1 and lab.shown.run is second
    assert "doubling" in c.tried.options[1] and "7/3/4" in c.tried.options[1]
    c.tried.index = 0
    assert lab.shown.run is first and c.total_tokens.value == 12 and c.arm.value == "rebuild"
    assert not stale(lab)
    assert "of 12 drafted" in str(c.cycle_view.outputs[0]["data"])
    c.total_tokens.value = 7
    assert stale(lab)
    lab.bring_back(1)  # from a cell
    assert c.tried.index == 1 and lab.shown.run is second


def test_what_was_tried_is_saved_as_a_record_and_as_csv(lab, tmp_path):
    lab.run(wait=True)
    lab.controls.arm.value = "plain"
    lab.run(wait=True)
    record = read(lab.save(), tried.ConsoleRecord)
    assert record.tried == [entry.row for entry in lab.entries] and record.environment.cpu.cores
    rows = list(csv.DictReader(lab.save(".csv").open()))
    assert [row["arm"] for row in rows] == ["mask=rebuild", "plain"]
    assert float(rows[0]["tau"]) == record.tried[0].tau and rows[1]["depth"] == ""
    lab.results_dir = "/proc/no"
    lab.controls.save.click()
    assert "cannot be written" in lab.controls.saved.value


def test_another_head_is_an_arm_of_this_process(lab, tmp_path):
    head = shutil.copytree(GOLDEN / "draft_official", tmp_path / "head")
    first = lab.run(wait=True)
    said = []
    lab.controls.run.status.observe(lambda change: said.append(text(change["new"]).strip()), "value")
    lab.controls.more.value = f"draft={head}"
    other = lab.run(wait=True)
    assert said[:2] == ["starting…", f"loading the head {head}…"]
    assert lab.run(wait=True) and not any("loading" in words for words in said[2:])  # it is there now
    assert [t for t, _ in other.tokens] == [t for t, _ in first.tokens]
    assert f"head {head}" in lab.controls.about.value
    lab.controls.arm.value, lab.controls.more.value = "rebuild", "python=/usr/bin/python3"
    with pytest.raises(ValueError, match="needs a process of its own"):
        lab.run(wait=True)


def test_a_new_builder_appears_in_the_controls_and_decodes(lab):
    @mask_builder("mine")
    def mine(parents):
        return rebuild(parents)

    lab.refresh()
    for choice in (lab.controls.arm, lab.controls.baseline):
        assert "mine" in dict(choice.options).values()
    first = lab.run(wait=True)
    assert "eagle-stale" not in lab.controls.result._dom_classes
    lab.controls.arm.value = "mine"
    assert lab.run(wait=True).tokens == first.tokens
    assert "equals the reference" in lab.controls.finding.value

    @mask_builder("mine")
    def other(parents):
        return rebuild(parents).clone()

    lab.refresh()  # what was shown is of the builder that is gone
    assert stale(lab) and hidden(lab)


def test_a_wrong_builder_never_decodes_and_its_smallest_tree_is_drawn(lab):
    @mask_builder("mine")
    def mine(parents):
        return torch.ones(len(parents) + 1, len(parents) + 1, dtype=torch.bool)

    lab.refresh()
    lab.controls.arm.value = "mine"
    lab.run()
    assert lab.work.wait(30) and lab.last is None
    assert "mask is not the reference's, see below" in lab.controls.run.status.value
    assert "lets node 0 attend to node 1" in text(lab.controls.finding.value)
    assert len(lab.controls.finding_view.outputs) == 1
    with pytest.raises(ValueError, match="lets node 0 attend to node 1"):
        lab.compare(wait=True)
    assert lab.comparison is None

    # as a baseline too it is told below; once no control names it, it stands no longer before the result
    lab.controls.arm.value = "rebuild"
    assert hidden(lab)
    lab.controls.baseline.value = "mine"
    assert not hidden(lab)


def test_a_builder_that_raises_is_told_once(lab):
    @mask_builder("mine")
    def mine(parents):
        return parents[99]

    lab.refresh()
    lab.controls.arm.value = "mine"
    with pytest.raises(ValueError, match="^'mine' raised IndexError in line ") as error:
        lab.run(wait=True)
    assert str(error.value).count("raised") == 1
    assert "tree" not in str(error.value)  # it returned nothing, on any tree
    assert not lab.controls.finding_view.outputs


def test_a_slow_check_says_how_far_it_is_and_can_be_stopped(lab):
    @mask_builder("mine")
    def mine(parents):
        time.sleep(0.02)
        return rebuild(parents)

    lab.check("mine")
    c = lab.controls
    until(lambda: re.search("checking mine, [1-9][0-9]* trees so far", text(c.check.status.value)))
    assert c.run.start.disabled and not c.finding.value
    lab.stop()
    assert lab.work.wait(10)
    assert "Stopped" in c.check.status.value and not c.run.start.disabled


def test_a_builder_that_fails_later_is_told_by_its_own_line(lab):
    calls = iter(range(10**6))

    @mask_builder("mine")
    def mine(parents):
        if next(calls) > 450:
            raise KeyError("late")
        return rebuild(parents)

    lab.refresh()
    lab.controls.arm.value, lab.controls.max_new_tokens.value = "mine", 400
    lab.run()
    assert lab.work.wait(60)
    told = text(lab.controls.run.status.value)
    assert "raised KeyError in line" in told and "Traceback" not in told
    assert not lab.controls.run.start.disabled


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "write the prompt as token ids"),
        ({"prompt": "1 9999"}, "not a token id from 0 to 511"),
        ({"total_tokens": 255, "depth": 1}, "give only"),
    ],
)
def test_a_bad_setting_is_told_in_a_sentence(lab, change, words):
    for name, value in change.items():
        getattr(lab.controls, name).value = value
    lab.run()
    lab.work.wait(30)
    assert words in text(lab.controls.run.status.value).lower() and not lab.controls.check.status.value
    assert not lab.controls.run.start.disabled
    with pytest.raises(ValueError, match=words):
        lab.run(wait=True)


def test_compare_shows_a_running_estimate_and_the_verdict_of_its_record(lab):
    said, cards = [], []
    lab.controls.compare.status.observe(lambda change: said.append(text(change["new"]).strip()), "value")
    lab.controls.verdict.observe(lambda change: cards.append(text(change["new"]).strip()), "value")
    lab.compare("doubling", wait=True)
    found = lab.comparison
    assert found.path.exists() and found.record.settings.candidate == "mask=doubling"
    assert found.verdict.instances == 2 and found.record.settings.delta == 0.01
    assert said[:2] == ["starting…", "checking that both give the same text…"] and said[-1] == ""
    assert any(re.fullmatch(r"\d+ pairs of cycles, prompt 2 of 2, about \d+ s left…", line) for line in said)
    assert "So far, no verdict yet" in cards[0] and "So far" not in cards[-1]
    assert "mask=doubling against mask=rebuild" in cards[-1]
    assert len(lab.controls.verdict_view.outputs) == 1
    assert "doubling 12 nodes, depth 3, top_k 4 against rebuild 12 nodes" in text(lab.controls.about.value)
    row = lab.entries[-1].row
    assert (row.verdict, row.ratio, row.record) == (
        found.verdict.decision,
        found.verdict.estimate,
        found.path.name,
    )
    lab.controls.prompt.value = "3 4"  # it has prompts of its own
    assert not stale(lab)
    lab.controls.baseline.value = "doubling"
    assert stale(lab) and "Both arms are the same" in lab.controls.rule.value


@pytest.mark.parametrize(
    ("baseline", "more", "words"),
    [("plain", "", "against plain · greedy"), ("rebuild", "total_tokens=5,depth=2", "against rebuild 5 nodes, depth 2, top_k 4")],
)  # fmt: skip
def test_arms_of_other_kinds_are_compared_in_this_process(lab, baseline, more, words):
    lab.controls.baseline.value, lab.controls.more_baseline.value = baseline, more
    found = lab.compare(wait=True, iterations=2, max_new_tokens=40)
    assert found.verdict.instances == 2
    assert words in text(lab.controls.about.value).replace("\n", "")
    told = [arm.keys for arm in found.record.arms]
    assert told[1]["total_tokens"] == 12 and told[0] != told[1]
    assert lab.entries[-1].row.against == (
        more.replace("depth=2", "") and "depth=2,total_tokens=5" or "plain"
    )


def test_a_stopped_comparison_keeps_what_it_measured_and_has_no_verdict(lab):
    c = lab.controls
    c.iterations.value, c.max_new_tokens.value = 40, 60
    lab.prompts = [[*PROMPT, n] for n in range(40)]
    lab.compare("doubling")
    until(lambda: len(lab.shown.comparison.record.instances) > 1 if lab.shown else False, 120)
    assert not c.compare.stop.disabled and c.run.stop.disabled
    c.compare.stop.click()
    assert "stopping" in c.compare.status.value or not lab.work.running
    assert lab.work.wait(30)
    taken = len(lab.comparison.record.instances)
    assert re.search(
        rf"Stopped. {taken} of 40 prompts are in .*; there is no verdict.", text(c.compare.status.value)
    )
    assert lab.entries[-1].row.stopped and lab.entries[-1].row.verdict is None
    assert "So far, no verdict yet" in c.verdict.value and lab.comparison.record.finished is None


def test_an_unknown_arm_leaves_the_buttons_as_they_were(lab):
    with pytest.raises(TraitError, match="not found"):
        lab.check("doublin")
    assert not lab.controls.run.start.disabled and not lab.controls.check.status.value
    assert lab.run(wait=True)


def test_an_unknown_strategy_is_refused_at_once(tiny_pair):
    with pytest.raises(ValueError, match="did you mean 'doubling'"):
        Explorer(tiny_pair, PROMPT, strategy="doublin")


def test_every_strategy_in_the_controls_can_be_run(own_builders):
    tried = []

    @mask_builder("compile")  # a name that another axis has too
    def mine(parents):
        tried.append(parents)
        raise KeyError("never called for a list")

    listed = controls.strategies("cpu")
    assert not tried
    assert listed[0] == "rebuild" and len(set(listed)) == len(listed)
    assert all(check(name, "cpu") for name in listed)
    assert {"doubling", "concat", "tree", "mask=compile"} <= set(listed)
    if not unavailable("runtime", "compile", "cpu"):
        assert "doubling,runtime=compile" in listed
    assert not any("cuda" in name or "early" in name for name in listed)


def test_where_everything_is_available_the_controls_have_every_choice_of_every_axis(monkeypatch):
    for module, name in ((controls, "_missing"), (strategy, "unavailable")):
        monkeypatch.setattr(module, name, lambda axis, name, device: None)
    listed = controls.strategies("cuda")
    assert len(set(listed)) == len(listed)
    plans = [check(name, "cuda") for name in listed]
    for axis, names in strategy.AXES.items():
        assert {getattr(plan, axis) for plan in plans} == set(names)
    assert parse("doubling,attention=tree_fused,product=early,runtime=compile+cuda_graph") in plans
    assert plans[-2:] == [parse("product=transposed"), parse("head=fp8")]
