"""The tree mask in CUDA C++, compiled at run time by NVRTC: one launch writes mask, depths and links of a batch.

A block has a tree and eight of its rows, a warp each. The block links the kept candidates in shared memory; each warp
climbs from its row to the root, collecting bits, and spreads them to bytes in whole 16-byte stores where a row's length
allows. First child and next sibling are found 32 nodes at a time by a ballot. No atomics, no other state.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eagle_lab.runtime.kernels import TreeTensors, empty, squeezed

MAX_NODES = 4096
WARPS = 8
NAME = "tree_mask"

SOURCE = r"""
#define MAX_NODES 4096
#define WARPS 8
typedef long long i64;

extern "C" __global__ void tree_mask(
    const i64* kept, const i64* up, unsigned char* mask, i64* depths, i64* parents, i64* first_child,
    i64* next_sibling, int n, int pool, int linked)
{
    __shared__ int key[MAX_NODES];
    __shared__ int parent[MAX_NODES];
    __shared__ unsigned bits[WARPS][MAX_NODES / 32];
    const int nodes = n + 1, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const i64 tree = blockIdx.y;
    up += tree * pool;
    kept += tree * n;

    if (!linked) {
        for (int i = thread; i < n; i += WARPS * 32) key[i] = (int)kept[i];
        __syncthreads();
    }
    if (thread == 0) parent[0] = -1;
    for (int i = thread; i < n; i += WARPS * 32) {
        const int wanted = (int)up[linked ? i : key[i]];
        int node = wanted;
        if (!linked) {
            int low = 0, high = n;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (key[middle] < wanted) low = middle + 1; else high = middle;
            }
            node = wanted < 0 ? 0 : low + 1;
        }
        parent[i + 1] = node;
    }
    __syncthreads();

    const int row = blockIdx.x * WARPS + warp;
    if (row >= nodes) return;  // a whole warp, and no block-wide barrier follows
    unsigned* seen = bits[warp];
    for (int w = lane; w < (nodes + 31) / 32; w += 32) seen[w] = 0;
    __syncwarp();
    if (lane == 0) {
        int at = row, depth = 0;
        for (; at > 0; at = parent[at], depth++) seen[at / 32] |= 1u << (at % 32);
        seen[0] |= 1u;
        depths[tree * nodes + row] = depth;
    }
    __syncwarp();

    unsigned char* line = mask + (tree * nodes + row) * nodes;
    if (nodes % 16 == 0) {
        for (int c = lane * 16; c < nodes; c += 32 * 16) {
            const unsigned half = seen[c / 32] >> (c % 32);
            unsigned word[4];
            for (int w = 0; w < 4; w++) {
                const unsigned four = half >> (4 * w);
                word[w] = (four & 1) | (four & 2) << 7 | (four & 4) << 14 | (four & 8) << 21;
            }
            *(uint4*)(line + c) = make_uint4(word[0], word[1], word[2], word[3]);
        }
    } else {
        for (int c = lane; c < nodes; c += 32) line[c] = seen[c / 32] >> (c % 32) & 1;
    }

    const int own = parent[row];
    int child = -1, sibling = -1;
    for (int base = 0; base < nodes; base += 32) {
        const int c = base + lane;
        const bool drafted = c > 0 && c < nodes;
        const unsigned children = __ballot_sync(0xffffffffu, drafted && parent[c] == row);
        const unsigned siblings = __ballot_sync(0xffffffffu, drafted && c > row && parent[c] == own);
        if (child < 0 && children) child = base + __ffs(children) - 1;
        if (sibling < 0 && siblings) sibling = base + __ffs(siblings) - 1;
    }
    if (lane == 0) {
        parents[tree * nodes + row] = own;
        first_child[tree * nodes + row] = child;
        next_sibling[tree * nodes + row] = sibling;
    }
}
"""


def _nvrtc(library: Any, architecture: str) -> bytes:
    """SOURCE as a cubin for an architecture such as "sm_90"; RuntimeError holds the compiler's words."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"NVRTC refused the tree mask kernel with code {code}.")

    check(library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"tree_mask.cu", 0, None, None))
    if library.nvrtcCompileProgram(program, 1, options):
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(
            f"NVRTC could not compile the tree mask kernel: {log.value.decode(errors='replace')}"
        )
    check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    cubin = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetCUBIN(program, cubin))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


@lru_cache
def kernel(index: int) -> Any:
    """The compiled kernel on CUDA device `index`, callable as kernel(grid, block, args)."""
    # torch brings NVRTC and the launcher; both are private names there, and this is their only use
    from torch.cuda import _utils

    major, minor = torch.cuda.get_device_capability(index)
    with torch.cuda.device(index):
        cubin = _nvrtc(_utils._get_gpu_rtc_library(), f"sm_{major}{minor}")
        loaded: Any = _utils._cuda_load_module(cubin, [NAME])
    return loaded[NAME]


def _launch(kept: Tensor, up: Tensor, n: int, linked: bool) -> TreeTensors:
    nodes = n + 1
    if nodes > MAX_NODES:
        raise ValueError(f"a tree of {nodes} nodes is larger than the kernel's {MAX_NODES}.")
    out = empty(up.shape[0], nodes, up.device)
    grid = (-(-nodes // WARPS), up.shape[0], 1)
    index = up.device.index if up.device.index is not None else torch.cuda.current_device()
    arguments = [kept, up, *out, n, up.shape[1], int(linked)]
    kernel(index)(grid=grid, block=(WARPS * 32, 1, 1), args=arguments)
    return out


def from_parents(parents: Tensor) -> TreeTensors:
    """Trees from their parents, int64 [B, n] or [n] on a CUDA device (0 the root, parents[i] < i + 1)."""
    up = torch.atleast_2d(parents).contiguous()
    return squeezed(_launch(up, up, up.shape[1], True), parents.dim() == 1)


def from_selection(kept: Tensor, candidate_parents: Tensor) -> TreeTensors:
    """Trees from the selection: kept int64 [B, n] in ascending order, candidate_parents int64 [B, pool], -1 the root."""
    return _launch(kept.contiguous(), candidate_parents.contiguous(), kept.shape[1], False)
