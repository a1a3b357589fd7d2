"""Fixtures that every test may ask for."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
import torch
from make import GOLDEN, SNAPSHOTS


def pytest_addoption(parser):
    parser.addoption(
        "--update-snapshots", action="store_true", help="write tests/snapshots/ anew; read its diff"
    )


@pytest.fixture
def snapshot(request):
    """`snapshot(text, "page.md")` holds what a template made to tests/snapshots/page.md, character by character."""

    def same(text: str, name: str) -> None:
        file = SNAPSHOTS / name
        if request.config.getoption("update_snapshots"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"no tests/snapshots/{name} yet: make it by pytest --update-snapshots"
        assert text == file.read_text(encoding="utf-8"), (
            f"if meant: pytest --update-snapshots, then read the diff of {name}"
        )

    return same


@pytest.fixture(scope="session")
def tiny_pair():
    """The golden target (8 layers, hidden 64, vocabulary 512) and its trained head, float32 on the CPU."""
    from eagle_lab.models.pair import load

    torch.set_num_threads(1)
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu", dtype="float32")


@pytest.fixture
def prepared(tiny_pair, monkeypatch):
    """What a runtime with fixed shapes was asked to prepare, by name: here it runs the step itself, which is what a
    graph would record, and compiles nothing."""
    from eagle_lab.runtime import needs
    from eagle_lab.runtime import prepare as runtime

    asked: list[str] = []

    def prepare(name, step, reset, device, pool=None):
        asked.append(name)
        reset()
        return runtime.Prepared(step, 0.0, 0)

    monkeypatch.setattr(needs, "missing", lambda what, needed, device: None)
    monkeypatch.setattr(runtime, "prepare", prepare)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for kept in (tiny_pair.sessions, tiny_pair.prefills):
        kept.clear()
    yield asked
    for kept in (tiny_pair.sessions, tiny_pair.prefills):
        kept.clear()


@pytest.fixture
def for_h100():
    """A Triton kernel compiled for an H100, which needs no GPU: from its constants, the types of its other parameters
    (i32 where none is given), options, and the parameters that are multiples of 16, to what the compiler made, by kind."""
    from eagle_lab.runtime.kernels import interpreted

    if interpreted():
        pytest.skip("TRITON_INTERPRET=1: kernels of this process are interpreted, not compiled")
    import triton
    from triton.backends.compiler import GPUTarget

    def made(kernel, fixed, types, aligned=(), **options):
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
        attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

    return made
