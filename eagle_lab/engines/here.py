"""Arms that this process decodes itself: other strategies, trees, sampling and heads beside one target, and plain decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from eagle_lab.decode.generate import Cycle, check_shape, decode_stream, plain_stream
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import check
from eagle_lab.engines.arm import PLACE, Arm
from eagle_lab.models.pair import Pair, check_dtype, with_head
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.clock import Span, no_span


def base_arm(pair: Pair, arm: Arm | None = None) -> Arm:
    """The arm with the pair's own target, head, dtype and quantization: what a baseline inherits."""
    return replace(
        arm or Arm(), target=pair.target_name, draft=pair.draft_name, dtype=dtype_name(pair.dtype),
        quantization=pair.quantization,
    )  # fmt: skip


def is_here(pair: Pair, arm: Arm) -> bool:
    """Whether this process can decode the arm beside others on the pair's target; else it needs a process of its own."""
    return is_beside(base_arm(pair), arm, pair.device)


def is_beside(base: Arm, arm: Arm, device: torch.device) -> bool:
    """`is_here` for a pair on the device, loaded or not, by what its baseline inherits (`base_arm`)."""
    elsewhere = any(getattr(arm, key) != getattr(Arm, key) for key in PLACE)
    same = arm.target == base.target and check_dtype(arm.dtype, device) == check_dtype(base.dtype, device)
    return not elsewhere and same and arm.quantization == base.quantization


def pair_of(pair: Pair, arm: Arm) -> Pair:
    """The pair that decodes the arm: `pair` itself, or one beside it with the arm's head, loaded once.

    Raises ValueError and FileNotFoundError as `with_head` does.
    """
    if arm.plain or arm.draft in ("", pair.draft_name):
        return pair
    if arm.draft not in pair.beside:
        pair.beside[arm.draft] = with_head(pair, arm.draft)
    return pair.beside[arm.draft]


def check_arm(pair: Pair, arm: Arm) -> None:
    """ValueError, one sentence, where the arm's pair (`pair_of`) can't decode it on its device, before any work."""
    check(arm.strategy, pair.device, tree=not arm.plain)
    pair.check_attention(arm.strategy.attention)
    check_early(pair, arm.strategy, 1 if arm.plain else arm.shape.total_tokens + 1)
    if not arm.plain:
        check_shape(pair, arm.shape)


def cycles(
    pair: Pair,
    arm: Arm,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    seed: int | None = None,
    span: Span = no_span,
    record: bool = False,
) -> Iterator[Cycle]:
    """One decode of the arm, a cycle each time it is asked, `record`: with its tree; a plain arm commits one token a cycle."""
    own, decoding = pair_of(pair, arm), arm.decoding(max_new_tokens, seed)
    if arm.plain:
        return plain_stream(own, prompt_ids, decoding, span=span)
    return decode_stream(own, prompt_ids, decoding, record=record, span=span)
