"""Several prompts decoded together, each as if it were alone.

Rows have their own length, acceptance and end: a cycle's shapes are the same for all, and what differs lies in
tensors. A row that has ended repeats its last cycle and commits nothing, so that no shape changes; the batch ends with
its last row. Prompts are read one at a time, so that a row's prefill cannot depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eagle_lab.decode.generate import Cycle, Generation, check_prompt, check_shape, cut, draw_uniforms
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import Machine, lease, prefill
from eagle_lab.decode.state import CycleTensors, TreeShape
from eagle_lab.decode.strategy import Strategy, check
from eagle_lab.models.pair import Pair
from eagle_lab.runtime.clock import Span, no_span

Prompts = Sequence[Sequence[int] | Tensor]


@torch.inference_mode()
def generate_batch(
    pair: Pair,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = "rebuild",
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k_sampling: int = 0,
    seed: int | None = None,
    span: Span = no_span,
) -> list[Generation]:
    """EAGLE-3 decoding of several prompts at once; options as for `stream`.

    Returns one `Generation` a prompt, its tokens those of `generate` alone (row r draws with seed + r); its cycles
    are those that it took part in before it ended, without their trees.
    Raises ValueError for bad sizes, strategies and prompts before any forward.
    """
    plan, shape = check(strategy, pair.device, rows=len(prompts)), TreeShape(top_k, depth, total_tokens)
    check_shape(pair, shape)
    return _decode(
        pair, plan, shape, Sampling(temperature, top_p, top_k_sampling), prompts, max_new_tokens, seed, span
    )


@torch.inference_mode()
def generate_plain_batch(
    pair: Pair,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = "rebuild",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k_sampling: int = 0,
    seed: int | None = None,
    span: Span = no_span,
) -> list[Generation]:
    """The target's own decoding of several prompts at once, one token a row and forward; else as `generate_batch`."""
    plan = check(strategy, pair.device, rows=len(prompts), tree=False)
    sampling = Sampling(temperature, top_p, top_k_sampling)
    return _decode(pair, plan, None, sampling, prompts, max_new_tokens, seed, span)


def _decode(
    pair: Pair,
    plan: Strategy,
    shape: TreeShape | None,
    sampling: Sampling,
    prompts: Prompts,
    max_new_tokens: int,
    seed: int | None,
    span: Span,
) -> list[Generation]:
    if not len(prompts):
        raise ValueError("the batch is empty; give at least one prompt.")
    ids = [check_prompt(pair, prompt, max_new_tokens) for prompt in prompts]
    beyond = shape.reach + shape.width if shape else 1
    slots = max(prompt.shape[1] for prompt in ids) + max_new_tokens + beyond
    with lease(pair, plan, shape, sampling, len(ids), slots) as machine:
        first = []
        with span("prefill"):
            for row, prompt in enumerate(ids):
                own_seed = None if seed is None else seed + row
                uniforms = draw_uniforms(pair, slots + 1, sampling, own_seed)
                first.append(prefill(machine, row, prompt, uniforms))
        rows = [
            _Row(prompt.shape[1], int(token), max_new_tokens, pair.eos)
            for prompt, token in zip(ids, torch.cat(first).tolist(), strict=True)
        ]
        _run(machine, rows, span)
    if shape is None:
        return [Generation(cut(row.known, max_new_tokens, pair.eos)[0]) for row in rows]
    return [Generation(cut(row.known, max_new_tokens, pair.eos)[0], row.cycles) for row in rows]


class _Row:
    """What the host knows of a row: its length, its tokens (the last one is the root) and its cycles."""

    def __init__(self, length: int, first: int, limit: int, eos: frozenset[int]) -> None:
        self.length, self.known, self.cycles = length, [first], list[Cycle]()
        self.ended: Callable[[], bool] = lambda: cut(self.known, limit, eos)[1]

    def add(self, count: int, bonus: int, committed: list[int]) -> None:
        """Take in one cycle: `committed` begins with the root, which is known already."""
        self.cycles.append(Cycle(self.length, tuple(committed[:count]), bonus))
        self.known += [*committed[1:count], bonus]
        self.length += count


def _run(machine: Machine, rows: list[_Row], span: Span) -> None:
    """Step until every row has ended; a row that ends is made idle on the device, the only copy to it."""
    state, active = machine.state, set(range(len(rows)))
    for row in [row for row in active if rows[row].ended()]:
        active.discard(row)
        state.active[row] = False
    while active:
        out = machine.step(span)
        with span("to_host"):
            reports = (out.report if isinstance(out, CycleTensors) else out).tolist()
        for row in sorted(active):
            count, bonus, *committed = reports[row]
            rows[row].add(count, bonus, committed)
            if rows[row].ended():
                active.discard(row)
                state.active[row] = False
        state.visible_length = max(row.length for row in rows)
