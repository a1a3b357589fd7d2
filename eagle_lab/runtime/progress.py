"""A bar that says how far a run has come: on a terminal as tqdm draws it, in a notebook in place and never on stderr."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from tqdm import tqdm

LINES = "EAGLE_LAB_PROGRESS"  # where this variable is "lines", a line each ten seconds on stdout: for a log
_TOLD = "{desc}: {n:,} of {total:,}, {elapsed} so far, {remaining} left"


def progress(total: int, unit: str, what: str, done: int = 0, shown: bool = True) -> tqdm:
    """A bar of `total` units, `done` of them already; `update(n)` moves it, and it closes as a context does.

    A terminal's bar is on stderr. A notebook's is one HTML output that is gone at the end, for a saved notebook should
    hold results.
    """
    options: dict[str, Any] = {
        "total": total,
        "initial": done,
        "unit": unit,
        "desc": what,
        "disable": not shown,
    }
    if os.environ.get(LINES) == "lines":
        return tqdm(file=sys.stdout, mininterval=10, bar_format=f"{_TOLD}\n", leave=False, **options)
    return _InPlace(**options) if in_notebook() else tqdm(**options)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class _InPlace(tqdm):
    """tqdm's counting, shown as an output that is written over."""

    def __init__(self, **options: Any) -> None:
        self._handle: Any = None
        super().__init__(file=io.StringIO(), mininterval=0.5, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show how far it is; tqdm calls this, with an empty `msg` at the end."""
        from IPython.display import display

        text = self.format_meter(**{**self.format_dict, "bar_format": _TOLD}) if msg is None else ""
        bar = f'<progress value="{self.n}" max="{self.total}"></progress> {text}' if text else ""
        bundle = {"text/html": bar, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        return True
