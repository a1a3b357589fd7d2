"""The package's own names: what is public, that importing it is cheap, and that folders hide no function."""

from __future__ import annotations

import ast
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import eagle_lab


def test_the_stub_lists_what_python_offers():
    tree = ast.parse(Path(eagle_lab.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    (listed,) = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert imported == set(listed) == set(eagle_lab.__all__)
    assert all(getattr(eagle_lab, name) is not None for name in listed)


def test_importing_is_cheap_and_a_module_does_not_hide_the_function_of_its_name():
    code = (
        "import sys, eagle_lab; assert 'torch' not in sys.modules; import eagle_lab.verdict.compare;"
        "assert callable(eagle_lab.compare) and callable(eagle_lab.generate); assert eagle_lab.ROOT.is_dir()"
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
        assert name in page and getattr(eagle_lab, name).__doc__
