"""Docstrings give shapes and errors. That there are docstrings is ruff's to check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "eagle_lab"


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, node) of each public class, function and method; nothing inside functions or private classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")


def unspecific(source: str, where: str) -> list[str]:
    """Public functions that take or give tensors without a shape, "[B, n]", or that raise without saying so."""
    tree = ast.parse(source)
    of_all = ast.get_docstring(tree) or ""
    classes = {n.name: ast.get_docstring(n) or "" for n in tree.body if isinstance(n, ast.ClassDef)}
    found = []
    for name, node in definitions(tree.body):
        if (
            not isinstance(node, ast.FunctionDef)
            or name in ("main", "forward")
            or where.endswith("__main__.py")
        ):
            continue
        words = (ast.get_docstring(node) or "") + classes.get(name.partition(".")[0], "")
        types = [a.annotation for a in node.args.args + node.args.kwonlyargs] + [node.returns]
        arrays = re.search(r"\b(Tensor|NDArray)\b", " ".join(ast.unparse(t) for t in types if t))
        if arrays and "[" not in words and "[" not in of_all:
            found.append(f"{where}:{node.lineno}: {name} gives no shape")
        if raises(node) and not re.search(r"[Rr]aise|Error\b|ArmsDisagree|IncorrectPair", words):
            found.append(f"{where}:{node.lineno}: {name} doesn't say what it raises")
    return found


def raises(function: ast.FunctionDef) -> bool:
    """Whether an exception that the function makes itself can leave it: one raised inside a try is taken for caught."""
    caught = {
        id(inner)
        for attempt in ast.walk(function)
        if isinstance(attempt, ast.Try) and attempt.handlers
        for statement in attempt.body
        for inner in ast.walk(statement)
    }
    return any(isinstance(n, ast.Raise) and n.exc and id(n) not in caught for n in ast.walk(function))


def test_shapes_and_errors_are_told():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += unspecific(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE.parent)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f(x: Tensor):\n    """Words."""', 1),
        ('def f(x: Tensor):\n    """Words about int64 [n]."""', 0),
        ('"""All are [n]."""\ndef f(x: Tensor):\n    """Words."""', 0),
        ('def f():\n    """Words."""\n    raise ValueError("no")', 1),
        ('def f():\n    """Words. Raises ValueError."""\n    raise ValueError("no")', 0),
        (
            'def f():\n    """Words."""\n    try:\n        raise ValueError("no")\n    except ValueError:\n        pass',
            0,
        ),
        ('class C:\n    """Words."""\n    def m(self) -> Tensor:\n        """Words."""', 1),
    ],
)
def test_the_audit_can_fail(source, count):
    assert len(unspecific(source, "file")) == count


@pytest.mark.parametrize("name", ["load", "compare", "stream", "judge", "generate_plain", "save_draft"])
def test_what_a_caller_meets_first_says_what_goes_in_and_what_is_raised(name):
    import eagle_lab

    words = getattr(eagle_lab, name).__doc__
    assert "ValueError" in words or "Raises" in words, f"{name} doesn't say what it raises"
