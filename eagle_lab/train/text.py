"""Training text from the target itself: what is asked of it, what comes back, and the file that keeps it.

The idea is Magpie's (Xu et al., arXiv 2406.08464): given only the chat template's opening of a user turn, an
aligned model writes a plausible question, and then answers it. `eagle_lab.train.writer` lets it write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Text:
    """One training text: the ids of the prompt, template included, and of the answer, its end id included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What a row starts from. With `middle` the target first writes a question after `opening`; `middle` is the
    template from the end of the user turn to the start of the answer. Without it `opening` is a whole prompt."""

    opening: tuple[int, ...]
    middle: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextSettings:
    """How text is sampled. `greedy_share` of the answers are greedy, as decoding will be; the others and the
    questions are sampled at their temperatures among the `top_k` likeliest tokens. Limits count tokens."""

    batch: int = 64
    question_tokens: int = 96
    answer_tokens: int = 256
    question_temperature: float = 1.0
    answer_temperature: float = 0.6
    greedy_share: float = 0.5
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "question_tokens", "answer_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("question_temperature", "answer_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a temperature is 0 or more.")
        if not 0 <= self.greedy_share <= 1:
            raise ValueError(f"greedy_share is {self.greedy_share}; it must be from 0 to 1.")


def open_questions(tokenizer: Any) -> Request:
    """The request that lets the target write question and answer, from the tokenizer's own chat template.

    Raises ValueError where there is no template, or one that changes the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; give prompts as token ids instead.")
    mark = "\u241f"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    opening, found, middle = chat.partition(mark)
    if not found:
        raise ValueError(
            "the chat template drops or changes the user's text, so its opening cannot be found."
        )
    ids = [tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in (opening, middle)]
    return Request(*ids)


def ask(tokenizer: Any, prompt: str) -> Request:
    """The request for an answer to a user's prompt."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return Request(tuple(tokenizer(chat, add_special_tokens=False).input_ids))


def collect(texts: Iterable[Text], answer_tokens: int, forbidden: Iterable[Sequence[int]] = ()) -> list[Text]:
    """Texts with so many answer tokens in all; none twice, none whose prompt is in `forbidden` (held-out prompts).

    Answers of fewer than 8 tokens are left out. Shows a progress bar.
    """
    seen = {tuple(prompt) for prompt in forbidden}
    kept: list[Text] = []
    total = 0
    with tqdm(total=answer_tokens, unit="token", desc="text from the target") as bar:
        for text in texts:
            if text.prompt in seen or len(text.answer) < 8:
                continue
            seen.add(text.prompt)
            kept.append(text)
            total += len(text.answer)
            bar.update(len(text.answer))
            if total >= answer_tokens:
                break
    return kept


def save_texts(texts: Sequence[Text], path: str | Path, settings: TextSettings | None = None) -> None:
    """Write texts as safetensors: `ids` int32, and for each text `lengths` and `answers`, int32; atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "ids": torch.tensor([i for t in texts for i in (*t.prompt, *t.answer)], dtype=torch.int32),
        "lengths": torch.tensor([len(t.prompt) + len(t.answer) for t in texts], dtype=torch.int32),
        "answers": torch.tensor([len(t.answer) for t in texts], dtype=torch.int32),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"settings": json.dumps(asdict(settings) if settings else {})})
    os.replace(partial, path)


def load_texts(path: str | Path) -> list[Text]:
    """Texts that `save_texts` wrote."""
    with safe_open(path, "pt") as file:
        ids, lengths, answers = (file.get_tensor(name) for name in ("ids", "lengths", "answers"))
    texts = []
    for piece, answer in zip(ids.split(lengths.tolist()), answers.tolist(), strict=True):
        whole = piece.tolist()
        texts.append(Text(tuple(whole[:-answer]), tuple(whole[-answer:])))
    return texts
