"""Several prompts decoded together, each as if it were alone.

Rows have their own length, acceptance and end: a cycle's shapes are the same for all, and what differs lies in
tensors. A row that has ended repeats its last cycle and commits nothing, so that no shape changes; the batch ends with
its last row. Prompts are read one at a time, so that a row's prefill cannot depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eagle_lab.decode.cycle import CycleTensors
from eagle_lab.decode.generate import (
    Cycle,
    Generation,
    check_finite,
    check_prompt,
    check_shape,
    cut,
    draw_uniforms,
)
from eagle_lab.decode.session import Session, session
from eagle_lab.decode.strategy import Decoding, check
from eagle_lab.models.pair import Pair


@torch.inference_mode()
def decode_batch(
    pair: Pair, prompts: Sequence[Sequence[int] | Tensor], decoding: Decoding, *, plain: bool = False
) -> list[Generation]:
    """Decode several prompts, ids [n] each, at once: EAGLE-3 decoding, or, where `plain`, the target's own.

    Returns one `Generation` a prompt, its tokens those of the prompt alone (row r draws with seed + r); its cycles are
    those that it took part in before it ended, without their trees, and none for plain decoding.
    Raises ValueError for bad sizes, strategies and prompts before any forward.
    """
    strategy = check(decoding.strategy, pair.device, rows=len(prompts), tree=not plain)
    shape, limit = None if plain else decoding.shape, decoding.max_new_tokens
    if shape is not None:
        check_shape(pair, shape)
    if not len(prompts):
        raise ValueError("the batch is empty; give at least one prompt.")
    ids = [check_prompt(pair, prompt, limit) for prompt in prompts]
    longest = max(prompt.shape[1] for prompt in ids)
    slots = longest + limit + (shape.reach + shape.width if shape else 1)
    with session(pair, strategy, shape, decoding.sampling, len(ids), slots, longest) as ready:
        first = []
        for row, prompt in enumerate(ids):
            seed = None if decoding.seed is None else decoding.seed + row
            uniforms = draw_uniforms(pair, slots + 1, decoding.sampling, seed)
            first.append(ready.prefill(row, prompt, uniforms))
        tokens = [check_finite(pair, report)[1] for report in torch.stack(first).tolist()]
        rows = [
            _Row(prompt.shape[1], token, limit, pair.eos) for prompt, token in zip(ids, tokens, strict=True)
        ]
        _run(ready, rows)
    return [Generation(cut(row.known, limit, pair.eos)[0], [] if plain else row.cycles) for row in rows]


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


def _run(ready: Session, rows: list[_Row]) -> None:
    """Step until every row has ended; a row that ends is made idle on the device, the only copy to it."""
    state, active = ready.state, set(range(len(rows)))
    for row in [row for row in active if rows[row].ended()]:
        active.discard(row)
        state.active[row] = False
    while active:
        out = ready.step()
        reports = (out.report if isinstance(out, CycleTensors) else out).tolist()
        for row in sorted(active):
            count, bonus, *committed = check_finite(ready.pair, reports[row])
            rows[row].add(count, bonus, committed)
            if rows[row].ended():
                active.discard(row)
                state.active[row] = False
        state.visible_length = max(row.length for row in rows)
