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
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from eagle_lab.runtime import kernels

MaskBuilder = Callable[..., Tensor]
WORD = 64  # nodes that fit one machine word
LITTLE = sys.byteorder == "little"


def _marked(**marks: bool) -> Callable[[MaskBuilder], MaskBuilder]:
    def add(build: MaskBuilder) -> MaskBuilder:
        build.__dict__.update(marks)
        return build

    return add


def rebuild(parents: Tensor) -> Tensor:
    """The baseline: identity and root column, then each row ORs its parent's, in a host loop; then to the device."""
    links = parents.tolist()
    mask = torch.eye(len(links) + 1, dtype=torch.bool)
    mask[:, 0] = True
    for i, parent in enumerate(links):
        mask[i + 1].logical_or_(mask[parent])
    return mask.to(parents.device)


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
    jump = (
        jump + torch.arange(jump.shape[0], device=jump.device)[:, None] * nodes
    )  # rows of all trees, one below another
    jump = jump.flatten()
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
    """The mask carried along the expansion, replayed from the finished tree: each level gathers its parents' rows.

    The real thing, inside a decode, needs no finished tree: `carried_selection`.
    """
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
    if nodes <= WORD:
        packed = array("Q", rows) if LITTLE else b"".join(row.to_bytes(8, "little") for row in rows)
    else:
        packed = b"".join([row.to_bytes(width, "little") for row in rows])
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
    """`kernels.triton_mask`: mask, depths and links in one launch; of these only the mask here."""
    _need("triton", parents.device)
    from eagle_lab.runtime.kernels import triton_mask

    return triton_mask.from_parents(parents).mask


@_marked(batched=True, host=False)
def cuda(parents: Tensor) -> Tensor:
    """`kernels.cuda_mask`: CUDA C++ compiled at run time; mask, depths and links in one launch."""
    _need("cuda", parents.device)
    from eagle_lab.runtime.kernels import cuda_mask

    return cuda_mask.from_parents(parents).mask


def carried_selection(kept: Tensor, candidate_parents: Tensor, top_k: int) -> Tensor:
    """The mask carried along the expansion, from the selection's raw output; nothing is read on the host.

    Args: kept int64 [B, n], candidate indices in order; candidate_parents int64 [B, top_k + depth · top_k²], -1 for
    the root; top_k, children of each frontier node. Returns bool [B, n + 1, n + 1].
    The frontier's rows over the frontier's slots (top_k a step) are what decoding carries as `seen`; here they are
    replayed from the candidates: those of step s are the children of the frontier of step s - 1.
    """
    trees, nodes, device = kept.shape[0], kept.shape[1] + 1, kept.device
    frontier = candidate_parents[
        :, top_k::top_k
    ].contiguous()  # candidate index of each slot: its children record it as parent
    slots = frontier.shape[1]
    rows = torch.eye(slots, dtype=torch.bool, device=device).repeat(trees, 1, 1)
    parent_slot = (frontier - top_k).div(top_k, rounding_mode="floor")
    for at in range(top_k, slots, top_k):
        above = parent_slot[:, at : at + top_k, None].expand(-1, -1, slots)
        rows[:, at : at + top_k] |= rows.gather(1, above)
    # select rows: a kept candidate sees what its parent's slot sees; the children of the root see no slot
    slot = (kept - top_k).div(top_k, rounding_mode="floor")
    chosen = rows.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, slots)) & (slot >= 0)[..., None]
    # select columns: each slot's node; a slot that was not kept has no kept children, so its column is empty
    node = torch.searchsorted(kept, frontier).clamp(max=nodes - 2)
    hit = kept.gather(1, node) == frontier
    place = torch.where(hit, node + 1, nodes)
    wide = torch.zeros(trees, nodes, nodes + 1, dtype=torch.bool, device=device)
    wide[:, 1:].scatter_(2, place[:, None].expand(-1, nodes - 1, -1), chosen)
    return wide[..., :nodes] | torch.eye(nodes, dtype=torch.bool, device=device) | _root_column(nodes, device)


def _root_column(nodes: int, device: torch.device) -> Tensor:
    return torch.arange(nodes, device=device) == 0


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


def unavailable(name: str, device: torch.device | str = "cpu") -> str | None:
    """Why a builder cannot run on a device, in one sentence without its full stop; None where it can."""
    where = torch.device(device).type
    if name == "triton":
        if find_spec("triton") is None:
            return "mask=triton needs the package triton, which is not installed"
        if where != "cuda" and not kernels.interpreted():
            return f"mask=triton needs a CUDA device, not {where} (set TRITON_INTERPRET=1 to run Triton's interpreter)"
    if name == "cuda" and where != "cuda":
        return f"mask=cuda needs a CUDA device, not {where}"
    return None


def _need(name: str, device: torch.device) -> None:
    reason = unavailable(name, device)
    if reason:
        raise ValueError(f"{reason}.")


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
