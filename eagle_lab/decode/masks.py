"""Ways to build the tree mask, all equal to `rebuild`.

A builder is a plain function `parents (int64 [n], parents[i] < i + 1 is the parent of node i + 1) → bool
[n + 1, n + 1]` on the parents' device; row i marks what node i may attend to among the tree's nodes: itself and
all its ancestors. `rebuild` is the definition (the official implementation's loop); the rest are its variants.
Marks a builder may carry: `batched`, it takes int64 [B, n] at once; `levelled`, it takes `levels`, a bound on the
depth that the caller knows, so that nothing is read back from the device; `host`, whether it reads values on the host.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eagle_lab.runtime.needs import Needs, missing

MaskBuilder = Callable[..., Tensor]
WORD = 64  # nodes that fit one machine word
LITTLE = sys.byteorder == "little"


def _marked(**marks: bool) -> Callable[[MaskBuilder], MaskBuilder]:
    def add(build: MaskBuilder) -> MaskBuilder:
        build.__dict__.update(marks)
        return build

    return add


@_marked(host=True)
def rebuild(parents: Tensor) -> Tensor:
    """The baseline: identity and root column, then each row ORs its parent's, in a host loop; then to the device."""
    links = parents.tolist()
    mask = torch.eye(len(links) + 1, dtype=torch.bool)
    mask[:, 0] = True
    for i, parent in enumerate(links):
        mask[i + 1].logical_or_(mask[parent])
    return mask.to(parents.device)


@_marked(host=True)
def incremental(parents: Tensor) -> Tensor:
    """The original investigation's idea: a device buffer, filled node by node from a clone of the parent's row."""
    links = parents.tolist()
    mask = torch.zeros(len(links) + 1, len(links) + 1, dtype=torch.bool, device=parents.device)
    mask[0, 0] = True
    for i, parent in enumerate(links):
        row = mask[parent].clone()
        row[i + 1] = True
        mask[i + 1] = row
    return mask


@_marked(host=True)
def incremental_inplace(parents: Tensor) -> Tensor:
    """`incremental` without the clone: the parent's row is copied straight into the buffer."""
    links = parents.tolist()
    mask = torch.zeros(len(links) + 1, len(links) + 1, dtype=torch.bool, device=parents.device)
    mask[0, 0] = True
    for i, parent in enumerate(links):
        mask[i + 1].copy_(mask[parent])
        mask[i + 1, i + 1] = True
    return mask


@_marked(batched=True, levelled=True, host=False)
def doubling(parents: Tensor, levels: int | None = None) -> Tensor:
    """Pointer doubling on the device: after step s a row holds its 2^s - 1 nearest ancestors; log2 of the depth steps."""
    nodes = parents.shape[-1] + 1
    jump = torch.cat((torch.zeros_like(parents[..., :1]), parents), -1).reshape(-1, nodes)
    # rows of all trees, one below another
    jump = (jump + torch.arange(jump.shape[0], device=jump.device)[:, None] * nodes).flatten()
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(jump.shape[0] // nodes, 1)
    for _ in range(min(nodes - 1, nodes if levels is None else levels).bit_length()):
        mask = mask | mask.index_select(0, jump)
        jump = jump.index_select(0, jump)
    return mask.view(*parents.shape[:-1], nodes, nodes)


@_marked(batched=True, levelled=True, host=False)
def walk(parents: Tensor, levels: int | None = None) -> Tensor:
    """Ancestor walk on the device: gather the parents' parents once a level, then one scatter of all that was met.

    Without `levels` it asks the device after each gather whether any node is still below the root.
    """
    jump = torch.cat((torch.zeros_like(parents[..., :1]), parents), -1)
    met = [torch.arange(jump.shape[-1], device=jump.device).expand_as(jump), jump]
    while len(met) <= levels if levels is not None else bool(met[-1].any()):
        met.append(jump.gather(-1, met[-1]))
    mask = torch.zeros(*jump.shape, jump.shape[-1], dtype=torch.bool, device=jump.device)
    return mask.scatter_(-1, torch.stack(met, -1), True)


@_marked(host=True)
def carried(parents: Tensor) -> Tensor:
    """The mask as an expansion would carry it along, replayed from the finished tree: each level gathers its parents' rows."""
    nodes = parents.shape[0] + 1
    jump = torch.cat((parents.new_zeros(1), parents))
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device)
    reached = torch.zeros(nodes, dtype=torch.bool, device=parents.device)
    reached[0] = True
    while not bool(reached.all()):
        level = (reached[jump] & ~reached).nonzero()[:, 0]
        mask[level] |= mask[jump[level]]
        reached[level] = True
    return mask


@_marked(host=True)
def bitpacked(parents: Tensor) -> Tensor:
    """Rows as the bits of whole numbers on the host, machine words up to 64 nodes; unpacked once at the end."""
    links = parents.tolist()
    nodes = len(links) + 1
    rows, bit = [1], 2
    for parent in links:
        rows.append(rows[parent] | bit)
        bit <<= 1
    width = 8 if nodes <= WORD else (nodes + 7) // 8
    in_words = nodes <= WORD and LITTLE
    packed = array("Q", rows) if in_words else b"".join([row.to_bytes(width, "little") for row in rows])
    bits = np.frombuffer(packed, np.uint8).reshape(nodes, width)
    mask = np.unpackbits(bits, axis=1, count=nodes, bitorder="little")
    return torch.from_numpy(mask.view(np.bool_)).to(parents.device)


@_marked(host=True)
def host_walk(parents: Tensor) -> Tensor:
    """The ancestor walk in numpy on the host: a scatter a level, of the rows that have not reached the root yet."""
    nodes = parents.shape[0] + 1
    up = np.zeros(nodes, np.int64)
    up[1:] = parents.numpy(force=True)
    flat = np.zeros(nodes * nodes, np.bool_)
    flat[:: nodes + 1] = True
    flat[::nodes] = True
    node, start = up, np.arange(0, nodes * nodes, nodes)
    while len(left := node.nonzero()[0]):
        node, start = node.take(left), start.take(left)
        flat[start + node] = True
        node = up.take(node)
    return torch.from_numpy(flat).view(nodes, nodes).to(parents.device)


@_marked(batched=True, host=False)
def triton(parents: Tensor) -> Tensor:
    """`kernels.triton_mask`: a Triton kernel, one launch for all trees."""
    _check("triton", parents.device)
    from eagle_lab.runtime.kernels import triton_mask

    return _flat(triton_mask.tree_mask, parents)


@_marked(batched=True, host=False)
def cuda(parents: Tensor) -> Tensor:
    """`kernels.cuda_mask`: CUDA C++ compiled at run time, one launch for all trees."""
    _check("cuda", parents.device)
    from eagle_lab.runtime.kernels import cuda_mask

    return _flat(cuda_mask.tree_mask, parents)


def _check(name: str, device: torch.device) -> None:
    if reason := missing(f"mask={name}", NEEDS[name], device):
        raise ValueError(f"{reason}.")


def _flat(build: MaskBuilder, parents: Tensor) -> Tensor:
    # the kernels take trees [B, n]; a builder also takes one [n]
    return build(parents) if parents.dim() > 1 else build(parents[None])[0]


MASK_BUILDERS: dict[str, MaskBuilder] = {
    "rebuild": rebuild,
    "incremental": incremental,
    "incremental_inplace": incremental_inplace,
    "doubling": doubling,
    "walk": walk,
    "carried": carried,
    "bitpacked": bitpacked,
    "host_walk": host_walk,
    "triton": triton,
    "cuda": cuda,
}


NEEDS: dict[str, Needs] = {
    "triton": Needs(device="cuda", package="triton", interpreter=True),
    "cuda": Needs(device="cuda"),
}
OWN = frozenset(MASK_BUILDERS)  # the kit's; a reader's builder can't take one's place unseen


def mask_builder(name: str) -> Callable[[MaskBuilder], MaskBuilder]:
    """Decorator that adds a builder under a name, also one written in a notebook cell; the same name again replaces it.

    Raises ValueError for a name that is the kit's own or can't be written in a strategy, and where the name is left out.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(
            f'a mask builder needs a name of letters, digits and _, as in @mask_builder("mine"), not {name!r}.'
        )
    if name in OWN:
        raise ValueError(f"mask builder {name!r} is the kit's own; give yours another name.")

    def add(build: MaskBuilder) -> MaskBuilder:
        MASK_BUILDERS[name] = build
        return build

    return add


def build_all(build: MaskBuilder, parents: Tensor, levels: int | None = None) -> Tensor:
    """Masks [B, n + 1, n + 1] of a batch of trees, parents int64 [B, n]; a builder marked `batched` takes them at once.

    `levels` bounds the trees' depth where the caller knows it; builders marked `levelled` are told.
    """
    told = {"levels": levels} if levels is not None and getattr(build, "levelled", False) else {}
    if getattr(build, "batched", False):
        return build(parents, **told)
    if len(parents) == 1:
        return build(parents[0], **told)[None]  # stacking one would copy it
    return torch.stack([build(row, **told) for row in parents])


def own(build: MaskBuilder) -> bool:
    """Whether a builder is the reader's own, not one of this package's."""
    return not str(getattr(build, "__module__", "")).startswith("eagle_lab.")
