"""The tree mask in CUDA C++, compiled at run time by NVRTC: one launch writes the masks of a batch of trees.

A block has a tree and eight of its rows, a warp each. Each warp climbs from its row to the root, collects bits, and
spreads them to bytes, in whole 16-byte stores where a row's length allows. No atomics, no other state.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_NODES = 4096
WARPS = 8
NAME = "tree_mask"

SOURCE = r"""
#define MAX_NODES 4096
#define WARPS 8
typedef long long i64;

extern "C" __global__ void tree_mask(const i64* up, unsigned char* mask, int n)
{
    __shared__ int parent[MAX_NODES];
    __shared__ unsigned bits[WARPS][MAX_NODES / 32];
    const int nodes = n + 1, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const i64 tree = blockIdx.y;

    for (int i = thread; i < n; i += WARPS * 32) parent[i + 1] = (int)up[tree * n + i];
    __syncthreads();

    const int row = blockIdx.x * WARPS + warp;
    if (row >= nodes) return;  // a whole warp, and no block-wide barrier follows
    unsigned* seen = bits[warp];
    for (int w = lane; w < (nodes + 31) / 32; w += 32) seen[w] = 0;
    __syncwarp();
    if (lane == 0) {
        for (int at = row; at > 0; at = parent[at]) seen[at / 32] |= 1u << (at % 32);
        seen[0] |= 1u;
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
    # Torch brings NVRTC and the launcher; both are private names there, and this is their only use. Torch's own compile
    # step asks for the headers of a CUDA toolkit, which this kernel does without and few machines have.
    from torch.cuda import _utils

    major, minor = torch.cuda.get_device_capability(index)
    with torch.cuda.device(index):
        cubin = _nvrtc(_utils._get_gpu_rtc_library(), f"sm_{major}{minor}")
        loaded: Any = _utils._cuda_load_module(cubin, [NAME])
    return loaded[NAME]


def tree_mask(parents: Tensor) -> Tensor:
    """Masks bool [B, n + 1, n + 1] of trees, parents int64 [B, n] on a CUDA device (0 the root, parents[i] < i + 1).

    Raises ValueError for a tree that is larger than the kernel's limit.
    """
    nodes, device = parents.shape[1] + 1, parents.device
    if nodes > MAX_NODES:
        raise ValueError(f"a tree of {nodes} nodes is larger than the kernel's {MAX_NODES}.")
    mask = torch.empty(len(parents), nodes, nodes, dtype=torch.bool, device=device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    grid = (-(-nodes // WARPS), len(parents), 1)
    kernel(index)(grid=grid, block=(WARPS * 32, 1, 1), args=[parents.contiguous(), mask, nodes - 1])
    return mask
