"""`load`: a target and its draft head, checked before gigabytes are read; the model pair, and the facts about it."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagle_lab import ROOT
from eagle_lab.models import dialects, parallel, shapes, targets
from eagle_lab.models.architecture import Asks, observe, prove, settle_window
from eagle_lab.models.cache import KeyValueCache, text_bytes
from eagle_lab.models.checkpoints import check_draft, draft_bytes, load_draft, read_draft_json
from eagle_lab.models.draft import DraftConfig, DraftHead, listen
from eagle_lab.models.targets import (
    DEFAULT_TARGET,
    check_device,
    check_dtype,
    check_quantization,
    format_bytes,
)
from eagle_lab.models.weights import check_finite, dtype_name, own_part
from eagle_lab.runtime.kernels.float8 import quantize
from eagle_lab.runtime.projections import Place, fuse_in_memory, in_8_bits, lone

DEFAULT_DRAFT = ROOT / "data" / "draft-smollm2-135m"
SHAPE = "shape:"  # load(target="shape:NAME") gives random weights of published sizes
PLANNED_TOKENS = 4096  # context that the memory estimate makes room for


@dataclass(frozen=True)
class Facts:
    """What `load` found.

    `taps` are the target's layers whose inputs the head reads, `layers` = the final norm's; `tap_source` is what the head's
    config gives: layers' inputs or outputs, or nothing, so that the taps are assumed. `switches` are the head's that are
    on. `window` is the sliding window in tokens, None without one. `context` is what can be decoded, `full_context` what
    the config says. `attention` is the target's as loaded; `lost_by_tree` is what it asks for and the kit's own
    attentions would drop. `dialect` is None for random weights.
    `needed_bytes` covers the weights of both models and a text of `PLANNED_TOKENS` tokens. `context_bytes` is
    what a text as long as the context needs beside the weights. `free_bytes` is what was free before loading.
    """

    target: str
    target_class: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    full_context: int
    attention: str
    lost_by_tree: tuple[str, ...]
    window: int | None
    draft: str
    dialect: str | None
    draft_hidden_size: int
    draft_vocab_size: int
    rope_base: float
    own_embeddings: bool
    switches: tuple[str, ...]
    taps: tuple[int, ...]
    tap_source: str | None
    dtype: str
    quantization: str
    devices: tuple[str, ...]
    head_device: str
    processes: int
    needed_bytes: int
    context_bytes: int
    free_bytes: int


@dataclass
class Pair:
    """A model pair: a target, its draft head, and what decoding needs of them.

    device: where the target's last layer, its logits and the head lie. `tapped`: the tapped hidden states [B, T, H] of
    the target's latest forward, by layer: that layer's input, or the last one's output for the number of layers.
    `sessions` and `prefills` are filled by decoding: what it has prepared, to use again. `facts`: what `load` found.
    `origin`: the arguments of `load` that give the same pair in a fresh process. `needed_bytes`: the memory that it
    takes, and while it is loaded. These three are empty for a pair put together by hand. `beside`: pairs of other heads
    with this target, by the head's name. `quantization`: of the projections in the target's layers, "" for none.
    """

    target: nn.Module
    head: DraftHead
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    target_name: str
    draft_name: str
    tapped: dict[int, Tensor] = field(default_factory=dict)
    sessions: dict[Any, list[Any]] = field(default_factory=dict, repr=False)
    prefills: dict[Any, Any] = field(default_factory=dict, repr=False)
    facts: Facts | None = field(default=None, repr=False)
    origin: dict[str, Any] = field(default_factory=dict, repr=False)
    needed_bytes: int = 0
    beside: dict[str, Pair] = field(default_factory=dict, repr=False)
    quantization: str = ""

    def __post_init__(self) -> None:
        targets.pin_rotations(self.target)
        self.window, self.sliding = targets.window_of(self.config)
        self.cache_keyword = targets.cache_keyword(self.target)
        # a head beside another's target hears what the other's hooks already keep
        unheard = [tap for tap in self.head.config.taps if tap not in self.tapped]
        listen(self.target.get_decoder().layers, unheard, self.tapped)

    @property
    def config(self) -> Any:
        """The target's text configuration."""
        return self.target.config.get_text_config()

    @property
    def names(self) -> dict[str, Any]:
        """Target, draft and dtype as a record names them."""
        return {
            "target": project_path(self.target_name),
            "draft": project_path(self.draft_name),
            "dtype": dtype_name(self.dtype),
        }

    @property
    def context(self) -> int:
        """Positions that can be decoded (`targets.context_of`)."""
        return targets.context_of(self.config)

    @cached_property
    def asks(self) -> Asks:
        """What the target's class hands to its attention, found by running it once."""
        return observe(self.target)

    @cached_property
    def transposed(self) -> list[Place]:
        """For `swapped`: the projections of target and head, made by `transposed`. Found once, as it takes milliseconds."""
        return [*lone(self.target, "transposed"), *lone(self.head, "transposed")]

    @cached_property
    def head_in_8_bits(self) -> list[Place]:
        """For `swapped`: the head's projections in 8 bits, made once, beside its own. Raises ValueError as `in_8_bits` does."""
        return in_8_bits(self.head, "head=fp8")

    @property
    def eos(self) -> frozenset[int]:
        """End-of-sequence ids (`targets.end_ids`)."""
        return targets.end_ids(self.target)

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty key/value cache for the target, each layer's part on that layer's device.

        Under tensor parallelism a process has its own share of the key/value heads only.
        """
        heads, size = targets.kv_sizes(self.config)
        layers = self.target.get_decoder().layers
        devices = [next(layer.parameters()).device for layer in layers]
        attention = getattr(layers[0], "self_attn", None)
        weight = getattr(getattr(attention, "k_proj", None), "weight", None)
        if weight is not None and parallel.joined():
            heads = own_part(weight).shape[0] // size
        return KeyValueCache(devices, batch, heads, capacity, size, self.dtype)

    def new_head_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty key/value cache for the draft head, in place."""
        c = self.head.config
        return KeyValueCache([self.device], batch, c.num_key_value_heads, capacity, c.head_size, self.dtype)

    def check_attention(self, name: str) -> None:
        """ValueError where transformers' class of the target can't take the attention `name`, or asks more than it does."""
        kind = type(self.target).__name__
        if name == "sdpa" and not getattr(self.target, "_supports_sdpa", True):
            raise ValueError(
                f"{kind} has no attention=sdpa in transformers; use the strategy attention=eager."
            )
        if name not in ("sdpa", "eager") and not self.asks.interface:
            raise ValueError(
                f"{kind} has attention code of its own, so attention={name} can't be put in its place."
            )
        lost = self.asks.lost_by(name)
        if lost:
            raise ValueError(
                f"{kind} asks its attention for {' and '.join(lost)}, which attention={name} would drop; use the strategy "
                "attention=eager."
            )

    def masks(self, bias: Tensor | None, positions: Tensor, cache: KeyValueCache) -> Any:
        """The attention mask that the target's forward takes: one for all layers, or one for each kind of layer.

        Args: bias [B, 1, T, W], additive, over the cache's first W slots; positions int64 [B, T] of the rows at
        `cache.slots`. A sliding window of w lets a row see the positions within w - 1 before its own. Raises ValueError
        for an attention that takes no mask (bias None) on a target with a sliding window.
        """
        if self.window is None:
            return bias
        if bias is None and cache.capacity > self.window:
            raise ValueError(
                f"this target's sliding window of {self.window} tokens needs an attention that takes a mask; "
                "use attention=sdpa or attention=eager."
            )
        if bias is None or cache.capacity <= self.window:
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
        """The facts as a table of names and values; empty for a pair put together by hand."""
        return table(self.facts) if self.facts else ""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:  # what a notebook shows
        row = '<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        lines = [escape(line).split(maxsplit=1) for line in self.describe().splitlines()]
        shown = f"<table>{''.join(row.format(*line) for line in lines)}</table>"
        return {"text/html": shown, "text/plain": self.describe()} if lines else {"text/plain": repr(self)}


def shape_pair(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    tp_plan: str | None = None,
    quantization: str = "",
) -> Pair:
    """A pair of a shape of `shapes.SHAPES` with random weights made on the device, split among processes by a plan.

    quantization: as `load` takes it, on any device here.
    """
    target, head = shapes.build_shape(name, device, dtype, seed)
    _quantize(target, quantization)
    if tp_plan is not None:
        with targets.without_bars():
            target = parallel.split(target, tp_plan)
        object.__setattr__(head, "embedding", target.get_input_embeddings())
    _lay_out(target, head, device)
    return Pair(target, head, None, device, dtype, SHAPE + name, SHAPE + name, quantization=quantization)


def load(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    device_map: Any = None,
    tp_plan: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "",
    verbose: bool | None = None,
) -> Pair:
    """Load a target and its EAGLE-3 head.

    Args: target, draft: hub names or local folders, None = the embedded default pair; "shape:NAME" = random weights of
    a published size; device: None = the best one; dtype: None = bfloat16 on CUDA, float32 elsewhere; device_map:
    "auto" spreads the target over several GPUs (accelerate); tp_plan: "auto" splits it among the processes of
    `torchrun`; trust_remote_code: run Python code that a checkpoint brings; quantization: "fp8" rounds the projections
    of the target's layers to 8 bits (`runtime.kernels.float8`), not its embeddings, its output matrix or the head;
    verbose: print the facts to stderr, None = where stderr is a terminal (in a notebook it would look like a failure).
    Raises: ValueError and FileNotFoundError, one sentence each, before any weights are read where possible.
    """
    for name, given in (("target", target), ("draft", draft)):
        if given is not None and not isinstance(given, str | Path):
            raise ValueError(f"{name} is {given!r}; it must be a hub name or a local folder.")
    place = check_device(device)
    kind = check_dtype(dtype, place)
    if device_map is not None and tp_plan is not None:
        raise ValueError("device_map and tp_plan are two ways to spread a target; give one of them.")
    if quantization and (device_map is not None or tp_plan is not None):
        raise ValueError(
            f"quantization={quantization} is for a target on one GPU; leave device_map and tp_plan out."
        )
    check_quantization(quantization, place, kind)
    if tp_plan is not None:
        parallel.check_split(place)
        place = parallel.own_device(place)
    if target is not None and str(target).startswith(SHAPE):
        return _load_shape(
            str(target).removeprefix(SHAPE), draft, place, kind, tp_plan, verbose, quantization
        )
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
    # its config's faults, before its weights come
    dialects.read(read_draft_json(folder), config.num_hidden_layers)
    folder = targets.find_draft(draft)
    head_config = check_draft(folder, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    spread = device_map is not None or tp_plan is not None
    beside = _beside_target(config, head_config, kind)
    whole_bytes = targets.target_bytes(where, whole, kind, trust_remote_code)
    # the target comes whole, and is quantized then
    needed = at_first = beside + whole_bytes // (parallel.processes() if tp_plan else 1)
    if quantization:
        needed = beside + targets.target_bytes(where, whole, kind, trust_remote_code, quantization)
    free = targets.free_bytes(place, every=device_map is not None)
    targets.check_fit(at_first, free, place, kind, spread)
    model = targets.load_target(where, place, kind, device_map, tp_plan, trust_remote_code)
    settle_window(model)
    last = next(model.get_decoder().layers[-1].parameters()).device
    head = _head_for(model, folder, config, last, kind)
    _quantize(model, quantization)
    _lay_out(model, head, place)
    tokenizer = targets.load_tokenizer(where, trust_remote_code)
    names = str(target or DEFAULT_TARGET), str(draft)
    pair = Pair(model, head, tokenizer, last, kind, *names, quantization=quantization)
    if pair.asks.lost_by(model.config._attn_implementation):
        model.set_attn_implementation("eager")
    prove(pair)
    pair.facts = _facts(pair, read_draft_json(folder), needed, free, spread)
    pair.needed_bytes = at_first
    pair.origin = {
        "target": pair.target_name, "draft": pair.draft_name, "device": str(place), "dtype": kind,
        "device_map": device_map, "tp_plan": tp_plan, "trust_remote_code": trust_remote_code, "quantization": quantization,
    }  # fmt: skip
    _print(pair.facts, verbose)
    return pair


def with_head(pair: Pair, draft: str | Path) -> Pair:
    """Another head, a folder or hub name, beside the pair's own on the same target, whose weights both share.

    What decoding prepares stays apart. Raises ValueError and FileNotFoundError as `load` does.
    """
    c = pair.config
    if pair.target_name.startswith(SHAPE):
        raise ValueError(
            f"target {pair.target_name!r} has random weights and brings its own head; leave draft out."
        )
    folder = targets.find_draft(draft)
    head_config = check_draft(folder, c.num_hidden_layers, c.hidden_size, c.vocab_size)
    needed, free = draft_bytes(head_config, pair.dtype), targets.free_bytes(pair.device)
    targets.check_fit(needed, free, pair.device, pair.dtype, False)
    head = _head_for(pair.target, folder, c, pair.device, pair.dtype)
    if pair.device.type == "cuda":
        fuse_in_memory(head)
    name, origin = str(draft), pair.origin and pair.origin | {"draft": str(draft)}
    other = replace(
        pair, head=head, draft_name=name, sessions={}, prefills={}, beside={}, facts=None, origin=origin,
        needed_bytes=pair.needed_bytes + needed,
    )  # fmt: skip
    prove(other)
    kept = (pair.facts.needed_bytes if pair.facts else pair.needed_bytes) + needed
    other.facts = _facts(other, read_draft_json(folder), kept, free, False)
    return other


def _head_for(
    target: nn.Module, folder: Path, config: Any, place: torch.device, kind: torch.dtype
) -> DraftHead:
    head = load_draft(
        folder, config.num_hidden_layers, _embedding_at(target, place), target.get_output_embeddings()
    )
    head = head.to(device=place, dtype=kind).eval().requires_grad_(False)
    check_finite(head, "draft head", kind)
    return head


def _load_shape(
    name: str,
    draft: object,
    place: torch.device,
    kind: torch.dtype,
    tp_plan: str | None,
    verbose: bool | None,
    quantization: str,
) -> Pair:
    if draft is not None:
        raise ValueError(
            f"target {SHAPE + name!r} has random weights and brings its own head; leave draft out."
        )
    config = shapes.shape_config(name)
    head_config = shapes.draft_config(name)
    beside = _beside_target(config, head_config, kind)
    at_first = targets.target_bytes(name, config, kind) + beside
    needed = targets.target_bytes(name, config, kind, quantization=quantization) + beside
    free = targets.free_bytes(place)
    targets.check_fit(at_first, free, place, kind, False)
    pair = shape_pair(name, place, kind, tp_plan=tp_plan, quantization=quantization)
    pair.facts = _facts(pair, None, needed, free, False)
    pair.origin = {
        "target": SHAPE + name, "device": str(place), "dtype": kind, "tp_plan": tp_plan, "quantization": quantization,
    }  # fmt: skip
    pair.needed_bytes = at_first
    _print(pair.facts, verbose)
    return pair


def _beside_target(config: Any, head_config: DraftConfig, kind: torch.dtype) -> int:
    planned = min(PLANNED_TOKENS, targets.context_of(config))
    return draft_bytes(head_config, kind) + text_bytes(config, head_config, kind, planned)


def _print(facts: Facts, verbose: bool | None) -> None:
    if verbose is None:
        verbose = sys.stderr.isatty()
    if verbose and parallel.rank() == 0:
        print(table(facts), file=sys.stderr)  # stdout belongs to the caller's own output


def _quantize(target: nn.Module, quantization: str) -> None:
    if quantization:
        quantize(target.get_decoder().layers)


def _lay_out(target: nn.Module, head: nn.Module, place: torch.device) -> None:
    # before any CUDA graph can hold the weights' addresses
    if place.type == "cuda":
        fuse_in_memory(target.get_decoder())
        fuse_in_memory(head)
        torch.cuda.empty_cache()  # what the weights took before is free for others


def project_path(name: str) -> str:
    """A path inside the checkout relative to it, so that it reads the same on every machine; other names as they are."""
    return str(Path(name).relative_to(ROOT)) if Path(name).is_relative_to(ROOT) else name


def _embedding_at(model: nn.Module, device: torch.device) -> nn.Module:
    """The target's embeddings; a copy on `device` where they lie elsewhere, since the head needs them there.

    The whole module is copied: some classes of transformers scale what they look up.
    """
    embedding = model.get_input_embeddings()
    if embedding.weight.device == device:
        return embedding
    moved = copy.deepcopy(embedding)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, which would move the ids back
        vars(moved).pop(name, None)
    return moved.to(device).requires_grad_(False)


def _facts(pair: Pair, raw: dict[str, Any] | None, needed: int, free: int, spread: bool) -> Facts:
    c, h = pair.config, pair.head.config
    layers = pair.target.get_decoder().layers
    return Facts(
        target=project_path(pair.target_name),
        target_class=type(pair.target).__name__,
        layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=targets.kv_sizes(c)[0],
        vocab_size=c.vocab_size,
        context=pair.context,
        full_context=c.max_position_embeddings,
        attention=pair.target.config._attn_implementation,
        lost_by_tree=tuple(pair.asks.lost_by("tree")),
        window=pair.window,
        draft=project_path(pair.draft_name),
        dialect=dialects.recognise(raw) if raw else None,
        draft_hidden_size=h.hidden_size,
        draft_vocab_size=h.draft_vocab_size,
        rope_base=float(h.rope["rope_theta"]),
        own_embeddings=h.own_embeddings,
        switches=tuple(name for name in ("qk_norm", *dialects.SWITCHES) if getattr(h, name)),
        taps=h.taps,
        tap_source=dialects.tap_source(raw) if raw else None,
        dtype=dtype_name(pair.dtype),
        quantization=pair.quantization,
        devices=tuple(sorted({str(next(layer.parameters()).device) for layer in layers})),
        head_device=str(pair.device),
        processes=parallel.processes() if spread else 1,
        needed_bytes=needed,
        context_bytes=text_bytes(c, h, pair.dtype, pair.context),
        free_bytes=free,
    )


def table(f: Facts) -> str:
    """The facts as lines of names and values."""
    window = f", sliding window {f.window}" if f.window else ""
    border = f" of {f.full_context}: a longer text's rotation changes" if f.context < f.full_context else ""
    lost = (
        f": the target asks for {', '.join(f.lost_by_tree)}, which tree would drop" if f.lost_by_tree else ""
    )
    mapped = f.draft_vocab_size != f.vocab_size
    vocabulary = f"draft vocabulary {f.draft_vocab_size}" if mapped else "the target's vocabulary"
    own = ", own embeddings" if f.own_embeddings else ""
    taps = ", ".join("the final norm" if tap == f.layers else str(tap) for tap in f.taps)
    source = {
        "assumed": " (assumed: the head's config names none)",
        "inputs": " (the numbers in the head's config)",
        "outputs": f" (in the head's config as outputs of {', '.join(str(tap - 1) for tap in f.taps)})",
    }
    device = ", ".join(f.devices) + (f"; head on {f.head_device}" if len(f.devices) > 1 else "")
    rows = {
        "target": f"{f.target} ({f.target_class})",
        "sizes": f"{f.layers} layers, hidden {f.hidden_size}, {f.heads} heads ({f.kv_heads} kv), "
        f"vocabulary {f.vocab_size}, context {f.context}{border}{window}",
        "draft": f"{f.draft} ({f'dialect: {f.dialect}' if f.dialect else 'random weights'})",
        "head": f"hidden {f.draft_hidden_size}, {vocabulary}, RoPE base {f.rope_base:g}{own}"
        + "".join(f", {name}" for name in f.switches),
        "taps": f"inputs of layers {taps}{source.get(f.tap_source or '', '')}",
        "attention": f.attention + lost,
        "dtype": f.dtype
        + (f", projections of the target's layers in {f.quantization}" if f.quantization else ""),
        "device": device + (f", {f.processes} processes" if f.processes > 1 else ""),
        "memory": f"{format_bytes(f.needed_bytes)} needed, {format_bytes(f.free_bytes)} were free; "
        f"a text of {f.context} tokens needs {format_bytes(f.context_bytes)} beside the weights",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
