"""The pair that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_pair():
    """The golden target (8 layers, hidden 64, vocabulary 512) and its trained head, float32 on the CPU."""
    from eagle_lab.models.pair import load

    torch.set_num_threads(1)
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu", dtype="float32")


@pytest.fixture
def prepared(tiny_pair, monkeypatch):
    """What a runtime with fixed shapes was asked to prepare, by name: here it runs the step itself and compiles nothing."""
    from eagle_lab.runtime import prepare as runtime

    asked: list[str] = []

    def prepare(name, step, reset, device, pool=None):
        asked.append(name)
        reset()
        return runtime.Prepared(step, 0.0, 0)

    monkeypatch.setattr(runtime, "unavailable", lambda name, device: None)
    monkeypatch.setattr(runtime, "prepare", prepare)
    tiny_pair.machines.clear()
    yield asked
    tiny_pair.machines.clear()


@pytest.fixture
def for_h100():
    """A Triton kernel compiled for an H100, which needs no GPU: from its constants, the types of its other parameters
    (i32 where none is given) and options to what the compiler made, by kind."""
    from eagle_lab.runtime.kernels import interpreted

    if interpreted():
        pytest.skip("TRITON_INTERPRET=1: kernels of this process are interpreted, not compiled")
    import triton
    from triton.backends.compiler import GPUTarget

    def made(kernel, fixed, types, **options):
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

    return made
