"""A `Session`: a state and the step that moves it on by a cycle (see `cycle.py`), made ready under a runtime.

Sessions of a runtime with fixed shapes are kept with the pair, so that the next prompt finds its cycle compiled or
captured. Their caches are a power of two long. The step is made ready once for each window of the cache that attention
may read, as reading all of a long cache costs a short text time; windows that a prompt has outgrown are left for a shorter
one that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eagle_lab.decode.attention import BY_TEXT, SPLIT
from eagle_lab.decode.cycle import CycleTensors, cycle, plain_step
from eagle_lab.decode.forward import TARGET, State, asked
from eagle_lab.decode.prefill import CapturedPrefill, captured_prefill, padded_lengths, prefill
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding, Strategy
from eagle_lab.decode.tree import TreeShape
from eagle_lab.models.cache import GrowingCache, KeyValueCache, text_bytes
from eagle_lab.models.pair import PLANNED_TOKENS, Pair
from eagle_lab.models.targets import format_bytes, free_bytes
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime.clock import Span, no_span
from eagle_lab.runtime.early_launch import possible
from eagle_lab.runtime.layers import compiled_early, compiled_layers, compiled_parts
from eagle_lab.runtime.projections import Fused, early_alone, fused

# fixed windows are powers of two from this one on, so that one capture serves many lengths
SMALLEST_WINDOW = 256

Step = Callable[..., CycleTensors | Tensor]


@dataclass
class Session:
    """A state for some rows and the step that moves it on; plain decoding where `shape` is None.

    capacity: cache slots of a row; steps: the step made ready for each window, None standing for a window that grows;
    fused: groups of projections that share one product, and early products; pool: the memory that its graphs share.
    """

    pair: Pair
    strategy: Strategy
    shape: TreeShape | None
    sampling: Sampling
    capacity: int
    state: State
    steps: dict[int | None, runtime.Prepared] = field(default_factory=dict)
    fused: Fused = field(default_factory=Fused)
    pool: Any = None

    @property
    def reach(self) -> int:
        """Cache slots beyond the prefix that a step writes."""
        return self.shape.reach if self.shape else 1

    def step(self, span: Span = no_span) -> CycleTensors | Tensor:
        """Move all rows on by one cycle or one plain token.

        Returns a cycle's tensors, or a plain token's report, int64 [B, 3].
        """
        state = self.state
        if None in self.steps:  # eager: the window grows with the text
            return self.steps[None].run(span)
        window = min(w for w in self.steps if w is not None and w >= state.visible_length + self.reach)
        state.window = window
        with span("replay"):
            return self.steps[window].run()

    def advance(self, span: Span = no_span) -> CycleTensors | Tensor:
        """The step itself, where the target's attention is set; nothing in it but tensors, so it can be compiled.

        Returns a cycle's tensors, or a plain token's report, int64 [B, 3].
        """
        if self.shape is None:
            return plain_step(self.pair, self.state, self.strategy, self.sampling, span)
        return cycle(self.pair, self.state, self.shape, self.strategy, self.sampling, span)

    def as_asked(self) -> AbstractContextManager[None]:
        """Inside, the target attends, and projections are made, by the strategy."""
        return asked(self.pair, self.strategy, self.shape is not None)

    def with_attention(self, step: Step) -> Step:
        """A step that sets the target's attention, and how products are made, first."""

        def run(*span: Span) -> CycleTensors | Tensor:
            with self.as_asked():
                return step(*span)

        return run

    def prepare(self, prefix: int = 0) -> None:
        """Compile or capture the step for each window that a text of `prefix` tokens and more may need and that isn't ready
        yet, and the prefills."""
        name = self.strategy.runtime
        if not runtime.fixed(name):
            self.steps[None] = runtime.Prepared(self.with_attention(self.advance), 0.0, 0)
            return
        every = windows(self.strategy.attention, self.capacity)
        missing = [window for window in every if window not in self.steps and window >= prefix + self.reach]
        if not missing:
            return
        captured = "cuda_graph" in name
        if captured and self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        # what compiles can't trace the setting of an attention, and a recorded step has its attention in it
        step = self.advance if "compile" in name else self.with_attention(self.advance)
        for window in missing:
            self.state.window = window
            with self.as_asked(), self.regional():
                ready = runtime.prepare(name, step, self.reset, self.pair.device, self.pool)
            run = ready.run if captured else self.with_attention(ready.run)
            self.steps[window] = runtime.Prepared(run, ready.seconds, ready.bytes)
        for length in self.prefill_lengths():
            self.captured_prefill(length)

    def prefill_lengths(self) -> list[int]:
        """The padded lengths at which prompts are read from a CUDA graph; none where the runtime has no graphs."""
        return padded_lengths(self.capacity) if "cuda_graph" in self.strategy.runtime else []

    def captured_prefill(self, length: int) -> CapturedPrefill:
        """The captured prefill of a padded length, which the pair's sessions share."""
        return captured_prefill(self.pair, self.strategy, self.sampling, self.shape is not None, length)

    @contextmanager
    def regional(self) -> Iterator[None]:
        """Inside, the target's repeated parts are what the runtime wants: compiled ones where it compiles in regions.

        Whole layers where the attention splits prefix and tree, and the product that makes the logits where it is early;
        else the layers' norms, MLPs and rotations. Projections of one input are one product.
        Raises ValueError where early products are asked for and the target has none.
        """
        decoder, head, rows = self.pair.target.get_decoder(), self.pair.head, self.state.root.shape[0]
        if self.strategy.runtime != runtime.REGIONAL:
            yield
            return
        product, nodes = self.strategy.product, self.shape.total_tokens + 1 if self.shape else 1
        frontier, drafts = self.shape.top_k if self.shape else 1, bool(self.shape)
        check_early(self.pair, self.strategy, rows * nodes)
        with fused(decoder, product, rows * nodes) as target, fused(head, product, rows * frontier) as own:
            logits = self.pair.target.get_output_embeddings() if product == "early" else None
            early = target.early + own.early * drafts + early_alone(logits, rows * nodes)
            self.fused = Fused(target.groups + own.groups * drafts, early)
            if self.strategy.attention in SPLIT:
                with (
                    self.state.target_cache.bound(decoder.layers),
                    compiled_layers(decoder, rows > 1),
                    compiled_early(logits, rows * nodes, rows > 1),
                ):
                    yield
            else:
                with compiled_parts(decoder, rows > 1):
                    yield

    def reset(self) -> None:
        """An empty state: nothing before the roots, all rows at work."""
        for tensor in (self.state.length, self.state.root, self.state.hidden, self.state.fault):
            tensor.zero_()
        self.state.active.fill_(True)
        self.state.visible_length = 0

    def prefill(self, row: int, prompt: Tensor, uniforms: Tensor) -> Tensor:
        """Read the prompt int64 [1, L] into a row; its root is then the first new token.

        Returns int64 [2]: -fault (see `State`), which later reports tell too, and the token.
        uniforms float64 [1, positions]. Where the session replays a CUDA graph, so does the prefill of a short prompt.
        """
        pair, strategy, state, length = self.pair, self.strategy, self.state, prompt.shape[1]
        state.uniforms[row, : uniforms.shape[1]].copy_(uniforms[0, : state.uniforms.shape[1]])
        cache, uniform = state.target_cache.row(row), uniforms[:, length]
        head_cache = None if state.head_cache is None else state.head_cache.row(row)
        padded = next((size for size in self.prefill_lengths() if size >= length), None)
        if padded is None:
            with self.as_asked():
                done = prefill(pair, strategy, self.sampling, prompt, None, uniform, cache, head_cache)
        else:
            assert not isinstance(head_cache, GrowingCache)  # it has no fixed shapes
            done = self.captured_prefill(padded).run(prompt, uniform, cache, head_cache)
        state.length[row] = length
        state.root[row : row + 1] = done.first
        state.fault[row : row + 1] = ~done.finite * TARGET
        state.visible_length = max(state.visible_length, length)
        if done.hidden is not None:
            state.hidden[row] = done.hidden[0]
        return torch.cat((-state.fault[row : row + 1], done.first))

    def report(self) -> dict[str, Any]:
        """What preparing took.

        "windows"; "seconds" and "bytes" of device memory, of all windows' graphs; "cache_bytes"; "merged_projections",
        groups that share a product; "early_products", products that ask for their weights early; "early_launches", whether
        what was compiled starts early; "readings", [seconds, bytes] of each captured prefill, which sessions share.
        """
        caches = [cache for cache in (self.state.target_cache, self.state.head_cache) if cache is not None]
        prefills = [self.captured_prefill(length) for length in self.prefill_lengths()]
        return {
            "strategy": str(self.strategy),
            "windows": [window for window in self.steps if window is not None],
            "seconds": sum(ready.seconds for ready in self.steps.values()),
            "bytes": sum(ready.bytes for ready in self.steps.values()),
            "cache_bytes": sum(cache.bytes() for cache in caches),
            "merged_projections": self.fused.groups,
            "early_products": self.fused.early,
            "early_launches": "compile" in self.strategy.runtime and possible(self.pair.device),
            "readings": [[ready.prepared.seconds, ready.bytes()] for ready in prefills],
        }


def fixed_capacity(slots: int) -> int:
    """Cache slots of a row of a session under a fixed runtime, for a decode that needs so many: a power of two."""
    return max(SMALLEST_WINDOW, 1 << (slots - 1).bit_length())


def windows(attention: str, capacity: int) -> list[int]:
    """The windows, in slots, for which a step over a cache of so many may be made ready, ascending: powers of two; at most
    two where the attention's time follows the text (see `BY_TEXT`)."""
    if attention in BY_TEXT:
        return sorted({min(BY_TEXT[attention], capacity), capacity})
    return [SMALLEST_WINDOW << n for n in range((capacity // SMALLEST_WINDOW).bit_length())]


def sizes(one: Decoding, length: int, plain: bool) -> tuple[int, int]:
    """The cache slots of a row and the first window of a session under a fixed runtime, for a prompt of so many tokens."""
    reach, width = (1, 0) if plain else (one.shape.reach, one.shape.width)
    capacity = fixed_capacity(length + one.max_new_tokens + reach + width)
    return capacity, next(w for w in windows(one.strategy.attention, capacity) if w >= length + reach)


def no_early(pair: Pair, strategy: Strategy, rows: int) -> str | None:
    """Why product=early would change nothing in the target's products of so many rows, in one sentence without its full
    stop; None where it makes some of them, and for other products."""
    if strategy.product != "early":
        return None
    with fused(pair.target.get_decoder(), "early", rows) as count:
        if count.early or early_alone(pair.target.get_output_embeddings(), rows):
            return None
    return (
        f"{pair.target_name} has no projection whose product of {rows} rows asks for its weights early, so product=early changes "
        "nothing in it; use product=library"
    )


def check_early(pair: Pair, strategy: Strategy, rows: int) -> None:
    """ValueError where the strategy asks for early products and `no_early` says why there are none."""
    if reason := no_early(pair, strategy, rows):
        raise ValueError(f"{reason}.")


def new_session(
    pair: Pair, strategy: Strategy, shape: TreeShape | None, sampling: Sampling, rows: int, capacity: int
) -> Session:
    """A session with empty caches of `capacity` slots a row, its step not yet prepared."""
    c, device = pair.head.config, pair.device
    head_cache: KeyValueCache | GrowingCache | None = None
    if shape and strategy.cache == "concat":
        head_cache = GrowingCache(c.num_key_value_heads, c.head_size, pair.dtype, device)
    elif shape:
        head_cache = pair.new_head_cache(rows, capacity)
    length, root, fault = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
    positions = capacity + (shape.width if shape else 0) + 2
    state = State(
        length=length, root=root, fault=fault,
        hidden=torch.zeros(rows, c.hidden_size, dtype=pair.dtype, device=device),
        active=torch.ones(rows, dtype=torch.bool, device=device),
        target_cache=pair.new_cache(rows, capacity), head_cache=head_cache,
        uniforms=torch.zeros(rows, positions, dtype=torch.float64, device=device),
    )  # fmt: skip
    if rows > 1:
        caches = [
            cache for cache in (state.target_cache, state.head_cache) if isinstance(cache, KeyValueCache)
        ]
        kept = [tensor for cache in caches for layer in cache.layers for tensor in layer]
        runtime.only_rows_vary(state.hidden, state.uniforms, *kept)
    return Session(pair, strategy, shape, sampling, capacity, state)


def check_memory(pair: Pair, strategy: Strategy, with_head: bool, rows: int, slots: int) -> None:
    """ValueError where a long text can't fit into the memory that is free, before any of it is read."""
    if rows * slots <= PLANNED_TOKENS:
        return  # `load` made room for it
    head = pair.head.config if with_head else None
    needed = text_bytes(pair.config, head, pair.dtype, slots, attention=strategy.attention, rows=rows)
    places = {layer.weight.device for layer in (pair.target.get_input_embeddings(), pair.head.fc)}
    free = free_bytes(pair.device, len(places) > 1)
    if pair.device.type == "cuda":  # what torch holds and doesn't use is free too
        free += torch.cuda.memory_reserved(pair.device) - torch.cuda.memory_allocated(pair.device)
    if needed > free:
        raise ValueError(
            f"a text of {slots} tokens{f' in {rows} rows' if rows > 1 else ''} needs {format_bytes(needed)} for its keys, "
            f"values and masks, but {pair.device} has {format_bytes(free)} free; shorten the prompt or max_new_tokens."
        )


@contextmanager
def session(
    pair: Pair,
    strategy: Strategy,
    shape: TreeShape | None,
    sampling: Sampling,
    rows: int,
    slots: int,
    prefix: int,
) -> Iterator[Session]:
    """A session with room for `slots` a row: a new one, or one that an earlier decode under a fixed runtime left.

    prefix: tokens of the longest prompt; what is made ready is for texts that are at least so long.
    """
    if not runtime.fixed(strategy.runtime):
        check_memory(pair, strategy, shape is not None, rows, slots)
        fresh = new_session(pair, strategy, shape, sampling, rows, slots)
        fresh.prepare()
        yield fresh
        return
    capacity = fixed_capacity(slots)
    idle = pair.sessions.setdefault((strategy, shape, sampling, rows, capacity), [])
    if idle:
        ready = idle.pop()
    else:
        check_memory(pair, strategy, shape is not None, rows, capacity)
        ready = new_session(pair, strategy, shape, sampling, rows, capacity)
    ready.prepare(prefix)
    ready.reset()
    try:
        yield ready
    finally:
        idle.append(ready)
