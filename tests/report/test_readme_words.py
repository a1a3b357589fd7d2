"""What the README says of a GPU's records, on made-up ones; none of their numbers is a measurement."""

from __future__ import annotations

import pytest
from test_optimize_bars import made as made_ladder

from eagle_lab.report import readme, readme_words

FIRST = "the official implementation's ways"


@pytest.fixture
def ladder():
    record = made_ladder("shape:llama-3.1-8b", 0.05, 0.01, 0.007, stated=3.0)
    for rung, change in zip(record["ladder"]["rungs"], (FIRST, "one graph"), strict=True):
        rung |= {"change": change, "verdict": None}
    record["ladder"] |= {"unavailable": {"x": "no reason"}, "disagreed": {}, "stated_acceptance": 3.0}
    return record | {"kind": "optimize", "command": "optimize_records.py --device cuda --results-dir out"}


def test_a_ladder_tells_its_bars_and_that_its_acceptance_is_stated(ladder):
    words = readme_words.ladder_words(ladder)
    assert "random weights: acceptance length 3 is stated, not measured" in words
    assert "tokens/s at τ 3.00, stated" in words and "| 7.14 |" in words  # 50 ms over the floor of 7
    assert "5.00×" in words and "(holds)" in words and "(not measured)" in words


def test_what_a_gpu_lacks_is_named_with_its_command(ladder, tmp_path):
    block = readme.gpu_block({"optimize-x": ladder}, tmp_path)
    assert "#### Optimizations, one at a time" in block and FIRST in block
    for name in ("eagle_lab.machine_records", "eagle_lab record sweep"):
        assert f"python -m {name} --device cuda" in block
    assert "optimize-x.json), made by `python -m eagle_lab.studies.optimize_records --device cuda`." in block
    assert "SmolLM2-135M-Instruct: Not measured yet" in block
    assert block.count("optimize_records --device cuda --target default") == 1, "the 8B shape's is there"
    assert block.count("Not measured yet. On a machine with a GPU run") == 4
