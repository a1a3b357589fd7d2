"""Checks a notebook's parameters before any work: papermill only warns of an unknown name and passes text through.

The cell tagged `parameters` has one line each, `name: type = value  # what it means`; papermill injects the caller's
values in a cell that starts with `# Parameters`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from eagle_lab.runtime import checks

KINDS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


class ParameterError(ValueError):
    """A notebook parameter is unknown or of the wrong type; the message says which and what to give."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, for the frames are the kit's own."""
        return [f"ParameterError: {self}"]


def declared(source: str) -> dict[str, Any]:
    """Parameter names and their types, from the source of the parameters cell.

    A default of None makes None a value of the type: papermill's own reader knows `str` but not `str | None`.
    """
    found = {}
    for node in _statements(source):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = KINDS[ast.unparse(node.annotation)]
            optional = isinstance(node.value, ast.Constant) and node.value.value is None
            found[node.target.id] = kind | None if optional else kind
    return found


def check(cells: Sequence[str], values: Mapping[str, Any]) -> None:
    """Check what papermill injected against what the notebook declares.

    Args: cells: the sources that have run, IPython's `In`; values: the notebook's `globals()`.
    Raises: ParameterError, one sentence, for an unknown name (with the nearest known one) or a wrong type.
    """
    known: dict[str, Any] = {}
    for source in cells:
        if not known:
            known = declared(source)
        elif source.lstrip().startswith("# Parameters"):
            injected = [n.targets[0] for n in _statements(source) if isinstance(n, ast.Assign)]
            for name in (target.id for target in injected if isinstance(target, ast.Name)):
                if name not in known:
                    near = checks.nearest(name, list(known))
                    raise ParameterError(f"parameter {name!r} is unknown{near}; known: {', '.join(known)}.")
    for name, kind in known.items():
        try:
            checks.check(kind, values[name], name)
        except ValueError as error:
            hint = " papermill passes lists and booleans with -y." if kind in (list, bool) else ""
            if isinstance(values[name], int | float) and "must be text" in str(error):
                hint = " papermill passes text that looks like a number with -r."
            raise ParameterError(f"parameter {error}{hint}") from None


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with a shell line or a magic declares nothing
        return []
