"""Filters that turn a value into words."""

from __future__ import annotations

import shlex

import pytest

from eagle_lab.report.words import folded, percent, signed_percent

LONG = "papermill n.ipynb out.ipynb -p device cpu -p strategy cuda,runtime=compile -p prompts a-01,b-02,c-03"


@pytest.mark.parametrize("width", [20, 40, 96])
def test_a_folded_command_is_the_same_to_a_shell_and_whole_in_its_words(width):
    text = folded(LONG, width)
    assert shlex.split(text.replace("\\\n", "")) == shlex.split(LONG)
    ends = {line.removesuffix("\\")[-1] for line in text.splitlines()[:-1]}
    assert ends <= {" ", ","}  # before an option or after a comma
    assert max(map(len, text.splitlines())) <= max(width, len("papermill n.ipynb out.ipynb \\"))


def test_a_command_with_quotes_and_a_short_one_stay_as_they_are():
    for command in (f"python -c 'a -b {LONG}'", "make compare"):
        assert folded(command) == command


@pytest.mark.parametrize(
    ("share", "told", "signed"), [(-0.0001, "0%", "+0%"), (-0.006, "-1%", "-1%"), (0.5, "50%", "+50%")]
)
def test_a_share_that_rounds_to_nothing_has_no_minus(share, told, signed):
    assert (percent(share, 0), signed_percent(share, 0)) == (told, signed)
