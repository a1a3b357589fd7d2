"""What a comparison's settings refuse, and what they write down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from make import make_record

from eagle_lab.engines.arm import parse
from eagle_lab.models.prompts import Prompt, load_prompts
from eagle_lab.verdict import settings
from eagle_lab.verdict.compare import of_pair, of_prompts

GOOD = {**make_record().settings.model_dump(), "iterations": 20, "forks": 5, "looks": ()}


@pytest.mark.parametrize("change", [{}, {"forks": 1}, {"looks": (10, 20)}, {"seed": -3}, {"delta": 0.5}])
def test_good_settings_pass(change):
    found = settings.asked(**{**GOOD, **change})
    assert all(getattr(found, name) == value for name, value in change.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("iterations", bad) for bad in (0, -1, 2.0, "20", True, None)),
        *(("forks", bad) for bad in (0, 21, "5", 1.5)),
        *(("delta", bad) for bad in (0, 1, -0.01, "1%", None, float("nan"), True)),
        *(("minutes", bad) for bad in (0, -1, "5", True, float("inf"))),
        *(("pairs_of", bad) for bad in ("cycle", None)),
        *(("alpha", bad) for bad in (0, 0.5, "x", None)),
        *(("seed", bad) for bad in ("x", 1.5, None, 2**63)),
        *(("looks", bad) for bad in (5, (5, "x"), (20, 10), (10, 15), (0, 20), [1.5, 20])),
        *(("spans", bad) for bad in (True, (True,), (1, 0), "no", (True, False, True), None)),
    ],
)
def test_bad_settings_are_one_sentence_that_names_them(name, value):
    with pytest.raises(ValueError, match=name.removesuffix("s")) as error:
        settings.asked(**{**GOOD, name: value})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_quarter_of_the_forks_are_control():
    assert [settings.control_forks(n) for n in (1, 2, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert settings.control_forks(8, "cycles") == 0


def test_the_record_says_how_the_pair_was_loaded(tiny_pair):
    plain = of_pair(tiny_pair)
    assert plain["load"] == {} and plain["embedded"] is False and plain["dtype"] == "float32"
    # folders of the project read the same everywhere
    assert (plain["target"], plain["draft"]) == ("tests/golden/target", "tests/golden/draft_official")
    origin = {**tiny_pair.origin, "device_map": "auto", "trust_remote_code": True}
    assert of_pair(replace(tiny_pair, origin=origin))["load"] == {
        "device_map": "auto",
        "trust_remote_code": True,
    }


def test_only_prompts_that_are_not_the_kits_are_written_out():
    kit = load_prompts("maths-01")
    assert of_prompts(kit) == {"prompts": ["maths-01"], "own_prompts": {}}
    found = of_prompts([*kit, Prompt("ids-0", "own", "", (1, 2))])
    assert found == {"prompts": ["maths-01", "ids-0"], "own_prompts": {"ids-0": "1 2"}}


def test_quantized_arms_need_not_give_the_same_text():
    one, eight = parse("doubling"), parse("doubling,quantization=fp8")
    assert settings.rule_of(one, one) == "same text"
    assert settings.rule_of(one, eight) == settings.rule_of(eight, eight) == "time per token"
