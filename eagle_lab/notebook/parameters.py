"""Checks a notebook's parameters before any work: papermill only warns of an unknown name and passes text through.

The cell tagged `parameters` has one line each, `name: type = value  # what it means`; papermill injects the caller's
values in a cell that starts with `# Parameters`.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
}


class ParameterError(ValueError):
    """A notebook parameter is unknown or of the wrong type; the message says which and what to give."""


def declared(source: str) -> dict[str, str]:
    """Parameter names and their types, from the source of the parameters cell.

    A default of None makes None a value of the type: papermill's own reader knows `str` but not `str | None`.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            optional = isinstance(node.value, ast.Constant) and node.value.value is None
            found[node.target.id] = ast.unparse(node.annotation) + " | None" * optional
    return found


def injected(source: str) -> list[str]:
    """Names assigned in papermill's injected cell."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of a type written as `int`, `float`, `str`, `bool`, `list` or such with `| None`."""
    for part in (piece.strip() for piece in kind.split("|")):
        if part == "None" and value is None:
            return True
        types = KINDS.get(part.partition("[")[0])
        # True is an int to Python, but nobody means 1 iteration by it
        if types and isinstance(value, types) and (part == "bool" or not isinstance(value, bool)):
            return True
    return False


def check(cells: Sequence[str], values: Mapping[str, Any]) -> None:
    """Check what papermill injected against what the notebook declares.

    Args: cells: the sources that have run, IPython's `In`; values: the notebook's `globals()`.
    Raises: ParameterError, one sentence, for an unknown name (with the nearest known one) or a wrong type.
    """
    known: dict[str, str] = {}
    for source in cells:
        if not known:
            known = _try(declared, source) or {}
        elif source.lstrip().startswith("# Parameters"):
            for name in _try(injected, source) or []:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    hint = f"did you mean {near[0]!r}? " if near else ""
                    raise ParameterError(f"parameter {name!r} is unknown; {hint}Known: {', '.join(known)}.")
    for name, kind in known.items():
        if not fits(values[name], kind):
            raise ParameterError(
                f"parameter {name!r} is {values[name]!r}, a {type(values[name]).__name__}; it must be {kind}"
                f"{' (-y passes lists and booleans)' if kind.startswith(('list', 'bool')) else ''}."
            )


def _try(read: Any, source: str) -> Any:
    try:
        return read(source)
    except SyntaxError:  # a cell with a shell line or a magic declares nothing
        return None
