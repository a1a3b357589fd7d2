"""Training-time test: the draft head runs on its own outputs during training, as it will while drafting.

Step 0 reads the fused taps under the causal mask. Step i feeds the head its output of step i - 1 with the true
tokens shifted by i more; its query at t sees the step-0 keys up to t, and the keys that steps 1…i made at the same
t, in one softmax. Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, scaled_dot_product_attention

from eagle_lab.draft import DraftHead

DECAY = 0.8  # weight of a step's loss against the one before it


@dataclass(frozen=True)
class Batch:
    """Packed rows, several texts a row, and what the target said of them.

    ids int64 [B, T]; document int64 [B, T], -1 for padding; positions int64 [B, T], from 0 in each text; answer bool
    [B, T]: the token is the target's own; taps [B, T, taps · H]; final [B, T, H], the target's last hidden state
    after its norm; top1 int64 [B, T], the target's argmax for the next token, -1 where nobody asks.
    """

    ids: Tensor
    document: Tensor
    positions: Tensor
    answer: Tensor
    taps: Tensor
    final: Tensor
    top1: Tensor


@dataclass(frozen=True)
class StepLoss:
    """What one step of training-time test gave: the loss (scalar, with gradient), how many drafts count, how many of
    them were the target's argmax, and correct bool [S] over all asked positions (False where outside the text)."""

    loss: Tensor
    counted: Tensor
    hits: Tensor
    correct: Tensor
    inside: Tensor


def visible_within(document: Tensor) -> Tensor:
    """Who sees whom in packed rows: bool [B, T, T], causal inside each text; padding sees itself."""
    count = document.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool, device=document.device).tril()
    same = document[:, :, None] == document[:, None, :]
    return causal & same


class StepAttention:
    """The attention of all steps of one batch. Step 0 gets all positions, later steps only the `chosen` ones.

    Args: visible bool [B, T, T]; chosen int64 [S], flat places b · T + t.
    """

    def __init__(self, visible: Tensor, chosen: Tensor) -> None:
        self.visible, self.chosen = visible, chosen
        self.keys = self.values = torch.empty(0)
        self.later_keys: list[Tensor] = []
        self.later_values: list[Tensor] = []

    def first(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Step 0 over [B, heads, T, d]."""
        self.keys, self.values = key, value
        return scaled_dot_product_attention(
            query, key, value, attn_mask=self.visible[:, None], enable_gqa=True
        )

    def _spread(self, x: Tensor) -> Tensor:
        rows, count = self.visible.shape[:2]
        flat = x.new_zeros(rows * count, *x.shape[1:2], x.shape[3])
        return (
            flat.index_copy(0, self.chosen, x[0].transpose(0, 1))
            .view(rows, count, *flat.shape[1:])
            .transpose(1, 2)
        )

    def later(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A step after the first over the chosen positions, [1, heads, S, d]."""
        self.later_keys.append(self._spread(key))
        self.later_values.append(self._spread(value))
        rows, count = self.visible.shape[:2]
        heads, size, shared = query.shape[1], query.shape[3], key.shape[1]
        groups = heads // shared
        q = self._spread(query * size**-0.5).reshape(rows, shared, groups * count, size)
        scores = (q @ self.keys.transpose(2, 3)).view(rows, shared, groups, count, count)
        scores = scores.masked_fill(~self.visible[:, None, None], float("-inf"))
        q = q.view(rows, shared, groups, count, size)
        extra = [(q * k[:, :, None]).sum(-1, keepdim=True) for k in self.later_keys]
        share = torch.cat((scores, *extra), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = (share[..., :count].reshape(rows, shared, groups * count, count) @ self.values).view_as(q)
        for j, v in enumerate(self.later_values):
            mixed = mixed + share[..., count + j, None] * v[:, :, None]
        flat = mixed.reshape(rows, heads, count, size).transpose(1, 2).reshape(rows * count, heads, size)
        return flat[self.chosen].transpose(0, 1)[None]


def asked(batch: Batch) -> Tensor:
    """Flat places int64 [S] from which a draft can start: the next token is the answer's, one more follows in the text."""
    same = torch.zeros_like(batch.answer)
    same[:, :-2] = (
        batch.answer[:, 1:-1] & batch.answer[:, 2:] & (batch.document[:, :-2] == batch.document[:, 2:])
    )
    return same.flatten().nonzero()[:, 0]


def rollout(head: DraftHead, batch: Batch, steps: int, chosen: Tensor):  # type: ignore[no-untyped-def]
    """Yield the head's output h [S, H] at the chosen places, step by step."""
    attention = StepAttention(visible_within(batch.document), chosen)
    flat_ids, last = batch.ids.flatten(), batch.ids.numel() - 1
    h = head(batch.ids.roll(-1, 1), head.fuse(batch.taps), batch.positions, attention.first)
    h = h.flatten(0, 1)[chosen][None]
    yield h[0]
    for i in range(1, steps):
        ids = flat_ids[(chosen + 1 + i).clamp(max=last)][None]
        h = head(ids, h, batch.positions.flatten()[chosen][None] + i, attention.later)
        yield h[0]


def _entropy(logits: Tensor, teacher: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    # cross-entropy of logits [S, V] against rows `where` int64 [S] of teacher [P, V], and the argmax
    logits = logits.float()
    return -(teacher[where] * log_softmax(logits, -1)).sum(-1), logits.argmax(-1)


@lru_cache
def _entropy_on(kind: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    # in separate operations each pass over [S, V] goes through a GPU's memory: half of a training step's time
    return torch.compile(_entropy) if kind == "cuda" else _entropy


def step_losses(head: DraftHead, batch: Batch, steps: int, output: Tensor) -> list[StepLoss]:
    """The losses of all steps.

    Args: steps: at least 1; output [draft vocab, H]: the rows of the target's output layer for the draft vocabulary.
    A step's loss is the mean cross-entropy of the draft against the target's softmax over the draft vocabulary, where
    the target's argmax is in that vocabulary. `hits` are counted over the same places, `correct` over all.
    """
    chosen = asked(batch)
    last = batch.ids.numel() - 1
    document, final, top1 = batch.document.flatten(), batch.final.flatten(0, 1), batch.top1.flatten()
    with torch.no_grad():
        # one row of teacher for each place that some step asks about
        places, where = torch.unique(
            torch.cat([(chosen + 1 + i).clamp(max=last) for i in range(steps)]), return_inverse=True
        )
        teacher = linear(final[places].to(output.dtype), output).float().softmax(-1)
        if teacher.is_cuda:
            teacher = (
                teacher.bfloat16()
            )  # it is read at every step, and its rounding is far below sampling noise
        where = where.view(steps, -1)
    found = []
    for i, h in enumerate(rollout(head, batch, steps, chosen)):
        place = (chosen + 1 + i).clamp(max=last)
        best = top1[place]
        # the token drafted at step i stands at chosen + 2 + i and must belong to the same text
        inside = (
            (document[(chosen + 2 + i).clamp(max=last)] == document[chosen])
            & (chosen + 2 + i <= last)
            & (best >= 0)
        )
        known = head.t2d[best.clamp(min=0)] if head.config.mapped else torch.ones_like(inside)
        counts = inside & known
        entropy, drafted = _entropy_on(h.device.type)(head.logits(h), teacher, where[i])
        correct = (head.target_ids(drafted) == best) & inside
        number = counts.sum()
        loss = torch.where(counts, entropy, 0).sum() / number.clamp(min=1)
        found.append(StepLoss(loss, number, (correct & counts).sum(), correct, inside))
    return found


def total_loss(losses: list[StepLoss]) -> Tensor:
    """Σ 0.8^i · loss of step i, float32 []."""
    return torch.stack([DECAY**i * step.loss for i, step in enumerate(losses)]).sum()


def chain_length(losses: list[StepLoss]) -> tuple[float, int]:
    """Sum over places of how many drafts in a row are right, and the number of places: a chain's τ is 1 + their ratio."""
    running, total = losses[0].inside.clone(), 0
    for step in losses:
        running &= step.correct
        total += int(running.sum())
    return float(total), int(losses[0].inside.sum())
