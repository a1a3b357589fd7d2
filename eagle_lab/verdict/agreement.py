"""Do two decodes of one prompt agree? Where they part, whether a near tie of the target's logits explains it.

The same logits computed in one row and in 64 differ in their last bits, so in half precision an argmax can flip
where two logits nearly tie. `agree` recomputes the target's logits at the first difference in three shapes (the
prefix at once, one row, 64 rows as in a tree), in half precision by another attention too: how far they lie apart is the
arithmetic's error there, and a margin within a few times that error is a tie. Anything else is a bug.

Of an arm in another arithmetic, or of another target, the pair's target tells the margin, and nothing judges it.

An engine that samples by numbers of its own gives another text in each decode: `drawn` holds its tokens against the
target's distributions instead.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.stats import kstest
from torch import Tensor

from eagle_lab.decode.generate import draw_uniforms
from eagle_lab.decode.prefill import logits_after
from eagle_lab.decode.sampling import Sampling, distribution
from eagle_lab.decode.strategy import Decoding
from eagle_lab.engines.protocol import Decoded
from eagle_lab.measure.records import Difference
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.record import Draws

TREE_ROWS = 64
SAFETY = 4  # three or four ways are a small sample of all kernels that a decode may use


class ArmsDisagree(RuntimeError):
    """The two strategies decode different tokens, so their times can't be compared; the message says where."""


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first difference; None where both are the same, lengths included."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def settle(where: Difference | None, what: str) -> Difference | None:
    """`where` itself: None for the same tokens, or the near tie that parted them. Raises ArmsDisagree for any other
    difference, with `what` was seen to differ."""
    if where is None or where.tie:
        return where
    more = "" if where.tolerance is None else ", more than arithmetic explains"
    raise ArmsDisagree(f"{what}: {where}{more}.")


@torch.inference_mode()
def agree(
    pair: Pair, prompt_ids: Sequence[int], left: Sequence[int], right: Sequence[int], decoding: Decoding
) -> Difference | None:
    """None where two decodes of `prompt_ids` gave the same new tokens, else the first difference, judged.

    decoding: how both decoded: its sampling and seed, and the attention by which the target's logits are computed again.
    Raises ValueError for sampled decodes without a seed.
    """
    at = first_difference(left, right)
    if at is None:
        return None
    if at >= min(len(left), len(right)):
        return _unjudged(at, left, right)
    ids = [*(int(i) for i in prompt_ids), *left[:at]]
    sampling, seed = decoding.sampling, decoding.seed
    rows = logits_in_shapes(pair, ids, one_mask(decoding))
    pick = [left[at], right[at]]
    if sampling.temperature == 0:
        error = float((rows - rows[0]).abs().max())
        rounding = 2 * torch.finfo(pair.dtype).eps * float(rows[0].max().abs())
        margin = float(rows[0].max() - rows[0][pick].min())
        tolerance = max(SAFETY * error, rounding)
        return Difference(position=at, left=pick[0], right=pick[1], margin=margin, tolerance=tolerance)
    if seed is None:
        raise ValueError("sampled decodes can be judged only with their seed.")
    uniform = float(draw_uniforms(pair, len(ids) + 1, sampling, seed)[0, len(ids)])
    total = distribution(rows, sampling).cumsum(-1)
    error = float((total - total[0]).abs().max())
    edges = torch.cat((total.new_zeros(1), total[0] / total[0, -1]))
    short = [max(float(edges[token]) - uniform, uniform - float(edges[token + 1]), 0.0) for token in pick]
    tolerance = max(SAFETY * error, torch.finfo(pair.dtype).eps)
    return Difference(
        position=at, left=pick[0], right=pick[1], margin=max(short), tolerance=tolerance, unit="probability"
    )


@torch.inference_mode()
def drawn(pair: Pair, decodes: Sequence[tuple[Prompt, Decoded]], sampling: Sampling, seed: int = 0) -> Draws:
    """How well sampled decodes fit the target's distribution: each token's probability integral transform, tokens ranked by
    probability, is uniform if it was drawn from the target's distribution after what stands before it (Rosenblatt,
    Annals of Mathematical Statistics 23, 1952). seed: of the draw within a token's own probability.

    A text without ids is encoded again, which gives another id only where the engine's own ids are no usual encoding.
    """
    coin, places = np.random.default_rng(seed % 2**63), []
    for prompt, found in decodes:
        ids = found.tokens or pair.tokenizer.encode(found.text or "", add_special_tokens=False)
        before = torch.tensor([prompt.ids], dtype=torch.int64, device=pair.device)
        tokens = torch.tensor([ids], dtype=torch.int64, device=pair.device)
        chain = torch.ones(len(ids), len(ids), dtype=torch.bool, device=pair.device).tril()[None]
        depths = torch.arange(len(ids), device=pair.device)[None]
        first = logits_after(pair, before, tokens[:, :0], depths[:, :0], chain[:, :0, :0], "sdpa")[-1:]
        rest = logits_after(pair, before, tokens, depths, chain, "sdpa")[:-1]
        ranked, order = distribution(torch.cat((first, rest)), sampling).sort(descending=True, stable=True)
        at = (order == tokens[0][:, None]).int().argmax(-1, keepdim=True)
        high, own = (x.gather(-1, at)[:, 0].cpu().numpy() for x in (ranked.cumsum(-1), ranked))
        places.append(high - own * coin.random(len(ids)))
    each = np.concatenate(places)
    return Draws(tokens=len(each), p_value=float(kstest(each.clip(0, 1), "uniform").pvalue))


def parted(
    pair: Pair, prompt: Prompt, left: Decoded, right: Decoded, decoding: Decoding | None, judged: bool = True
) -> Difference | None:
    """Where two decodes of any engines part; None for the same ids, or the same text where one gave no ids.

    An id that ends the text doesn't count: not every engine gives it. decoding: how both decoded, for the margin; None
    where they decoded unlike, so that there is none. judged: both decoded the pair's target in its arithmetic, whose error
    is the tolerance; else the margin is told without one.
    """
    ids = [list(t[:-1] if t[-1] in pair.eos else t) for d in (left, right) if (t := d.tokens)]
    if len(ids) == 2:
        # another target may have more tokens
        if decoding is not None and max(itertools.chain(*ids), default=0) < pair.config.vocab_size:
            where = agree(pair, prompt.ids, ids[0], ids[1], decoding)
            return where if where is None or judged else where.model_copy(update={"tolerance": None})
        at = first_difference(*ids)
        return None if at is None else _unjudged(at, ids[0], ids[1])
    texts = [_decoded(pair, d.tokens) if d.tokens else d.text or "" for d in (left, right)]
    if texts[0] == texts[1]:
        return None
    shared = len(os.path.commonprefix(texts))
    known = ids[0] if ids else []
    at = next((n for n in range(len(known)) if len(_decoded(pair, known[: n + 1])) > shared), len(known))
    return _unjudged(at, known, (), "text")


def _unjudged(
    at: int, left: Sequence[int], right: Sequence[int], unit: Literal["logit", "text"] = "logit"
) -> Difference:
    """Where two decodes part, without a margin; an id is None where its decode had already ended."""
    one, other = (ids[at] if at < len(ids) else None for ids in (left, right))
    return Difference(position=at, left=one, right=other, margin=None, tolerance=None, unit=unit)


def _decoded(pair: Pair, tokens: Sequence[int]) -> str:
    return pair.tokenizer.decode(tokens, skip_special_tokens=True)


def one_mask(decoding: Decoding) -> str:
    """The attention that was asked for, where it looks through one mask; else "sdpa", which any target has that can do without."""
    return "eager" if decoding.strategy.attention == "eager" else "sdpa"


def logits_in_shapes(pair: Pair, ids: Sequence[int], attention: str = "sdpa") -> Tensor:
    """The target's next-token logits after `ids`, float32 [N, V]: all rows at once, one row, 64 rows as a tree.

    In fewer bits than float32 by another attention too, so that errors of rounding before the last rows count as well:
    a library may give the three shapes the same kernel, and they are then alike to the last bit.
    """
    prompt = torch.tensor([list(ids)], dtype=torch.int64, device=pair.device)

    def after(length: int, rows: int, attention: str = attention) -> Tensor:
        alone = torch.eye(rows, dtype=torch.bool, device=pair.device)[None]
        tokens = prompt[:, length : length + 1].expand(1, rows)
        return logits_after(pair, prompt[:, :length], tokens, torch.zeros_like(tokens), alone, attention)[0]

    length = prompt.shape[1]
    shapes = [after(length, 0)]
    if length > 1:
        shapes += [after(length - 1, rows) for rows in (1, TREE_ROWS)]
    other = "sdpa" if attention == "eager" else "eager"
    able = other == "eager" or getattr(pair.target, "_supports_sdpa", True)
    if pair.dtype.itemsize < torch.float32.itemsize and able and not pair.asks.lost_by(other):
        shapes.append(after(length, 0, other))
    return torch.stack(shapes)
