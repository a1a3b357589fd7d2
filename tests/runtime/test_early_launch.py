"""Kernels that are launched early wait before they touch memory; without a GPU that can, nothing is changed."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config

from eagle_lab.runtime import early_launch
from eagle_lab.runtime.early_launch import AFTER, HOOK, TAG, early_launches, possible, refusal, wait_first


@pytest.mark.parametrize("in_loop", [False, True])
def test_every_access_asks_for_a_wait_before_a_loop_too(in_loop):
    lines: dict[str, list[str]] = {"body": [], "stores": []}
    buffers = {name: SimpleNamespace(writeline=found.append) for name, found in lines.items()}
    kernel = SimpleNamespace(
        _enable_pdl_codegen=lambda: True, inside_reduction=in_loop, range_trees=[SimpleNamespace(is_loop=in_loop)],
        body=buffers["body"], GDC_WAIT="wait", GDC_LAUNCH="signal",
    )  # fmt: skip
    wait_first(kernel, buffers["stores"], "buf0", consider_reads=True)
    wait_first(kernel, buffers["stores"], "buf1")
    expected = ["signal", "wait", "wait"]  # Inductor keeps the first wait
    assert lines == {"body": expected * in_loop, "stores": expected * (not in_loop)}
    kernel._enable_pdl_codegen = lambda: False
    wait_first(kernel, buffers["stores"], "buf0")
    assert sum(map(len, lines.values())) == 3


def test_nothing_is_changed_on_a_device_that_cannot():
    from torch._inductor.codegen.triton import TritonKernel

    assert not possible(torch.device("cpu"))
    before = getattr(TritonKernel, HOOK, None)
    with early_launches(torch.device("cpu")):
        assert getattr(TritonKernel, HOOK, None) is before
        assert not getattr(torch._inductor.config.triton, "enable_pdl", False)


def test_another_release_of_torch_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(early_launch, "supported", lambda device: True)
    gpu = torch.device("cuda")
    for version, fine in (("2.10.1", False), ("2.11.0", True), ("2.13.2+cu130", True), ("2.14.0", False)):
        monkeypatch.setattr(torch, "__version__", version)
        assert possible(gpu) == fine
        reason = f"was tried with torch 2.11 to 2.13, but this is torch {version}"
        assert refusal(gpu) is None if fine else refusal(gpu).endswith(reason)


@pytest.mark.skipif(
    not hasattr(torch._inductor.config.triton, "enable_pdl"), reason="this torch launches nothing early"
)
@pytest.mark.parametrize("own", ["", "mine"])
def test_what_was_compiled_without_the_waits_is_not_taken_from_a_cache(monkeypatch, own):
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(early_launch, "possible", lambda device: True)
    monkeypatch.setattr(TritonKernel, HOOK, None, raising=False)
    monkeypatch.setattr(TritonKernel, AFTER, None, raising=False)
    with torch.compiler.config.patch(cache_key_tag=own):
        with early_launches(torch.device("cpu")):
            assert torch.compiler.config.cache_key_tag == own + TAG
            assert getattr(TritonKernel, HOOK) is wait_first
        assert torch.compiler.config.cache_key_tag == own


@pytest.mark.skipif(
    not torch.cuda.is_available() or not possible(torch.device("cuda")),
    reason="needs a GPU and a torch with programmatic dependent launch",
)
@pytest.mark.parametrize("combo_kernels", [False, True])
def test_every_kernel_waits_before_it_reads_or_writes(combo_kernels):
    """Among them one that reads nothing, whose wait Inductor leaves out, and a reduction in a loop; also as branches of
    one kernel."""
    from torch._inductor.utils import run_and_get_code

    def some(x):
        y = (x @ x).sin()
        zeros = torch.zeros(7, 3000, device=x.device).index_add_(0, torch.arange(7, device=x.device), y[:7])
        return y.logsumexp(-1), zeros, torch.arange(5000, device=x.device)

    torch._dynamo.reset()
    x = torch.randn(3000, 3000, device="cuda")
    with early_launches(x.device), torch._inductor.config.patch({"combo_kernels": combo_kernels}):
        _, code = run_and_get_code(torch.compile(some), x)
    kernels = re.findall(
        r"def triton_\w+\(.*?(?=^def |^'''|\Z)", "\n".join(code), flags=re.DOTALL | re.MULTILINE
    )
    assert len(kernels) >= 3
    for kernel in kernels:
        # before the first branch of a combo kernel there is only the choice of the branch
        _, *branches = re.split(r"^ *(?:if|elif) pid\b.*:$", kernel, flags=re.MULTILINE)
        for branch in branches or [kernel]:
            first = re.search(r"tl\.(load|store|atomic_add)\(", branch)
            before = branch[: first.start()] if first else ""
            assert 0 <= before.find("gdc_launch_dependents()") < before.find("gdc_wait()"), kernel
            assert branch.count("gdc_launch_dependents()") == branch.count("gdc_wait()") == 1, kernel
