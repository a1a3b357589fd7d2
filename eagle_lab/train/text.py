"""Training text from the target itself: what is asked of it, and the texts that come back, side by side in arrays.

The idea is Magpie's (Xu et al., arXiv 2406.08464): given only the chat template's opening of a user turn, an
aligned model writes a plausible question, and then answers it. `writer` lets it write, `corpus` keeps it on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from eagle_lab.runtime.checks import Field, settings

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Heat = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Text:
    """One training text: the ids of the prompt, template included, and of the answer, its end id included.

    `greedy`: the answer is the target's argmax, token by token.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    greedy: bool = False


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """The places of many spans, one span after another, int64 [sum of lengths]."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum(dtype=np.int64)))


@dataclass(frozen=True)
class Texts:
    """Many texts in four arrays.

    ids int32 [tokens of all texts]; lengths int32 [texts], the tokens of each; answers int32 [texts], how many of those,
    at the end, are the answer's; greedy bool [texts].
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    answers: NDArray[np.int32]
    greedy: NDArray[np.bool_]

    @classmethod
    def of(cls, texts: Iterable[Text]) -> Texts:
        """The same texts in arrays."""
        given = list(texts)
        ids = [np.asarray((*t.prompt, *t.answer), np.int32) for t in given]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *ids]),
            np.asarray([len(i) for i in ids], np.int32),
            np.asarray([len(t.answer) for t in given], np.int32),
            np.asarray([t.greedy for t in given], np.bool_),
        )

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        """All texts of the parts, in their order."""
        whole = [cls.of([]), *parts]
        return cls(
            *(np.concatenate([vars(part)[name] for part in whole]) for name in cls.__dataclass_fields__)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of all texts together."""
        return int(self.answers.sum(dtype=np.int64))

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each text begins in `ids`, int64 [texts]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def __iter__(self) -> Iterator[Text]:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        columns = (ends, self.lengths, self.answers, self.greedy)
        for end, length, answer, greedy in zip(*(c.tolist() for c in columns), strict=True):
            whole = self.ids[end - length : end].tolist()
            yield Text(tuple(whole[: length - answer]), tuple(whole[length - answer :]), greedy)

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> Texts:
        """The texts of those numbers, in that order."""
        chosen = np.asarray(numbers, np.int64)
        ids = self.ids[spans(self.starts[chosen], self.lengths[chosen])]
        return Texts(ids, self.lengths[chosen], self.answers[chosen], self.greedy[chosen])

    def mixed(self, greedy_share: float) -> Texts:
        """The most texts, in their order, of which this share is greedy; ValueError where there are none of a kind."""
        kinds = [np.flatnonzero(self.greedy == kind) for kind in (True, False)]
        shares = (greedy_share, 1 - greedy_share)
        counts = [len(kind) / share for kind, share in zip(kinds, shares, strict=True) if share]
        if not min(counts):
            raise ValueError(f"the texts have none of a kind that greedy_share={greedy_share:g} asks for.")
        kept = [kind[: round(share * min(counts))] for kind, share in zip(kinds, shares, strict=True)]
        return self.take(np.sort(np.concatenate(kept)))

    def answer_ids(self) -> NDArray[np.int32]:
        """The ids of all answers, one after another."""
        place = np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)
        return self.ids[place >= np.repeat(self.lengths - self.answers, self.lengths)]

    def first(self, answer_tokens: int) -> Texts:
        """The first texts that hold so many answer tokens, or all."""
        total = np.cumsum(self.answers, dtype=np.int64)
        count = min(len(self), int(np.searchsorted(total, answer_tokens)) + 1)
        end = int(self.lengths[:count].sum(dtype=np.int64))
        return Texts(self.ids[:end], self.lengths[:count], self.answers[:count], self.greedy[:count])


@dataclass(frozen=True)
class Request:
    """What a row starts from. With `middle` the target first writes a question after `opening`; `middle` is the
    template from the end of the user turn to the start of the answer. Without it `opening` is a whole prompt."""

    opening: tuple[int, ...]
    middle: tuple[int, ...] = ()


@settings
class TextSettings:
    """How text is sampled. `greedy_share` of the answers are greedy, as decoding will be; the others and the
    questions are sampled at their temperatures among the `top_k` likeliest tokens. Limits count tokens."""

    batch: Count = 64
    question_tokens: Count = 96
    answer_tokens: Count = 256
    question_temperature: Heat = 1.0
    answer_temperature: Heat = 0.6
    greedy_share: Share = 0.5
    top_k: Count = 50
    seed: int = 0


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
