"""Training-time test: the draft head runs on its own outputs during training, as it will while drafting.

Step 0 reads the fused taps under the causal mask. Step i feeds the head its output of step i - 1 with the true
tokens shifted by i more; its query at t sees the step-0 keys up to t, and the keys that steps 1…i made at the same
t, in one softmax. Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
All steps run over all places of the rows, so that every shape is fixed; what does not count is masked in the loss. On
CUDA the steps and their losses are one compiled function: apart, their passes over [B, T, T] and [B, T, vocabulary]
through the GPU's memory take most of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from eagle_lab.models.draft import DraftHead

DECAY = 0.8  # weight of a step's loss against the one before it
SHARPNESS = 3.0  # of lk_hybrid: how fast the weight moves from cross-entropy to acceptance
Loss = Literal["cross_entropy", "lk_hybrid"]


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


class Losses(NamedTuple):
    """What the steps of training-time test gave, one entry a step.

    total [steps] (with gradient): sum of the losses; counted and hits [steps]: how many drafts are in that sum, and how
    many of those were the target's argmax; correct and inside bool [steps, places]: the draft was right, and the text
    reaches that far.
    """

    total: Tensor
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


def ahead(x: Tensor, by: int, beyond: float) -> Tensor:
    """x [B, T] as seen from `by` places before: entry t is x[t + by], or `beyond` past the row's end."""
    there = torch.arange(x.shape[1], device=x.device) < x.shape[1] - by
    return torch.where(there, x.roll(-by, 1), beyond)


class StepAttention:
    """The attention of all steps of one batch over [B, heads, T, d]; visible bool [B, T, T]."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The next step: over the keys of step 0 by `visible`, and over those of later steps at the same place."""
        self.keys.append(key)
        self.values.append(value)
        rows, heads, count, size = query.shape
        shared = key.shape[1]
        q = query.view(rows, shared, heads // shared, count, size) * size**-0.5
        scores = (q.flatten(2, 3) @ self.keys[0].transpose(2, 3)).view(*q.shape[:4], count).float()
        scores = scores.masked_fill(~self.visible[:, None, None], float("-inf"))
        # one softmax over all columns, without joining them: by the log of its whole sum
        extra = [(q.float() * k[:, :, None].float()).sum(-1) for k in self.keys[1:]]
        total = torch.stack([scores.logsumexp(-1), *extra]).logsumexp(0)
        share = (scores - total[..., None]).exp().to(value.dtype)
        mixed = (share.flatten(2, 3) @ self.values[0]).view_as(q)
        for column, v in zip(extra, self.values[1:], strict=True):
            mixed = mixed + (column - total).exp()[..., None].to(value.dtype) * v[:, :, None]
        return mixed.view_as(query)


def asked(answer: Tensor, document: Tensor) -> Tensor:
    """Places bool [B, T] from which a draft can start: the next token is the answer's, one more follows in the text."""
    follows = ahead(answer, 1, 0).bool() & ahead(answer, 2, 0).bool()
    return follows & (ahead(document, 2, -2) == document)


def start_places(batch: Batch, most: int) -> Tensor:
    """The places of `asked` in the flattened rows first, then others up to `most`: int64 [most].

    A fixed number, so that one compiled function serves all batches; `most` must be at least their number.
    """
    start = asked(batch.answer, batch.document).flatten()
    return (~start).byte().argsort(stable=True)[:most]


def rollout(head: DraftHead, batch: Batch, steps: int) -> Iterator[Tensor]:
    """Yield the head's output h [B, T, H], step by step; past a text's end it means nothing."""
    attention = StepAttention(visible_within(batch.document))
    h = head.fuse(batch.taps)
    for i in range(steps):
        h = head(batch.ids.roll(-1 - i, 1), h, batch.positions + i, attention.attend)
        yield h


def _step_losses(
    head: DraftHead, batch: Batch, places: Tensor, steps: int, output: Tensor, loss: Loss
) -> Losses:
    with torch.no_grad():
        teacher = linear(batch.final.to(output.dtype), output).float().softmax(-1).flatten(0, 1)
        if teacher.is_cuda:  # it is read at every step, and its rounding is far below sampling noise
            teacher = teacher.bfloat16()
        start = asked(batch.answer, batch.document).flatten()[places]
    found = []
    for i, h in enumerate(rollout(head, batch, steps)):
        # the draft of step i stands at t + 2 + i and must belong to the same text
        best = ahead(batch.top1, 1 + i, -1).flatten()[places]
        reaches = (ahead(batch.document, 2 + i, -2) == batch.document).flatten()[places]
        inside = start & reaches & (best >= 0)
        counts = inside & head.t2d[best.clamp(min=0)] if head.config.mapped else inside
        # logits only where they count, about half of the places; float32, as its gradient is added up by place
        logits = head.logits(h.float().flatten(0, 1)[places]).float()
        wanted = teacher[(places + 1 + i).clamp(max=len(teacher) - 1)].float()
        entropy = logits.logsumexp(-1) * wanted.sum(-1) - (wanted * logits).sum(-1)
        correct = (head.target_ids(logits.argmax(-1)) == best) & inside
        total = torch.where(counts, entropy, 0).sum()
        if loss == "lk_hybrid":
            accepted = torch.where(counts, torch.minimum(logits.softmax(-1), wanted).sum(-1), 0).sum()
            weight = (-SHARPNESS * accepted.detach() / counts.sum().clamp(min=1)).exp()
            total = weight * total + (1 - weight) * (counts.sum() - accepted)
        found.append((total, counts.sum(), (correct & counts).sum(), correct, inside))
    return Losses(*(torch.stack(column) for column in zip(*found, strict=True)))


@lru_cache
def _losses_on(kind: str) -> Callable[[DraftHead, Batch, Tensor, int, Tensor, Loss], Losses]:
    return torch.compile(_step_losses, fullgraph=True, dynamic=False) if kind == "cuda" else _step_losses


def step_losses(
    head: DraftHead, batch: Batch, places: Tensor, steps: int, output: Tensor, loss: Loss = "cross_entropy"
) -> Losses:
    """The losses of all steps.

    Args: places: see `start_places`; steps: at least 1; output [draft vocab, H]: the rows of the target's output layer
    for the draft vocabulary.
    A place's loss is the cross-entropy of the draft against the target's softmax over the draft vocabulary; it counts
    where the target's argmax is in that vocabulary. `hits` are counted over the same places, `correct` over all.
    "lk_hybrid" (arXiv 2602.23881) weighs it by λ = exp(-3 α) and adds (1 - λ)(1 - α), where α is the mean over places of
    Σ min(draft, target), the chance that a sampled draft is accepted.
    """
    # one graph, also inside DDP: cut at its buckets, the part without gradients would leak into the next one
    with torch._dynamo.config.patch(optimize_ddp=False):
        return _losses_on(batch.ids.device.type)(head, batch, places, steps, output, loss)


def total_loss(total: Tensor, counted: Tensor) -> Tensor:
    """Σ 0.8^i · mean loss of step i, float32 []; both [steps], `counted` over all processes."""
    weights = DECAY ** torch.arange(len(total), device=total.device, dtype=torch.float32)
    return (weights * total / counted.clamp(min=1)).sum()


def chain_length(losses: Losses) -> tuple[float, int]:
    """Sum over places of how many drafts in a row are right, and the number of places: a chain's τ is 1 + their ratio."""
    return float(losses.correct.int().cummin(0).values.sum()), int(losses.inside[0].sum())
