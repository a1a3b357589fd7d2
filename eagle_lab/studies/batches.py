"""Tokens a second and latency against the batch size, EAGLE-3 and plain decoding side by side.

A cycle's arithmetic grows with batch · nodes, plain decoding's only with the batch, so a batch that fills the machine
leaves speculative decoding nothing to gain: where that happens is what is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.generate import decode, to_warm_up
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import Decoding, check
from eagle_lab.measure.pairs import time_in_pairs
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import Difference, agree, settle
from eagle_lab.verdict.old_form import words as told
from eagle_lab.verdict.stats import paired_interval


def sweep(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    strategy: str = "doubling",
    max_new_tokens: int = 24,
    repeats: int = 6,
    seed: int = 0,
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    stated: float | None = None,
) -> list[dict[str, Any]]:
    """Each batch size decoded both ways `repeats` times in random order; → JSON values, one a batch size.

    A batch takes the next prompts in turn. "plain" and "eagle": seconds of each decode and new tokens of each;
    "ratio": low, estimate and high (None: too few for one) of EAGLE-3's time over plain's. Prefill is part of both.
    "as_alone": whether the rows of the first batch give what they give alone, in words, asked before they are timed.
    With `stated` tokens a cycle (random weights accept next to nothing) EAGLE-3 decodes so many fewer tokens, a token
    a cycle or so. Raises ValueError for a bad batch size, before any decode, and ArmsDisagree where a row of a batch
    gives other tokens than alone and no near tie of logits explains it.
    """
    drafted = max_new_tokens if stated is None else math.ceil(max_new_tokens / stated)
    for batch in batches:
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch size {batch!r} must be a whole number of at least 1.")
        check_early(pair, check(strategy, pair.device, rows=batch), batch * (total_tokens + 1))
    sizes: dict[str, Any] = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    whole, short = (Decoding.of(count, strategy, **sizes) for count in (max_new_tokens, drafted))
    found = []
    for batch in batches:
        groups = [
            [prompts[(first * batch + i) % len(prompts)].ids for i in range(batch)]
            for first in range(max(1, len(prompts) // batch))
        ]
        rows = rows_against_alone(pair, groups[0], short)
        for one in rows:
            settle(one, f"in a batch of {batch} {strategy!r} decodes other tokens than alone")
        made: list[int] = []
        cycles: list[float] = []

        def plain(ids: list[Sequence[int]], made: list[int] = made) -> None:
            done = decode_batch(pair, ids, whole, plain=True)
            made.append(sum(len(row.tokens) for row in done))

        def eagle(ids: list[Sequence[int]], cycles: list[float] = cycles) -> None:
            done = decode_batch(pair, ids, short)
            cycles += [row.acceptance_length for row in done]

        longest = [max(map(len, group)) for group in groups[:repeats]]
        # with room for the most that either way decodes, the stated number of tokens and their drafts
        first = to_warm_up(longest, [whole]) + to_warm_up(longest, [short])
        seconds = time_in_pairs(plain, eagle, groups, repeats, seed, pair.device, warmup=sorted(set(first)))
        tokens = made[-repeats:]  # the first ones warmed up
        low, estimate, high = paired_interval([p for p, _ in seconds], [e for _, e in seconds])
        found.append({
            "batch": batch, "new_tokens": tokens, "plain_s": [p for p, _ in seconds], "eagle_s": [e for _, e in seconds],
            "ratio": [low, estimate, high if math.isfinite(high) else None], "acceptance_length": stated or sum(cycles) / len(cycles),
            "stated": stated is not None, "strategy": strategy, **sizes,
            "as_alone": alone_words(rows),
            "plain_tokens_per_s": median(t / p for t, (p, _) in zip(tokens, seconds, strict=True)),
            "eagle_tokens_per_s": median(t / e for t, (_, e) in zip(tokens, seconds, strict=True)),
        })  # fmt: skip
    return found


def rows_against_alone(
    pair: Pair, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[Difference | None]:
    """Each row of one batch against the same prompt decoded alone: None where the tokens are the same, else where they
    part, judged by the target's logits."""
    together = decode_batch(pair, prompts, decoding)
    found = []
    for ids, row in zip(prompts, together, strict=True):
        alone = decode(pair, ids, decoding, record=False)
        found.append(agree(pair, ids, row.tokens, alone.tokens, decoding))
    return found


def alone_words(found: Sequence[Difference | None]) -> str:
    """How many rows give what they give alone; of the others the one whose margin is the largest for its tolerance."""
    parted = [one for one in found if one is not None]
    words = f"{len(found) - len(parted)} of {len(found)}"
    if not parted:
        return words
    worst = max(parted, key=lambda one: (one.margin or 0.0) / one.tolerance if one.tolerance else math.inf)
    return f"{words}; {told(worst).removeprefix('tie: ')}"


def slower(found: Sequence[dict[str, Any]]) -> int | None:
    """The smallest batch from which on speculative decoding is measured to be slower; None where it never is."""
    for at, row in enumerate(found):
        if all(later["ratio"][0] > 1 for later in found[at:]):
            return int(row["batch"])
    return None


def crossing(found: Sequence[dict[str, Any]]) -> int | None:
    """The smallest batch from which on speculative decoding is not measured to be faster; None where it always is."""
    for at, row in enumerate(found):
        if all(later["ratio"][2] is None or later["ratio"][2] >= 1 for later in found[at:]):
            return int(row["batch"])
    return None
