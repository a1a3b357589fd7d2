"""The mask kernels without a GPU: Triton's interpreter, and the CUDA source run thread by thread on the CPU.

On a GPU the last tests run the real kernels; elsewhere they are skipped and say so.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from make import interpreted, needs_gpu, shaped, special

from eagle_lab.decode.masks import MASK_BUILDERS, build_all, rebuild
from eagle_lab.runtime import kernels
from eagle_lab.runtime.kernels import cuda_mask

TRITON = importlib.util.find_spec("triton") is not None
COMPILER = shutil.which("g++")
NVCC = shutil.which("nvcc")

# What CUDA gives a thread, from C++20: a block is 256 threads, a warp's ballot a barrier around 32 flags.
SHIM = r"""
#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
struct Place { int x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static thread_local Place threadIdx, blockIdx;
struct Warp { std::barrier<> gate{32}; std::atomic<unsigned> votes[2] = {0, 0}; };
static Warp* warps; static std::barrier<>* block;
static thread_local int turn = 0;
static void __syncthreads() { block->arrive_and_wait(); }
static void __syncwarp() { warps[threadIdx.x / 32].gate.arrive_and_wait(); }
static unsigned __ballot_sync(unsigned, bool vote) {
    Warp& own = warps[threadIdx.x / 32];
    std::atomic<unsigned>& votes = own.votes[turn ^= 1];
    votes.fetch_or((unsigned)vote << (threadIdx.x % 32));
    own.gate.arrive_and_wait();
    const unsigned all = votes.load();
    own.gate.arrive_and_wait();
    if (threadIdx.x % 32 == 0) votes = 0;
    return all;
}
static int __ffs(unsigned x) { return __builtin_ffs(x); }
#define __global__
#define __shared__ static
"""
LAUNCH = r"""
extern "C" void launch(const i64* up, unsigned char* mask, int n, int blocks, int trees) {
    for (int y = 0; y < trees; y++) for (int x = 0; x < blocks; x++) {
        std::barrier<> all(WARPS * 32);
        std::unique_ptr<Warp[]> own(new Warp[WARPS]);
        block = &all; warps = own.get();
        std::vector<std::thread> threads;
        for (int t = 0; t < WARPS * 32; t++) threads.emplace_back([=] {
            threadIdx = {t, 0, 0}; blockIdx = {x, y, 0};
            tree_mask(up, mask, n);
        });
        for (auto& thread : threads) thread.join();
    }
}
"""


def batches() -> list[torch.Tensor]:
    """Tree parents: random batches at sizes around words, tiles and 16-byte rows, and the extreme shapes."""
    rng = np.random.default_rng(0)
    random = [shaped(rng.random((2, n)), n) for n in (1, 2, 15, 16, 31, 63, 64, 100)]
    return random + [torch.stack(list(special(n).values())) for n in (1, 15, 40)]


# --- the CUDA source on the CPU ----------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """cuda_mask's source behind the shim, as a function from parents int64 [B, n] to masks."""
    if not COMPILER:
        pytest.skip("no g++ on this machine: the CUDA source cannot be run on the CPU")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "mask.cpp").write_text(SHIM + cuda_mask.SOURCE + LAUNCH)
    made = subprocess.run(
        [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o", "mask.so", "mask.cpp"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    library = ctypes.CDLL(str(folder / "mask.so"))

    def run(parents: torch.Tensor) -> torch.Tensor:
        trees, n = parents.shape
        mask = torch.empty(trees, n + 1, n + 1, dtype=torch.bool)
        places = [ctypes.c_void_p(t.data_ptr()) for t in (parents.contiguous(), mask)]
        library.launch(*places, n, -(-(n + 1) // cuda_mask.WARPS), trees)
        return mask

    return run


def test_the_cuda_source_on_the_cpu(on_cpu):
    for parents in batches():
        assert torch.equal(on_cpu(parents), build_all(rebuild, parents))


@pytest.mark.skipif(not NVCC, reason="no nvcc on this machine")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_accepts_the_cuda_source(tmp_path, architecture):
    (tmp_path / "mask.cu").write_text(cuda_mask.SOURCE)
    made = subprocess.run(
        [NVCC, f"-arch={architecture}", "-cubin", "--resource-usage", "-o", "mask.cubin", "mask.cu"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    shared = int(re.search(r"(\d+) bytes smem", made.stderr)[1])
    assert "0 bytes spill" in made.stderr or "spill" not in made.stderr
    assert shared <= 48 * 1024  # what a block may have without asking


def test_sizes_in_the_source_and_in_python_agree():
    assert f"#define MAX_NODES {cuda_mask.MAX_NODES}\n" in cuda_mask.SOURCE
    assert f"#define WARPS {cuda_mask.WARPS}\n" in cuda_mask.SOURCE


# --- Triton ------------------------------------------------------------------------------------


def interpreted_checks() -> None:
    """The Triton kernel in the interpreter against the definition; run in a process that has TRITON_INTERPRET=1."""
    from eagle_lab.runtime.kernels import triton_mask

    assert kernels.interpreted()
    for parents in batches()[2:]:
        assert torch.equal(triton_mask.tree_mask(parents), build_all(rebuild, parents))
    wide = shaped(np.random.default_rng(1).random((1, 400)), 400)
    assert torch.equal(MASK_BUILDERS["triton"](wide[0]), rebuild(wide[0]))
    assert torch.equal(build_all(MASK_BUILDERS["triton"], wide), build_all(rebuild, wide))
    print("interpreted: equal")


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_triton_s_interpreter_equals_the_definition():
    done = interpreted(Path(__file__).parent, "import test_kernels; test_kernels.interpreted_checks()")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "interpreted: equal" in done.stdout


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_triton_compiles_for_an_h100(for_h100):
    from eagle_lab.runtime.kernels import triton_mask

    made = for_h100(triton_mask.tree_kernel, {"ROWS": 16, "COLS": 64}, {"up": "*i64", "mask": "*i8"})
    assert ".target sm_90" in made["ptx"] and len(made["cubin"]) > 0


# --- on a GPU ----------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_kernel_on_the_gpu(name):
    module = importlib.import_module(f"eagle_lab.runtime.kernels.{name}_mask")
    big = [shaped(np.random.default_rng(n).random((2, n)), n) for n in (255, 511, 1023, 2048)]
    for parents in batches() + big:
        assert torch.equal(module.tree_mask(parents.cuda()).cpu(), build_all(rebuild, parents))


@needs_gpu
@pytest.mark.parametrize("name", ["triton", "cuda", "doubling", "walk"])
def test_a_captured_graph_builds_new_trees(name):
    trees = shaped(np.random.default_rng(0).random((4, 63)), 63).cuda()
    static = trees[:1].clone()
    build_all(MASK_BUILDERS[name], static, 63)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = build_all(MASK_BUILDERS[name], static, 63)
    for tree in trees:
        static.copy_(tree[None])
        graph.replay()
        assert torch.equal(out[0].cpu(), rebuild(tree.cpu()))


def test_a_tree_beyond_the_kernel_is_refused():
    with pytest.raises(ValueError, match="larger than the kernel's 4096"):
        cuda_mask.tree_mask(torch.zeros(1, 5000, dtype=torch.int64))


def test_kernels_are_assembled_by_what_torch_brings_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(kernels.ASSEMBLER, "")  # so that it is put back
    monkeypatch.delenv(kernels.ASSEMBLER)
    kernels.one_assembler(tmp_path)
    assert kernels.ASSEMBLER not in os.environ
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text("")
    kernels.one_assembler(tmp_path)
    assert kernels.ASSEMBLER not in os.environ, "it can't be run"
    ptxas.chmod(0o755)
    kernels.one_assembler(tmp_path)
    assert os.environ[kernels.ASSEMBLER] == str(ptxas)
    monkeypatch.setenv(kernels.ASSEMBLER, "/another/ptxas")
    kernels.one_assembler(tmp_path)
    assert os.environ[kernels.ASSEMBLER] == "/another/ptxas"
