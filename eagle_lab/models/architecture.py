"""What a target's class asks of attention and cache, and the proof that decoding here gives the class's own numbers.

Both are found by running the class, not by its name: `observe` records what each layer hands to its attention and to
its cache, and `prove` compares one small tree, verified over a cached prefix, with the class's own forward over whole
texts. What the kit can't serve becomes one sentence when the target is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from eagle_lab.models.cache import KeyValueCache
from eagle_lab.models.targets import cache_keyword, context_of, window_of
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.checks import first_line
from eagle_lab.runtime.swap import swapped

OBSERVER = "eagle_lab_observer"
# What a class may hand to its attention: the attentions that keep it, None = all.
# eager and sdpa are transformers' own; tree and tree_fused are the kit's.
KEPT_BY: dict[str, tuple[str, ...] | None] = {
    "softcap": ("eager",),  # scores capped by tanh, as in Gemma 2
    "s_aux": ("eager",),  # a sink: one more score in the softmax, as in gpt-oss
    "sliding_window": None,  # `Pair.masks` has it in the mask, and refuses attentions that take none
}
# handed on by transformers, and of no consequence for the numbers of one forward in eval mode
HARMLESS = {
    "scaling", "dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_router_logits",
    "output_hidden_states", "return_dict", "logits_to_keep",
}  # fmt: skip
PREFIX, BRANCH = 12, 3  # the proof's tokens
WINDOW = 4  # what the proof makes of a sliding window
# of a row's difference to its own size
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# of a target whose activations are rounded to 8 bits: SmolLM2 has 0.15, and 0.05 where the rest of it is float32
QUANTIZED_LIMIT = 0.4


@dataclass(frozen=True)
class Asks:
    """What a class hands to its attention.

    extras: names beyond query, key, value, mask and scale. interface: whether each layer attends once, through
    transformers' interface, where another attention can be put in.
    """

    extras: frozenset[str]
    interface: bool

    def lost_by(self, attention: str) -> list[str]:
        """The extras that an attention would drop; unknown ones are kept by `eager` alone, the class's own."""
        kept = {name: KEPT_BY.get(name, ("eager",)) for name in self.extras}
        return sorted(name for name, by in kept.items() if by is not None and attention not in by)


class Decoded(Protocol):
    """What the proof needs of a model pair, which lies above."""

    target: nn.Module
    dtype: torch.dtype
    window: int | None
    cache_keyword: str
    quantization: str

    @property
    def config(self) -> Any:
        """The target's text configuration."""

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty key/value cache for the target."""

    def masks(self, bias: Tensor | None, positions: Tensor, cache: KeyValueCache) -> Any:
        """The masks of the target's layers, from bias [B, 1, T, W] and positions [B, T]."""


@dataclass
class _Recorder:
    """In place of a cache: records what each layer would keep, as (kv_heads, key size, value size)."""

    kept: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    is_compileable = False

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.kept[layer_idx] = (key.shape[1], key.shape[3], value.shape[3])
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


_heard: list[frozenset[str]] = []  # one entry for each attention of the observed forward


def _observer(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **extras: Any
) -> tuple[Tensor, None]:
    asked = {name for name, given in extras.items() if given is not None and given is not False}
    _heard.append(frozenset(asked - HARMLESS))
    groups = query.shape[1] // key.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(OBSERVER, _observer)


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any class: whatever it raises is the reason
        if isinstance(error, AttributeError) and isinstance(error.obj, _Recorder):
            raise ValueError(
                f"the target ({name}) asks its cache for {error.name}, so its layers keep more than keys and values; the cache "
                "here holds only those."
            ) from None
        raise ValueError(
            f"the target ({name}) can't be decoded here: {type(error).__name__}: {first_line(error).rstrip('.')}."
        ) from error


@torch.inference_mode()
def observe(target: nn.Module) -> Asks:
    """What the target's class asks, by one forward over a few tokens in which each attention is replaced by a recorder.

    Raises ValueError for a class that keeps no keys and values of one size in every layer.
    """
    name, config, recorder = type(target).__name__, target.config.get_text_config(decoder=True), _Recorder()
    before, count = target.config._attn_implementation, config.num_hidden_layers
    _heard.clear()
    with _errors(name):
        try:
            target.set_attn_implementation(OBSERVER)
            ids = _ids(config.vocab_size, PREFIX)[None].to(target.get_input_embeddings().weight.device)
            target(input_ids=ids, use_cache=True, **{cache_keyword(target): recorder})
            heard = list(_heard)
        except ValueError as error:
            if "does not support setting its attention" not in str(error):
                raise
            heard = []
        finally:
            target.set_attn_implementation(before)
    if heard and len(recorder.kept) != count:
        raise ValueError(
            f"the target ({name}) keeps keys and values of {len(recorder.kept)} of its {count} layers, so layers share "
            "them or keep another state; the cache here holds those of each layer."
        )
    sizes = set(recorder.kept.values())
    if len(sizes) > 1 or any(key != value for _, key, value in sizes):
        raise ValueError(
            f"the target ({name}) has layers of unlike key and value sizes (heads, key, value: "
            f"{', '.join(map(str, sorted(sizes)))}); the cache here has one size for all."
        )
    return Asks(frozenset().union(*heard), len(heard) == count)


@torch.inference_mode()
def settle_window(target: nn.Module) -> None:
    """Take a sliding window that the class doesn't heed, such as Llama's, out of its config; found by running the class.

    Raises ValueError where a text could be longer than that window, since transformers reads it whole without the window
    and generates it with a cache that drops what lies beyond; and for a window below 2.
    """
    config, name = target.config.get_text_config(decoder=True), type(target).__name__
    window, context = window_of(config)[0], context_of(config)
    if window is None:
        return
    if window < 2:  # where transformers' own cache and mask part
        raise ValueError(
            f"the target ({name}) has a sliding_window of {window} tokens; it must be at least 2."
        )
    ids = _ids(config.vocab_size, PREFIX)[None].to(target.get_input_embeddings().weight.device)
    logits = []
    with _errors(name):
        for tried in (WINDOW, 2 * PREFIX):
            with swapped([(config, "sliding_window", tried)]):
                logits.append(target(input_ids=ids, use_cache=False).logits)
    if not torch.equal(*logits):
        return
    if window < context:
        raise ValueError(
            f"the target's config has a sliding_window of {window} tokens, which its class ({name}) doesn't heed: transformers "
            "reads a text without it and generates with a cache that drops what lies beyond it; take sliding_window out of "
            "its config.json if the target has none."
        )
    vars(config)["sliding_window"] = None  # some configs refuse None where it is set


@torch.inference_mode()
def prove(pair: Decoded) -> None:
    """Compare the target as decoding runs it with the class's own forward; ValueError, one sentence, where they differ.

    Decoding reads a prefix into the cache and verifies two branches in one forward; the class's own forward reads both
    texts whole. A sliding window is made short meanwhile, so that it counts. What this can't see is what begins with
    long texts only.
    """
    name, device = type(pair.target).__name__, pair.target.get_input_embeddings().weight.device
    ids = _ids(pair.config.vocab_size, PREFIX + 2 * BRANCH).to(device)
    prefix, branches = ids[:PREFIX], ids[PREFIX:].view(2, BRANCH)
    with _errors(name), _short_window(pair):
        own = pair.target(input_ids=torch.cat((prefix.expand(2, -1), branches), 1), use_cache=False).logits
        wanted = torch.cat((own[:1, :PREFIX], own[:, PREFIX:].reshape(1, -1, own.shape[-1])), 1)
        found = _as_decoded(pair, ids[None])
    if not bool(torch.isfinite(wanted).all()):
        raise ValueError(
            f"the target's logits aren't finite in {dtype_name(pair.dtype)}: its numbers leave the range of that dtype; load it with "
            "dtype='bfloat16' or dtype='float32', or get its files again if they aren't finite there either."
        )
    wanted, found = wanted[0].float(), found[0].to(wanted.device).float()
    size = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    off = (found - wanted).norm(dim=-1) / size
    # medians, as one row of a mixture of experts may take another expert by rounding alone
    difference = max(float(part.median()) for part in off.split([PREFIX, BRANCH, BRANCH]))
    if not difference <= (QUANTIZED_LIMIT if pair.quantization else LIMITS[pair.dtype]):
        raise ValueError(
            f"the target ({name}) gives other logits over a cached prefix and a tree than over whole texts (they differ by "
            f"{difference:.2g} of their size), so what is decoded here would not be its own."
        )


def _ids(vocabulary: int, count: int) -> Tensor:
    """Token ids int64 [count] that differ as far as the vocabulary allows; low ones, as images and the like are high."""
    last = min(vocabulary, 512)
    return torch.randint(min(3, last - 1), last, (count,), generator=torch.Generator().manual_seed(0))


def _as_decoded(pair: Decoded, ids: Tensor) -> Tensor:
    """Logits [1, PREFIX + 2 · BRANCH, V] of a prefix and, in a second forward, of two branches after it."""
    device, total = ids.device, PREFIX + 2 * BRANCH
    cache = pair.new_cache(1, total)
    row = torch.arange(total, device=device)
    branch = (row - PREFIX).div(BRANCH, rounding_mode="floor")
    sees = (row[None] <= row[:, None]) & ((row[None] < PREFIX) | (branch[None] == branch[:, None]))
    bias = torch.zeros(total, total, dtype=pair.dtype, device=device)
    bias = bias.masked_fill(~sees, torch.finfo(pair.dtype).min)[None, None]
    positions = torch.where(row < PREFIX, row, PREFIX + (row - PREFIX) % BRANCH)[None]
    found = []
    for rows, window in ((slice(0, PREFIX), PREFIX), (slice(PREFIX, total), total)):
        cache.set_slots(row[None, rows], window, rows.start)
        mask = pair.masks(bias[:, :, rows, :window], positions[:, rows], cache)
        # a prefill asks for the logits of some rows: here of all, backwards, so that a class that ignores it is seen
        kept = torch.arange(rows.stop - rows.start).flip(0)
        options = {
            "attention_mask": mask, "use_cache": True, "logits_to_keep": kept, pair.cache_keyword: cache,
        }  # fmt: skip
        out = pair.target(input_ids=ids[:, rows], position_ids=positions[:, rows], **options)
        found.append(out.logits.flip(1))
    return torch.cat(found, 1)


@contextmanager
def _short_window(pair: Decoded) -> Iterator[None]:
    # also where no layer is said to have the window: the class may heed it all the same
    windows = [(pair.config, "sliding_window"), (pair, "window")]
    with swapped(
        [(place, name, WINDOW) for place, name in windows if getattr(place, name, None) is not None]
    ):
        yield
