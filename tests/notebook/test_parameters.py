import pytest
from IPython.core.interactiveshell import InteractiveShell

from eagle_lab.notebook.parameters import ParameterError, check

DECLARED = "iterations: int = 2  # pairs\ndraft: str = None  # a head\ndelta: float = 0.01  # least effect\nrerun: bool = False  # again"
VALUES = {"iterations": 2, "draft": None, "delta": 0.01, "rerun": False}


def test_the_defaults_pass():
    check(["import os", DECLARED], VALUES)


def test_an_injected_known_name_passes():
    check(["", DECLARED, "# Parameters\niterations = 20\n"], {**VALUES, "iterations": 20})


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ParameterError, match="'iteration' is unknown; did you mean 'iterations'"):
        check([DECLARED, "# Parameters\niteration = 20\n"], VALUES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", "20"),
        ("iterations", True),
        ("iterations", 2.5),
        ("rerun", "false"),
        ("delta", "1%"),
        ("draft", 3),
    ],
)
def test_a_wrong_type_is_named(name, value):
    with pytest.raises(ParameterError, match=name):
        check([DECLARED], {**VALUES, name: value})


def test_a_whole_number_is_a_fine_float():
    check([DECLARED], {**VALUES, "delta": 1})


def test_cells_that_are_not_python_are_skipped():
    check(["!ls", "%pip list", DECLARED], VALUES)


def test_none_is_a_value_only_where_it_is_the_default():
    check([DECLARED], VALUES)
    with pytest.raises(ParameterError, match="iterations is None; it must be a whole number"):
        check([DECLARED], {**VALUES, "iterations": None})


def test_a_notebook_shows_the_sentence_and_no_frames(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell(
            "from eagle_lab.notebook.parameters import ParameterError\nraise ParameterError('no such thing')"
        )
        shown = capsys.readouterr().out
        assert shown.strip() == "ParameterError: no such thing"
    finally:
        InteractiveShell.clear_instance()


def test_a_number_where_text_is_wanted_is_told_papermills_way_out():
    with pytest.raises(ParameterError, match=r"draft is 3; .* with -r\."):
        check([DECLARED], {**VALUES, "draft": 3})
