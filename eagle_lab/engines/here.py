"""Arms that this process decodes itself: other strategies, trees, sampling and heads beside one target, and plain decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from eagle_lab.decode.generate import Cycle, check_shape, decode_stream, plain_stream
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import check
from eagle_lab.engines.arm import Arm
from eagle_lab.models.pair import Pair, check_dtype, with_head
from eagle_lab.models.weights import dtype_name


def of_pair(pair: Pair, arm: Arm | None = None) -> Arm:
    """The arm with the pair's own target, head and dtype: what a baseline inherits."""
    return replace(arm or Arm(), target=pair.target_name, draft=pair.draft_name, dtype=dtype_name(pair.dtype))


def is_here(pair: Pair, arm: Arm) -> bool:
    """Whether this process can decode the arm beside others on the pair's target; else it needs a process of its own."""
    elsewhere = arm.engine != "eagle_lab" or arm.code or arm.python or arm.command
    same = arm.target == pair.target_name and check_dtype(arm.dtype, pair.device) == pair.dtype
    return not elsewhere and same


def with_heads(pair: Pair, arms: Sequence[Arm]) -> list[Pair]:
    """Each arm's pair: the pair itself, or one with the arm's head on the same target, loaded once for each name.

    Raises ValueError and FileNotFoundError as `with_head` does.
    """
    found = {pair.draft_name: pair}
    for arm in arms:
        if not arm.plain and arm.draft not in found:
            found[arm.draft] = with_head(pair, arm.draft)
    return [pair if arm.plain else found[arm.draft] for arm in arms]


def check_arm(pair: Pair, arm: Arm) -> None:
    """ValueError, one sentence, where the arm's pair can't decode it on its device, before any work."""
    check(arm.strategy, pair.device, tree=not arm.plain)
    pair.check_attention(arm.strategy.attention)
    check_early(pair, arm.strategy, 1 if arm.plain else arm.shape.total_tokens + 1)
    if not arm.plain:
        check_shape(pair, arm.shape)


def cycles(
    pair: Pair, arm: Arm, prompt_ids: Sequence[int], max_new_tokens: int, seed: int | None = None
) -> Iterator[Cycle]:
    """One decode of the arm on its own pair, a cycle each time it is asked; a plain arm commits one token a cycle."""
    decoding = arm.decoding(max_new_tokens, seed)
    if arm.plain:
        return plain_stream(pair, prompt_ids, decoding)
    return decode_stream(pair, prompt_ids, decoding, record=False)
