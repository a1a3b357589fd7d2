"""Acceptance without the target's forwards: greedy decoding against a text that the target has already written.

Greedy acceptance asks the target for nothing but its argmax and its hidden states along the text that it will write
anyway. Once that text is known, one forward over it holds every answer, and the kit's own decoder can run against the
stored ones: the same trees, the same accepted paths (up to ties in the arithmetic), a fraction of the time on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eagle_lab.models.pair import Pair
from eagle_lab.train.text import Request, TextSettings
from eagle_lab.train.writer import write


def greedy_texts(
    pair: Pair, prompts: Sequence[Sequence[int]], new_tokens: int, batch: int = 64
) -> list[list[int]]:
    """Each prompt's ids with the target's greedy continuation of exactly `new_tokens`, end ids ignored."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    settings = TextSettings(batch=min(batch, len(prompts)), answer_tokens=new_tokens, greedy_share=1.0)
    made = write(pair.target, (Request(tuple(prompts[i])) for i in order), settings, [])
    found = {text.prompt: text.answer for text in made}
    return [[*prompt, *found[tuple(prompt)]] for prompt in prompts]


@contextmanager
def replayed(pair: Pair, ids: Sequence[int], start: int = 1) -> Iterator[float]:
    """Inside, the pair's target only answers from one forward over `ids`, its own greedy text.

    Yields the share of the tokens from place `start` on that are that forward's argmax: 1 for a greedy text, less where
    the arithmetic of one row and of many tie differently. Only greedy decoding of a prefix of `ids` means anything
    here; places past the end repeat the last answer.
    """
    text = torch.tensor([list(ids)], device=pair.device)
    pair.target.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = pair.target(input_ids=text, use_cache=False).logits[0]
        stored = {index: hidden[0].clone() for index, hidden in pair.tapped.items()}
    follows = text[0, 1:]
    agreement = float((logits[start - 1 : -1].argmax(-1) == follows[start - 1 :]).float().mean())
    vocabulary = logits.shape[-1]
    del logits

    def forward(
        input_ids: Tensor, position_ids: Tensor, logits_to_keep: int = 0, **others: Any
    ) -> SimpleNamespace:
        at = position_ids.clamp(max=len(follows) - 1)
        for index, hidden in stored.items():
            pair.tapped[index] = hidden[at]
        asked = at[:, -logits_to_keep:] if logits_to_keep else at
        answer = torch.zeros(*asked.shape, vocabulary, device=pair.device, dtype=pair.dtype)
        return SimpleNamespace(logits=answer.scatter_(-1, follows[asked][..., None], 1.0))

    pair.target.forward = forward
    try:
        yield agreement
    finally:
        del pair.target.forward
