"""The package's own names: what is public, that importing it is cheap, and that `compare` stays the function."""

from __future__ import annotations

import ast
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import eagle_lab


def test_every_public_name_is_there_and_listed():
    assert set(eagle_lab.__all__) <= set(dir(eagle_lab))
    for name in eagle_lab.__all__:
        assert getattr(eagle_lab, name) is getattr(
            import_module(f"eagle_lab.{eagle_lab._HOME_OF[name]}"), name
        )


def test_editors_see_the_same_names_as_python():
    tree = ast.parse(Path(eagle_lab.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {name: f"eagle_lab.{home}" for name, home in eagle_lab._HOME_OF.items()}
    assert set(seen) == set(eagle_lab.__all__) and len(seen) == len(eagle_lab.__all__)


def test_importing_is_cheap_and_a_module_does_not_hide_the_function_of_its_name():
    code = (
        "import sys, eagle_lab; assert 'torch' not in sys.modules; import eagle_lab.compare;"
        "assert callable(eagle_lab.compare); assert eagle_lab.models.pair.DATA"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_typo_is_an_error():
    with pytest.raises(AttributeError, match="jugde"):
        eagle_lab.jugde  # noqa: B018


def test_the_help_page_explains_every_public_name():
    page = pydoc.plain(pydoc.render_doc(eagle_lab))
    assert "Where to look next" in page
    for name in set(eagle_lab.__all__) - {"MASK_BUILDERS"}:
        assert getattr(eagle_lab, name).__doc__.split("\n")[0].strip()[:60] in page, name
