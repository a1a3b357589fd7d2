"""Tokens a second and latency against the batch size, EAGLE-3 and plain decoding side by side.

A cycle's arithmetic grows with batch · nodes, plain decoding's only with the batch, so a batch that fills the machine
leaves speculative decoding nothing to gain: where that happens is what is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from statistics import median

from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.generate import decode, to_warm_up
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import Decoding, check
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.measure.records import Difference, Part
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import agree, settle
from eagle_lab.verdict.stats import Interval, paired_interval


class Batch(Part):
    """One batch size: seconds of each timed pair, plain and EAGLE-3, prefill included, and the plain one's new tokens.

    rows_parted: rows of the first batch that part at a near tie from what they give alone; widest_tie: the one whose
    margin is the largest for its tolerance.
    """

    batch: int
    new_tokens: list[int]
    plain_s: list[float]
    eagle_s: list[float]
    acceptance_length: float
    stated: bool
    strategy: str
    top_k: int
    depth: int
    total_tokens: int
    rows_parted: int
    widest_tie: Difference | None = None

    @cached_property
    def ratio(self) -> Interval:
        """EAGLE-3's time over plain decoding's: low, estimate, high."""
        return paired_interval(self.plain_s, self.eagle_s)

    @property
    def plain_rate(self) -> float:
        """Plain decoding's median of new tokens a second."""
        return median(t / s for t, s in zip(self.new_tokens, self.plain_s, strict=True))

    @property
    def eagle_rate(self) -> float:
        """EAGLE-3's median of new tokens a second."""
        return median(t / s for t, s in zip(self.new_tokens, self.eagle_s, strict=True))


def sweep(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 6,
    seed: int = 0,
    stated: float | None = None,
) -> list[Batch]:
    """Each batch size decoded both ways `repeats` times in random order.

    A batch takes the next prompts in turn. Before the first batch of a size is timed, its rows are held against what
    they give alone. With `stated` tokens a cycle (random weights accept next to nothing) EAGLE-3 decodes so many fewer
    tokens, a token a cycle or so. Raises ValueError for a bad batch size, before any decode, and ArmsDisagree where a
    row gives other tokens than alone and no near tie of logits explains it.
    """
    count = decoding.max_new_tokens if stated is None else math.ceil(decoding.max_new_tokens / stated)
    short, name = replace(decoding, max_new_tokens=count), str(decoding.strategy)
    for batch in batches:
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch size {batch!r} must be a whole number of at least 1.")
        plan = check(decoding.strategy, pair.device, rows=batch)
        check_early(pair, plan, batch * (decoding.shape.total_tokens + 1))
    found = []
    for batch in batches:
        groups = [
            [prompts[(first * batch + i) % len(prompts)].ids for i in range(batch)]
            for first in range(max(1, len(prompts) // batch))
        ]
        rows = rows_against_alone(pair, groups[0], short)
        for one in rows:
            settle(one, f"in a batch of {batch} {name!r} decodes other tokens than alone")
        made: list[int] = []
        cycles: list[float] = []

        def plain(ids: list[Sequence[int]], made: list[int] = made) -> None:
            done = decode_batch(pair, ids, decoding, plain=True)
            made.append(sum(len(row.tokens) for row in done))

        def eagle(ids: list[Sequence[int]], cycles: list[float] = cycles) -> None:
            done = decode_batch(pair, ids, short)
            cycles += [row.acceptance_length for row in done]

        longest = [max(map(len, group)) for group in groups[:repeats]]
        first = to_warm_up(longest, [decoding]) + to_warm_up(longest, [short])
        seconds = time_in_pairs(plain, eagle, groups, repeats, seed, pair.device, warmup=sorted(set(first)))
        found.append(
            Batch(
                batch=batch,
                new_tokens=made[-repeats:],  # the first ones warmed up
                plain_s=[p for p, _ in seconds],
                eagle_s=[e for _, e in seconds],
                acceptance_length=stated or sum(cycles) / len(cycles),
                stated=stated is not None,
                strategy=name,
                **asdict(decoding.shape),
                rows_parted=sum(row is not None for row in rows),
                widest_tie=widest(rows),
            )
        )
    return found


def rows_against_alone(
    pair: Pair, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[Difference | None]:
    """Where each row of one batch parts from the same prompt decoded alone, judged by the target's logits; None for the
    same tokens."""
    together = decode_batch(pair, prompts, decoding)
    return [
        agree(pair, ids, row.tokens, decode(pair, ids, decoding, record=False).tokens, decoding)
        for ids, row in zip(prompts, together, strict=True)
    ]


def widest(found: Sequence[Difference | None]) -> Difference | None:
    """The difference whose margin is the largest for its tolerance; None where there is none."""
    parted = [one for one in found if one is not None]
    return max(
        parted, key=lambda one: (one.margin or 0.0) / one.tolerance if one.tolerance else 0.0, default=None
    )


def crossing(found: Sequence[Batch], slower: bool = False) -> int | None:
    """The smallest batch from which on speculative decoding is not measured to be faster, or, with `slower`, is measured
    to be slower; None where there is none."""
    ends = [row.ratio[0] > 1 if slower else row.ratio[2] >= 1 for row in found]
    return next((row.batch for at, row in enumerate(found) if all(ends[at:])), None)
