"""Target and draft head → `Pair`: checked before gigabytes are read, then loaded and described."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagle_lab import ROOT
from eagle_lab.models import dialects, shapes, targets
from eagle_lab.models.cache import KeyValueCache
from eagle_lab.models.checkpoints import check_draft, draft_bytes, load_draft, read_draft_json
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.shapes import SHAPES
from eagle_lab.models.targets import (
    DEFAULT_TARGET,
    DTYPES,
    amount,
    best_device,
    check_device,
    check_dtype,
    embedded_target,
)
from eagle_lab.runtime.projections import lay_together

__all__ = [
    "DATA", "DEFAULT_DRAFT", "DEFAULT_TARGET", "DTYPES", "SHAPES", "Pair", "best_device", "check_device", "check_dtype",
    "embedded_target", "load", "shape_pair",
]  # fmt: skip

DATA: Path = ROOT / "data"
DEFAULT_DRAFT = DATA / "draft-smollm2-135m"
SHAPE = "shape:"  # load(target="shape:NAME") gives random weights of published sizes
PLANNED_TOKENS = 4096  # context that the memory estimate makes room for


@dataclass
class Pair:
    """A target, its draft head and what decoding needs of them.

    device: where the target's last layer, its logits and the head are. `tapped` holds the inputs of the tapped layers
    [B, T, H] of the target's latest forward. `facts` is what `describe` prints. `origin` has the arguments of `load`
    that give the same pair in a fresh process; it is empty for a pair put together by hand. `needed`: bytes that it takes.
    """

    target: nn.Module
    head: DraftHead
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    target_name: str
    draft_name: str
    tapped: dict[int, Tensor] = field(default_factory=dict)
    machines: dict[Any, list[Any]] = field(
        default_factory=dict, repr=False
    )  # prepared cycles, kept by decoding
    readers: dict[Any, Any] = field(
        default_factory=dict, repr=False
    )  # captured readings of prompts, likewise
    facts: dict[str, str] = field(default_factory=dict, repr=False)
    origin: dict[str, Any] = field(default_factory=dict, repr=False)
    needed: int = 0

    def __post_init__(self) -> None:
        layers = self.target.get_decoder().layers
        self.window, self.sliding = targets.window_of(self.config)
        self.cache_keyword = targets.cache_keyword(self.target)

        def keep(index: int):  # type: ignore[no-untyped-def]
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.tapped[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        for index in dict.fromkeys(self.head.config.taps):
            layers[index].register_forward_pre_hook(keep(index), with_kwargs=True)

    @property
    def config(self) -> Any:
        """The target's text configuration."""
        return self.target.config.get_text_config()

    @property
    def context(self) -> int:
        """Positions that the target was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def eos(self) -> frozenset[int]:
        """End-of-sequence ids; many configurations list several."""
        ids = getattr(self.target.generation_config, "eos_token_id", None)
        if ids is None:
            ids = self.config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty key/value cache for the target, each layer's part on that layer's device.

        Under tensor parallelism a process has its own share of the key/value heads only.
        """
        c = self.config
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        layers = self.target.get_decoder().layers
        devices = [next(layer.parameters()).device for layer in layers]
        heads = c.num_key_value_heads
        weight = getattr(getattr(layers[0].self_attn, "k_proj", None), "weight", None)
        if weight is not None and hasattr(weight, "to_local"):
            heads = weight.to_local().shape[0] // size
        return KeyValueCache(devices, batch, heads, capacity, size, self.dtype)

    def new_head_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty key/value cache for the draft head, in place."""
        c = self.head.config
        return KeyValueCache([self.device], batch, c.num_key_value_heads, capacity, c.head_size, self.dtype)

    def check_attention(self, name: str) -> None:
        """ValueError where transformers' class of the target has not the attention `name`."""
        if name == "sdpa" and not getattr(self.target, "_supports_sdpa", True):
            raise ValueError(
                f"{type(self.target).__name__} has no attention=sdpa in transformers; use the strategy attention=eager."
            )

    def masks(self, bias: Tensor | None, positions: Tensor, cache: KeyValueCache) -> Any:
        """The attention mask that the target's forward takes: one for all layers, or one for each kind of layer.

        Args: bias [B, 1, T, W], additive, over the cache's first W slots; positions int64 [B, T] of the rows at
        `cache.slots`. A sliding window of w lets a row see the positions within w - 1 before its own. Raises ValueError
        for an attention that takes no mask (bias None) on a target with a sliding window.
        """
        if self.window is None:
            return bias
        if bias is None:
            raise ValueError(
                f"this target's sliding window of {self.window} tokens needs an attention that takes a mask; "
                "use attention=sdpa or attention=eager."
            )
        if cache.capacity <= self.window:
            return bias  # nothing can be that far away
        assert cache.slots is not None
        rows, columns = positions.shape[0], bias.shape[-1]
        # a slot of the prefix holds its own position; this forward's rows hold theirs
        held = (
            torch.arange(columns, device=bias.device).expand(rows, columns).scatter(1, cache.slots, positions)
        )
        far = positions[:, :, None] - held[:, None] >= self.window
        near = bias.masked_fill(far[:, None], torch.finfo(bias.dtype).min)
        return near if all(self.sliding) else {"full_attention": bias, "sliding_attention": near}

    def describe(self) -> str:
        """What was loaded, as a short table."""
        width = max(map(len, self.facts), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.facts.items())


def shape_pair(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Pair:
    """A pair of a shape of `SHAPES` with random weights made on the device."""
    target, head = shapes.build_shape(name, device, dtype, seed)
    _lay_out(target, head, device)
    return Pair(target, head, None, device, dtype, SHAPE + name, SHAPE + name)


def load(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    device_map: Any = None,
    tp_plan: str | None = None,
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> Pair:
    """Load a target and its EAGLE-3 head.

    Args: target, draft: hub names or local folders, None = the embedded default pair; "shape:NAME" = random weights of
    a published size; device: None = the best one; dtype: None = bfloat16 on CUDA, float32 elsewhere; device_map:
    "auto" spreads the target over several GPUs (accelerate); tp_plan: "auto" splits it among the processes of
    `torchrun`; trust_remote_code: run Python code that a checkpoint brings; verbose: print what was found, to stderr.
    Raises: ValueError and FileNotFoundError, one sentence each, before any weights are read where possible.
    """
    for name, given in (("target", target), ("draft", draft)):
        if given is not None and not isinstance(given, str | Path):
            raise ValueError(f"{name} is {given!r}; it must be a hub name or a local folder.")
    place = check_device(device)
    kind = check_dtype(dtype, place)
    if device_map is not None and tp_plan is not None:
        raise ValueError("device_map and tp_plan are two ways to spread a target; give one of them.")
    if tp_plan is not None:
        place = _process_device(place)
    if target is not None and str(target).startswith(SHAPE):
        return _load_shape(str(target).removeprefix(SHAPE), draft, place, kind, verbose)
    if draft is None:
        if target is not None and str(target) != DEFAULT_TARGET:
            raise ValueError(
                f"target {str(target)!r} needs a draft head: name its folder or hub name as draft."
            )
        draft = DEFAULT_DRAFT
    folder = targets.find_draft(draft, only_config=True)
    dialects.recognise(read_draft_json(folder))
    where = targets.find_target(target)
    whole = targets.read_target_config(where, trust_remote_code)
    config = whole.get_text_config(decoder=True)
    dialects.read(
        read_draft_json(folder), config.num_hidden_layers
    )  # its config's faults, before its weights come
    folder = targets.find_draft(draft)
    head_config = check_draft(folder, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    spread = device_map is not None or tp_plan is not None
    needed = (
        targets.target_bytes(where, whole, kind, trust_remote_code) // (_processes() if tp_plan else 1)
        + draft_bytes(head_config, kind)
        + cache_bytes(config, kind)
    )
    free = targets.free_bytes(place, every=device_map is not None)
    targets.check_fit(needed, free, place, kind, spread)
    model = targets.load_target(where, place, kind, device_map, tp_plan, trust_remote_code)
    last = _last_device(model)
    head = load_draft(
        folder, config.num_hidden_layers, _embedding_at(model, last), model.get_output_embeddings()
    )
    head = head.to(device=last, dtype=kind).eval().requires_grad_(False)
    _lay_out(model, head, place)
    tokenizer = targets.load_tokenizer(where, trust_remote_code)
    pair = Pair(model, head, tokenizer, last, kind, str(target or DEFAULT_TARGET), str(draft))
    pair.facts = _facts(pair, dialects.recognise(read_draft_json(folder)), needed, free, spread)
    pair.origin = {
        "target": pair.target_name, "draft": pair.draft_name, "device": str(place), "dtype": kind,
        "device_map": device_map, "tp_plan": tp_plan, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    pair.needed = needed
    if verbose and _rank() == 0:
        print(pair.describe(), file=sys.stderr)  # not to stdout: what is free differs from run to run
    return pair


def _load_shape(name: str, draft: object, place: torch.device, kind: torch.dtype, verbose: bool) -> Pair:
    if draft is not None:
        raise ValueError(
            f"target {SHAPE + name!r} has random weights and brings its own head; leave draft out."
        )
    config = shapes.shape_config(name)
    head_config = shapes.draft_config(name)
    needed = (
        targets.target_bytes(name, config, kind) + draft_bytes(head_config, kind) + cache_bytes(config, kind)
    )
    free = targets.free_bytes(place)
    targets.check_fit(needed, free, place, kind, False)
    pair = shape_pair(name, place, kind)
    pair.facts = _facts(pair, "none: random weights", needed, free, False)
    pair.origin, pair.needed = {"target": SHAPE + name, "device": str(place), "dtype": kind}, needed
    if verbose:
        print(pair.describe(), file=sys.stderr)
    return pair


def _lay_out(target: nn.Module, head: nn.Module, place: torch.device) -> None:
    # before any CUDA graph can hold the weights' addresses
    if place.type == "cuda":
        lay_together(target.get_decoder())
        lay_together(head)
        torch.cuda.empty_cache()  # what the weights took before is free for others


def inside(name: str) -> str:
    """A folder of the project relative to it, so that it reads the same on every machine; other names as they are."""
    return str(Path(name).relative_to(DATA.parent)) if Path(name).is_relative_to(DATA.parent) else name


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the target's keys and values for the context that is planned for."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = min(PLANNED_TOKENS, config.max_position_embeddings)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * tokens * dtype.itemsize


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _processes() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _process_device(place: torch.device) -> torch.device:
    """Each process of `torchrun` has its own GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if place.type == "cuda" else place


def _last_device(model: nn.Module) -> torch.device:
    return next(model.get_decoder().layers[-1].parameters()).device


def _embedding_at(model: nn.Module, device: torch.device) -> nn.Module:
    """The target's embeddings, copied to the last layer's device where they lie on another: a draft needs them there."""
    embedding = model.get_input_embeddings()
    if embedding.weight.device == device:
        return embedding
    return nn.Embedding.from_pretrained(embedding.weight.detach().to(device), freeze=True)


def _facts(pair: Pair, dialect: str, needed: int, free: int, spread: bool) -> dict[str, str]:
    c, h = pair.config, pair.head.config
    sizes = f"{c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} heads ({c.num_key_value_heads} kv)"
    words = f"draft vocabulary {h.draft_vocab_size}" if h.mapped else "the target's vocabulary"
    own = ", own embeddings" if h.own_embeddings else ""
    window = f", sliding window {pair.window}" if pair.window else ""
    places = sorted({str(next(layer.parameters()).device) for layer in pair.target.get_decoder().layers})
    where = ", ".join(places) + (f"; head on {pair.device}" if len(places) > 1 else "")
    if _processes() > 1 and spread:
        where += f", {_processes()} processes"
    names = [inside(pair.target_name), inside(pair.draft_name)]
    return {
        "target": f"{names[0]} ({type(pair.target).__name__})",
        "sizes": f"{sizes}, vocabulary {c.vocab_size}, context {pair.context}{window}",
        "draft": f"{names[1]} (dialect: {dialect})",
        "head": f"hidden {h.hidden_size}, {words}, RoPE base {h.rope['rope_theta']:g}{own}",
        "taps": f"inputs of layers {', '.join(map(str, h.taps))}",
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": where,
        "memory": f"{amount(needed)} needed, {amount(free)} were free",
    }
