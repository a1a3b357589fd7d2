"""The explorer without a browser: runs, stops, checks, compares; a reader's mistakes come back as sentences."""

from __future__ import annotations

import re
import time

import pytest
import torch

from eagle_lab.decode import strategy
from eagle_lab.decode.generate import generate
from eagle_lab.decode.masks import MASK_BUILDERS, mask_builder, rebuild
from eagle_lab.decode.strategy import check, parse, unavailable
from eagle_lab.notebook import controls, live
from eagle_lab.notebook.explorer import Explorer
from eagle_lab.verdict.stats import Decision

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
    return Explorer(tiny_pair, PROMPT, pairs=2, trees=[[0, 0, 1]], results_dir=tmp_path, **sizes)


def text(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_a_run_shows_the_text_of_generate_coloured_by_how_it_came(lab, tiny_pair):
    run = lab.run(wait=True)
    done = generate(tiny_pair, PROMPT, 16, total_tokens=12, depth=3, top_k=4)
    assert [token for token, _ in run.tokens] == done.tokens
    assert text(lab.controls.story.value).split() == [f"#{token}" for token in done.tokens]
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
    deadline = time.monotonic() + 30
    while "running" not in lab.controls.meter.value and time.monotonic() < deadline:
        time.sleep(0.005)
    assert lab.controls.run.disabled and not lab.controls.stop.disabled
    lab.stop()
    assert lab.live.wait(30)
    assert lab.last.stopped and 0 < len(lab.last.tokens) < 400
    assert not lab.controls.run.disabled and lab.controls.stop.disabled
    assert len(lab.last.stages) == len(lab.last.cycles)
    assert "stopped" in lab.controls.meter.value


@pytest.mark.parametrize("cycles", [0, 2])
def test_the_kernels_own_interrupt_ends_a_run_as_stop_does(lab, monkeypatch, cycles):
    real = live.stream

    def interrupted(*args, **options):
        for number, cycle in enumerate(real(*args, **options)):
            if number == cycles:
                raise KeyboardInterrupt
            yield cycle

    monkeypatch.setattr(live, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run(wait=True)
    assert lab.last.stopped and len(lab.last.cycles) == len(lab.last.stages) == cycles
    assert not lab.controls.run.disabled and "stopped" in lab.controls.meter.value


def test_only_one_run_at_a_time(lab, tiny_pair):
    lab.controls.max_new_tokens.value = 400
    lab.run()
    with pytest.raises(RuntimeError, match="still going on"):
        lab.live.start(tiny_pair, PROMPT, {"max_new_tokens": 2}, lambda run: None, lambda run: None)
    lab.stop()
    assert lab.live.wait(30)


def test_a_new_builder_appears_in_the_controls_and_decodes(lab):
    @mask_builder("mine")
    def mine(parents):
        return rebuild(parents)

    lab.refresh()
    assert "mine" in lab.controls.strategy.options and "mine" in lab.controls.baseline.options
    first = lab.run(wait=True)
    lab.controls.strategy.value = "mine"
    assert lab.run(wait=True).tokens == first.tokens
    assert "equals the reference" in lab.controls.finding.value


def test_a_wrong_builder_never_decodes_and_its_smallest_tree_is_drawn(lab):
    @mask_builder("mine")
    def mine(parents):
        return torch.ones(len(parents) + 1, len(parents) + 1, dtype=torch.bool)

    lab.refresh()
    lab.controls.strategy.value = "mine"
    assert lab.run() is None and lab.last is None
    assert "lets node 0 attend to node 1" in text(lab.controls.finding.value)
    assert len(lab.controls.finding_view.outputs) == 1
    with pytest.raises(ValueError, match="lets node 0 attend to node 1"):
        lab.compare(wait=True)
    assert lab.comparison is None


def test_a_builder_that_raises_is_told_once(lab):
    @mask_builder("mine")
    def mine(parents):
        return parents[99]

    lab.refresh()
    lab.controls.strategy.value = "mine"
    with pytest.raises(
        ValueError, match="^'mine' raised IndexError in line .*Smallest failing tree"
    ) as error:
        lab.run(wait=True)
    assert str(error.value).count("raised") == 1


def test_a_builder_that_fails_later_is_told_by_its_own_line(lab):
    calls = iter(range(10**6))

    @mask_builder("mine")
    def mine(parents):
        if next(calls) > 450:
            raise KeyError("late")
        return rebuild(parents)

    lab.refresh()
    lab.controls.strategy.value, lab.controls.max_new_tokens.value = "mine", 400
    lab.run()
    assert lab.live.wait(60)
    told = text(lab.controls.status.value)
    assert "raised KeyError in line" in told and "Traceback" not in told
    assert not lab.controls.run.disabled


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
    lab.live.wait(30)
    assert words in text(lab.controls.status.value)
    assert not lab.controls.run.disabled
    with pytest.raises(ValueError, match=words):
        lab.run(wait=True)


def test_compare_shows_the_verdict_of_its_record(lab):
    lab.compare("doubling", wait=True, max_new_tokens=4)
    verdict = lab.comparison.verdict
    assert lab.comparison.path.exists()
    assert lab.comparison.record.settings.candidate == "doubling"
    assert verdict.decision is Decision.INCONCLUSIVE  # two pairs can't decide
    assert "doubling against rebuild" in text(lab.controls.verdict.value)
    assert len(lab.controls.verdict_view.outputs) == 1
    assert lab.controls.bar.value == lab.controls.bar.max == 2


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
    assert plans[-1] == parse("doubling,attention=tree_fused,product=early,runtime=compile+cuda_graph")
