"""A `Machine`: a state and the step that moves it on by a cycle (see `cycle.py`), made ready under a runtime.

Machines of a runtime with fixed shapes are kept with the pair, so that the next prompt finds its cycle compiled or
captured. Their caches are a power of two long, and the step is made ready once for each window of the cache that
attention may read, as reading all of a long cache costs a short text time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eagle_lab.decode.attention import PARTED
from eagle_lab.decode.cycle import cycle, plain_step
from eagle_lab.decode.prefill import attending, lengths, read, reader
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.state import CycleTensors, State
from eagle_lab.decode.strategy import Strategy
from eagle_lab.decode.tree import TreeShape
from eagle_lab.models.cache import GrowingCache, KeyValueCache
from eagle_lab.models.pair import Pair
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime.clock import Span, no_span
from eagle_lab.runtime.early_launch import possible
from eagle_lab.runtime.layers import compiled_layers, compiled_parts
from eagle_lab.runtime.projections import Merged, merged

# fixed windows are powers of two from this one on, so that one capture serves many lengths
SMALLEST_WINDOW = 256


@dataclass
class Machine:
    """A state for some rows and the step that moves it on; plain decoding where `shape` is None.

    capacity: cache slots of a row; steps: the step made ready for each window, None standing for a window that grows;
    merged: groups of projections that share one product, and early products.
    """

    pair: Pair
    plan: Strategy
    shape: TreeShape | None
    sampling: Sampling
    capacity: int
    state: State
    steps: dict[int | None, runtime.Prepared] = field(default_factory=dict)
    merged: Merged = field(default_factory=Merged)

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
            return self.run(span)
        window = next(w for w in self.steps if w is not None and w >= state.visible_length + self.reach)
        state.window = window
        with span("replay"):
            if "cuda_graph" in self.plan.runtime:  # recorded with its attention, so there is nothing to set
                return self.steps[window].run()
            with attending(self.pair, self.plan.attention):
                return self.steps[window].run()

    def run(self, span: Span = no_span) -> CycleTensors | Tensor:
        """The step itself, under no runtime: a cycle's tensors, or a plain token's report, int64 [B, 3]."""
        with attending(self.pair, self.plan.attention):
            return self.bare(span)

    def bare(self, span: Span = no_span) -> CycleTensors | Tensor:
        """The step where the target's attention is set already; nothing in it but tensors, so it can be compiled.

        Returns a cycle's tensors, or a plain token's report, int64 [B, 3].
        """
        if self.shape is None:
            return plain_step(self.pair, self.state, self.plan, self.sampling, span)
        return cycle(self.pair, self.state, self.shape, self.plan, self.sampling, span)

    def prepare(self) -> None:
        """Compile or capture the step, once for each window from the smallest to the capacity, and the readings."""
        if not runtime.fixed(self.plan.runtime):
            self.steps[None] = runtime.Prepared(self.run, 0.0, 0)
            return
        pool = torch.cuda.graph_pool_handle() if "cuda_graph" in self.plan.runtime else None
        step = self.bare if "compile" in self.plan.runtime else self.run
        window = SMALLEST_WINDOW
        while window <= self.capacity:
            self.state.window = window
            with attending(self.pair, self.plan.attention), self.pieces():
                self.steps[window] = runtime.prepare(
                    self.plan.runtime, step, self.reset, self.pair.device, pool
                )
            window *= 2
        for length in self.readings():
            reader(self.pair, self.plan, self.sampling, self.shape is not None, length)

    def readings(self) -> list[int]:
        """The padded lengths at which prompts are read from a CUDA graph; none where the runtime has no graphs."""
        return lengths(self.capacity) if "cuda_graph" in self.plan.runtime else []

    @contextmanager
    def pieces(self) -> Iterator[None]:
        """Inside, the target's repeated parts are what the runtime wants: compiled ones where it compiles by pieces.

        Whole layers where the attention is one of ours, else their norms, MLPs and rotations. Projections of one input
        are one product. Raises ValueError where early products are asked for and no projection of the target is small.
        """
        decoder, head, rows = self.pair.target.get_decoder(), self.pair.head, self.state.root.shape[0]
        if self.plan.runtime != runtime.PIECES:
            yield
            return
        product, nodes = self.plan.product, self.shape.total_tokens + 1 if self.shape else 1
        frontier, drafts = self.shape.top_k if self.shape else 1, bool(self.shape)
        check_early(self.pair, self.plan, rows * nodes)
        with merged(decoder, product, rows * nodes) as target, merged(head, product, rows * frontier) as own:
            self.merged = Merged(target.groups + own.groups * drafts, target.early + own.early * drafts)
            if self.plan.attention in PARTED:
                with self.state.target_cache.lent(decoder.layers), compiled_layers(decoder):
                    yield
            else:
                with compiled_parts(decoder):
                    yield

    def reset(self) -> None:
        """An empty state: nothing before the roots, all rows at work."""
        self.state.length.zero_()
        self.state.root.zero_()
        self.state.hidden.zero_()
        self.state.active.fill_(True)
        self.state.visible_length = 0

    def report(self) -> dict[str, Any]:
        """What preparing took: windows, seconds, and bytes of device memory for graphs and for the caches; seconds and
        bytes of each reading of prompts, which the pair's machines share. How many groups of projections share a product, how many
        products load their weights early, and whether what was compiled is launched early."""
        caches = [cache for cache in (self.state.target_cache, self.state.head_cache) if cache is not None]
        with_head = self.shape is not None
        readers = [reader(self.pair, self.plan, self.sampling, with_head, n) for n in self.readings()]
        return {
            "strategy": str(self.plan),
            "windows": [window for window in self.steps if window is not None],
            "seconds": sum(made.seconds for made in self.steps.values()),
            "bytes": sum(made.bytes for made in self.steps.values()),
            "cache_bytes": sum(cache.bytes() for cache in caches),
            "merged_projections": self.merged.groups,
            "early_products": self.merged.early,
            "early_launches": "compile" in self.plan.runtime and possible(self.pair.device),
            "readings": [[found.prepared.seconds, found.bytes()] for found in readers],
        }


def fixed_capacity(slots: int) -> int:
    """Cache slots a row of a machine under a fixed runtime, for a decode that needs so many: a power of two."""
    return max(SMALLEST_WINDOW, 1 << (slots - 1).bit_length())


def no_early(pair: Pair, plan: Strategy, rows: int) -> str | None:
    """Why product=early would change nothing in the target's products of so many rows, in one sentence without its full
    stop; None where some of its projections are small, and for other products."""
    if plan.product != "early":
        return None
    with merged(pair.target.get_decoder(), "early", rows) as found:
        if found.early:
            return None
    return (
        f"{pair.target_name} has no projection that is small for {rows} rows, so product=early changes nothing in it; use "
        "product=library"
    )


def check_early(pair: Pair, plan: Strategy, rows: int) -> None:
    """ValueError where the strategy asks for early products and `no_early` says why there are none."""
    if reason := no_early(pair, plan, rows):
        raise ValueError(f"{reason}.")


def new_machine(
    pair: Pair, plan: Strategy, shape: TreeShape | None, sampling: Sampling, rows: int, capacity: int
) -> Machine:
    """A machine with empty caches of `capacity` slots a row, its step not yet prepared."""
    c, device = pair.head.config, pair.device
    head_cache: KeyValueCache | GrowingCache | None = None
    if shape and plan.cache == "concat":
        head_cache = GrowingCache(c.num_key_value_heads, c.head_size, pair.dtype, device)
    elif shape:
        head_cache = pair.new_head_cache(rows, capacity)
    state = State(
        length=torch.zeros(rows, dtype=torch.int64, device=device),
        root=torch.zeros(rows, dtype=torch.int64, device=device),
        hidden=torch.zeros(rows, c.hidden_size, dtype=pair.dtype, device=device),
        active=torch.ones(rows, dtype=torch.bool, device=device),
        target_cache=pair.new_cache(rows, capacity),
        head_cache=head_cache,
        uniforms=torch.zeros(
            rows, capacity + (shape.width if shape else 0) + 2, dtype=torch.float64, device=device
        ),
    )
    return Machine(pair, plan, shape, sampling, capacity, state)


@contextmanager
def lease(
    pair: Pair, plan: Strategy, shape: TreeShape | None, sampling: Sampling, rows: int, slots: int
) -> Iterator[Machine]:
    """A machine with room for `slots` a row: a new one, or one that an earlier decode under a fixed runtime left."""
    if not runtime.fixed(plan.runtime):
        machine = new_machine(pair, plan, shape, sampling, rows, slots)
        machine.prepare()
        yield machine
        return
    capacity = fixed_capacity(slots)
    idle = pair.sessions.setdefault((plan, shape, sampling, rows, capacity), [])
    if idle:
        machine = idle.pop()
    else:
        machine = new_machine(pair, plan, shape, sampling, rows, capacity)
        machine.prepare()
    machine.reset()
    try:
        yield machine
    finally:
        idle.append(machine)


def prefill(machine: Machine, row: int, prompt: Tensor, uniforms: Tensor) -> Tensor:
    """Read the prompt int64 [1, L] into a row; its root is then the first new token, which is returned, int64 [1].

    Where the machine replays a CUDA graph, so does the reading of a prompt that is short enough (see `reading`).
    """
    pair, plan, state, length = machine.pair, machine.plan, machine.state, prompt.shape[1]
    state.uniforms[row, : uniforms.shape[1]].copy_(uniforms[0, : state.uniforms.shape[1]])
    cache, uniform = state.target_cache.row(row), uniforms[:, length]
    head_cache = None if state.head_cache is None else state.head_cache.row(row)
    padded = next((size for size in machine.readings() if size >= length), None)
    if padded is None:
        with attending(pair, plan.attention):
            found = read(pair, plan, machine.sampling, prompt, None, uniform, cache, head_cache)
    else:
        assert not isinstance(head_cache, GrowingCache)  # it has no fixed shapes
        ready = reader(pair, plan, machine.sampling, head_cache is not None, padded)
        found = ready.read(prompt, uniform, cache, head_cache)
    state.length[row] = length
    state.root[row : row + 1] = found.first
    state.visible_length = max(state.visible_length, length)
    if found.hidden is not None:
        state.hidden[row] = found.hidden[0]
    return found.first
