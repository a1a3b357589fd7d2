"""How a forward attends: over one masked window, or over the prefix without a mask and the tree with one.

`Visibility` says who sees what in a forward, the target's or the head's. Three ways to use it give the same numbers up
to rounding: `eager` (scores, softmax, values: the definition), `sdpa` (PyTorch's fused attention under one additive
mask over everything) and `tree`: the prefix, which every node sees whole, needs no mask, so its keys are read once
for all heads of a group; the tree, a few dozen keys, has the mask; the two parts are joined by their log-sum-exp
(Dao et al., arXiv 2205.14135, section 3.1; Hydragen, arXiv 2402.05099, does the same for shared prefixes).
`tree_fused` is `tree` as one Triton kernel and a join; it needs a CUDA GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from eagle_lab.models.cache import BOUND, write_rows


@dataclass(frozen=True)
class Visibility:
    """Who sees what in one forward of n rows: all of the prefix, and of the m slots after it what `mask` marks.

    mask bool (int8 for tree_fused) [B, n, m]; length int64 [B], each row's prefix; limit, an upper bound of `length`
    that the host knows; exact, whether every length *is* the limit; bias [B, 1, n, window] or None, the same as one additive mask.
    """

    mask: Tensor
    length: Tensor
    limit: int
    exact: bool
    bias: Tensor | None


def visibility(
    name: str, mask: Tensor, length: Tensor, limit: int, exact: bool, window: int, dtype: torch.dtype
) -> Visibility:
    """The visibility of a forward by attention `name`; the additive mask is made once, and only where it will be read.

    Args: as for `Visibility`: mask bool [B, n, m], length int64 [B].
    """
    bias = None if name in SPLIT else attention_bias(tree_visibility(mask, length, window), dtype)
    if name == "tree_fused":
        mask = mask.to(torch.int8)  # what its kernel reads; once for all layers
    return Visibility(mask, length, limit, exact, bias)


def tree_visibility(mask: Tensor, length: Tensor, window: int) -> Tensor:
    """Who sees which slot: the whole prefix, and the tree by its mask.

    Args: mask bool [B, n, m] over the m slots that follow the prefix, length int64 [B], window slots in all.
    Returns: bool [B, n, window].
    """
    rows, _, columns = mask.shape
    offset = torch.arange(window, device=mask.device) - length[:, None]
    inside = (offset >= 0) & (offset < columns)
    tree = mask.gather(2, offset.clamp(0, columns - 1)[:, None].expand(rows, mask.shape[1], window))
    return (offset < 0)[:, None] | (tree & inside[:, None])


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, n, window]: 0 where visible, the lowest number elsewhere."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    # [B, heads, n, d] → [B, kv_heads, group · n, d]: the heads that share keys lie next to each other
    rows, _, _, size = query.shape
    return query.reshape(rows, kv_heads, -1, size)


def eager(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, scale: float) -> Tensor:
    """The definition. Args: query [B, heads, n, d], key and value [B, kv_heads, S, d]. Returns: the query's shape."""
    assert seen.bias is not None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale + seen.bias[..., : key.shape[2]]
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, scale: float) -> Tensor:
    """PyTorch's fused attention; heads of a group are stacked as rows, as its fast kernels take no mask with groups.

    Query [B, heads, n, d], key and value [B, kv_heads, S, d].
    """
    assert seen.bias is not None
    groups = query.shape[1] // key.shape[1]
    bias = seen.bias[..., : key.shape[2]].repeat(1, 1, groups, 1)
    mixed = scaled_dot_product_attention(_grouped(query, key.shape[1]), key, value, bias, scale=scale)
    return mixed.reshape(query.shape)  # on CUDA its layout may follow the query's


def _part(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: values float32 [B, kv, rows, d] and the log of the sum they were divided by."""
    scores = (query @ key.transpose(2, 3)).float() * scale
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(-1, keepdim=True)
    return ((scores - total).exp().to(value.dtype) @ value).float(), total


def tree(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, scale: float) -> Tensor:
    """Prefix without a mask and tree with one, joined by their log-sum-exp.

    Query [B, heads, n, d], key and value [B, kv_heads, S, d].
    """
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    grouped = _grouped(query, kv_heads)
    lowest = torch.finfo(torch.float32).min
    if seen.exact:  # then the tree's slots are a plain slice
        tree_key, tree_value = key[:, :, seen.limit :], value[:, :, seen.limit :]
        mask = seen.mask[..., : tree_key.shape[2]]
        tree_key, tree_value = tree_key[:, :, : mask.shape[2]], tree_value[:, :, : mask.shape[2]]
    else:
        mask = seen.mask
        slots = seen.length[:, None] + torch.arange(mask.shape[2], device=mask.device)
        # a visibility that has more columns than the window has slots left would have asked for a wider window
        index = slots[:, None, :, None].expand(-1, kv_heads, -1, key.shape[3])
        tree_key, tree_value = key.gather(2, index), value.gather(2, index)
    bias = (
        torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest).repeat(1, groups, 1)[:, None]
    )
    low, low_total = _part(grouped, tree_key, tree_value, bias, scale)
    if seen.limit:
        beyond = None
        if not seen.exact:
            past = torch.arange(seen.limit, device=mask.device) >= seen.length[:, None]
            beyond = torch.zeros(past.shape, device=mask.device).masked_fill_(past, lowest)[:, None, None]
        high, high_total = _part(grouped, key[:, :, : seen.limit], value[:, :, : seen.limit], beyond, scale)
        weight = (low_total - high_total).sigmoid()  # e^low / (e^low + e^high)
        low = low * weight + high * (1 - weight)
    return low.to(query.dtype).reshape(query.shape)


def tree_fused(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, scale: float) -> Tensor:
    """`tree` by a Triton kernel on a CUDA GPU.

    Query [B, heads, n, d], key and value [B, kv_heads, S, d].
    """
    from eagle_lab.runtime.kernels.tree_attention import tree_attention

    return tree_attention(query, key, value, seen.length, seen.mask, scale)


Attention = Callable[[Tensor, Tensor, Tensor, Visibility, float], Tensor]
ATTENTIONS: dict[str, Attention] = {"sdpa": sdpa, "eager": eager, "tree": tree, "tree_fused": tree_fused}
SPLIT = ("tree", "tree_fused")  # these read the visibility itself; the others its additive mask
# its time follows the text, so that a wide window costs nothing: one of so many slots is enough, and one for longer texts,
# which another kernel reads
BY_TEXT = {"tree_fused": 1024}


def _registered(attend: Attention, name: str) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        seen = kwargs.get("visibility")
        if seen is None:
            raise ValueError(
                f"attention {name!r} needs the visibility that eagle_lab's decoding passes; for other calls of this model "
                "use set_attn_implementation('sdpa')."
            )
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if "slots" in kwargs:  # a cache that is bound to the modules
            keys, values = getattr(module, BOUND)
            key, value = write_rows(keys, values, kwargs["slots"], key, value, kwargs["window"])
        return attend(query, key, value, seen, scale).transpose(1, 2).contiguous(), None

    return forward


for _name in SPLIT:  # transformers' own `eager` and `sdpa` serve the target under those names
    AttentionInterface.register(_name, _registered(ATTENTIONS[_name], _name))
