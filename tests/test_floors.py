"""A module of eagle_lab imports only from floors below its own: never sideways, never up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "eagle_lab"
TOP = 9

# A new module needs a line here: choose the lowest floor above everything that it imports.
FLOORS: dict[str, float] = {
    # 0: no knowledge of models
    "tree": 0,
    "clock": 0,
    "stats": 0,
    "consistency": 0,
    "environment": 0,
    "prompts": 0,
    "tree_layout": 0,
    "parameters": 0,
    "schedule": 0,
    "weights": 0,
    "capture": 0,
    "early_launch": 0,
    "dialects": 0,
    # landings between floors 0 and 1: kernels that start early, products by them, and the projections that use these
    "kernels": 0.3,
    "products": 0.5,
    "merging": 0.7,
    # 1: the parts of a cycle
    "masks": 1,
    "cache": 1,
    "draft": 1,
    "records": 1,
    "simulate": 1,
    "runtime": 1,
    "regional": 1,
    # 2
    "checkpoints": 2,
    "accept": 2,
    "targets": 2,
    "shapes": 2,
    "check": 2,
    "summary": 2,
    "calibration": 2,
    "aa": 2,
    "attention": 2,
    "ttt": 2,
    "shares": 2,
    # 3: what is decoded, and how
    "models": 3,
    "strategy": 3,
    "text": 2,
    "draft_report": 2,
    "new_head": 2,
    "packing": 3,
    "writer": 3,
    # landings between floors 3 and 4: one cycle and its parts, and the captured machine that repeats it for decoding
    "state": 3.1,
    "expansion": 3.2,
    "cycle": 3.3,
    "reading": 3.4,
    "machine": 3.6,
    # 4: decoding and training
    "decode": 4,
    "physics": 4,
    "train": 4,
    "replay": 4,
    "acceptance": 5,
    "trees": 5,
    "mask_graphs": 4,
    "mask_decodes": 6.5,
    "sweep": 7,
    "sweep_report": 2,
    "sweep_bars": 2.5,
    "charts_sweep": 7,
    # 5 to 8: measuring, judging, showing; each chart comes through `charts`, so its module stands above that
    "batch": 5,
    "measure": 5,
    "settings": 5,
    "profile": 5,
    "agree": 5,
    "operators": 5,
    "whatif": 6,
    "live": 5,
    "compare": 6,
    "correctness": 6,
    "make_draft": 6,
    "history": 6,
    "overhead": 7,
    "charts_history": 7,
    "seed_masks": 6,
    "seed_audit": 6,
    "seed_claims": 7,
    "charts": 6,
    "charts_tree": 7,
    "charts_stages": 7,
    "charts_training": 7,
    "charts_correctness": 7,
    "link": 7,
    "cards": 7,
    "controls": 7,
    "charts_profile": 7,
    "profile_report": 7,
    "machine_records": 8,
    "charts_calibrate": 7,
    "ladder": 7,
    "throughput": 6,
    "charts_optimize": 7,
    "launching": 4,
    "optimize_bars": 7,
    "optimize_records": 8.5,
    "report": 7,
    "widgets": 8,
    "readme_words": 8.7,
    "readme": 8.8,
    # the public names and the command line
    "__init__": TOP,
    "__main__": TOP,
}


def unit_of(path: Path, package: Path) -> str:
    """The name in FLOORS that stands for this file: a module, or the subfolder that it lies in."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(source: str, parts: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, dotted name below eagle_lab) of every import of the package, wherever it stands in the source.

    parts: the file's place in the package, ("kernels", "graph") for kernels/graph.py. "" is the package.
    """
    found: list[tuple[int, str]] = []

    def absolute(level: int, module: str) -> str:
        base = ("eagle_lab", *parts[:-1])
        return ".".join([*base[: len(base) - level + 1], *filter(None, [module])])

    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node.level, node.module or "") if node.level else node.module or ""
            # `from eagle_lab import masks` means the module, `from eagle_lab import load` the package itself
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "eagle_lab" else [module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(argument, str):
                level = len(argument) - len(argument.lstrip("."))
                names = [absolute(level, argument.lstrip(".")) if level else argument]
        for name in names:
            if name == "eagle_lab" or name.startswith("eagle_lab."):
                unit = name.removeprefix("eagle_lab").lstrip(".").split(".")[0]
                found.append((node.lineno, unit))
    return found


def violations(package: Path) -> list[str]:
    """One sentence for each import that breaks the rule, and for each module that has no floor."""
    complaints = []
    for path in sorted(package.rglob("*.py")):
        unit, where = unit_of(path, package), path.relative_to(package.parent)
        if unit not in FLOORS:
            complaints.append(f"{where}: no floor for '{unit}'; add it to FLOORS in tests/test_floors.py")
            continue
        parts = path.relative_to(package).with_suffix("").parts
        for line, imported in imported_modules(path.read_text(encoding="utf-8"), parts):
            if imported not in FLOORS and (package / f"{imported}.py").exists():
                continue  # complained of where that file itself is seen
            target = imported if imported in FLOORS else "__init__"  # a name of the package itself
            same_subpackage = target == unit and len(parts) > 1
            if FLOORS[target] >= FLOORS[unit] and not same_subpackage and FLOORS[unit] < TOP:
                complaints.append(
                    f"{where}:{line}: floor {FLOORS[unit]} imports "
                    f"{'eagle_lab' if target == '__init__' else target} (floor {FLOORS[target]}); "
                    "imports point downward"
                )
    return complaints


def test_imports_point_downward():
    assert not (found := violations(PACKAGE)), "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("tree.py", "from eagle_lab.decode import generate", "floor 0 imports decode (floor 4)"),
        ("tree.py", "import eagle_lab.stats", "floor 0 imports stats (floor 0)"),
        ("masks.py", "from . import cache", "floor 1 imports cache (floor 1)"),
        ("masks.py", "def late():\n    from .compare import judge", "masks.py:2: floor 1 imports compare"),
        ("draft.py", "from eagle_lab import load", "floor 1 imports eagle_lab (floor 9)"),
        ("kernels/graph.py", "from ..masks import build", "floor 0.3 imports masks (floor 1)"),
        ("stats.py", "import importlib as i\ni.import_module('eagle_lab.kernels.graph')", "imports kernels"),
        ("brandnew.py", "", "no floor for 'brandnew'; add it to FLOORS"),
    ],
)
def test_the_guard_can_fail(tmp_path, file, source, complaint):
    path = tmp_path / "eagle_lab" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [line for line in violations(tmp_path / "eagle_lab") if complaint in line]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("decode.py", "import torch\nfrom eagle_lab.masks import MASK_BUILDERS\nfrom . import tree"),
        ("kernels/__init__.py", "from .graph import capture"),
        ("__init__.py", "from eagle_lab.compare import compare"),
        ("__main__.py", "from eagle_lab import compare"),
    ],
)
def test_the_guard_lets_good_imports_pass(tmp_path, file, source):
    path = tmp_path / "eagle_lab" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "eagle_lab") == []
