"""Prompts: the kit's own, and the ones that a caller brings as text or as token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from eagle_lab import ROOT
from eagle_lab.runtime.checks import short

FILE = ROOT / "data" / "prompts.jsonl"
# what a head learns from, what its checkpoint is chosen by, what its acceptance is reported on, and prompts of other kinds
# that came after all of its settings were chosen
SPLITS = ("train", "validation", "heldout", "fresh")


@dataclass(frozen=True)
class Prompt:
    """A prompt. `id` stands for it in records; `ids` are its token ids, empty until it is encoded.

    `text` is a user's turn, or the turns of a conversation, the user's first and last.
    """

    id: str
    category: str
    text: str | tuple[str, ...]
    ids: tuple[int, ...] = ()


def load_prompts(selection: str = "heldout") -> list[Prompt]:
    """Prompts of data/prompts.jsonl: "all", a split, a category, or ids separated by commas.

    Categories take turns, so that the first few are a mixture. ValueError lists what can be selected.
    """
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_id = {row["id"]: row for row in rows}
    categories = list(dict.fromkeys(row["category"] for row in rows))
    if selection == "all":
        chosen = rows
    elif selection in SPLITS:
        chosen = [row for row in rows if row["split"] == selection]
    elif selection in categories:
        chosen = [row for row in rows if row["category"] == selection]
    else:
        wanted = [name.strip() for name in selection.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in by_id]
        if unknown or not wanted:
            raise ValueError(
                f"prompts {selection!r} is unknown; use all, {', '.join(SPLITS)}, a category ({', '.join(categories)}) "
                f"or ids such as {rows[0]['id']}."
            )
        return [_prompt(by_id[name]) for name in wanted]
    columns = [[row for row in chosen if row["category"] == category] for category in categories]
    return [_prompt(row) for row in chain.from_iterable(zip_longest(*columns)) if row]


def _prompt(row: dict[str, Any]) -> Prompt:
    text = row["text"]
    return Prompt(row["id"], row["category"], text if isinstance(text, str) else tuple(text))


def token_ids(prompt: Any) -> list[int]:
    """The token ids of one prompt, from any form in which a tokenizer gives them.

    Args: prompt: a list or tuple of ids, a tensor or array [L] or [1, L], a list that holds one such list, or the
    mapping that a tokenizer returns. Raises ValueError, one sentence, for several prompts at once, for text, and for
    what holds no whole numbers.
    """
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        mask = prompt.get("attention_mask")
        if mask is not None and 0 in token_ids(mask):
            raise ValueError(
                "this prompt is padded: its attention_mask holds zeros; encode it without padding."
            )
        prompt = prompt["input_ids"]
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = prompt.tolist()
    if isinstance(prompt, str | bytes | Mapping | Set) or not isinstance(prompt, Iterable):
        raise ValueError(
            f"a prompt is {short(prompt)}; it must be a list of token ids; `encode` makes one of a text."
        )
    ids = list(prompt)
    # scalars of numpy and torch are ids, not rows
    if ids and all(
        getattr(row, "ndim", isinstance(row, Sequence) and not isinstance(row, str)) for row in ids
    ):
        if len(ids) > 1:
            raise ValueError(
                f"these token ids are {len(ids)} prompts; give one prompt at a time, or a list of them."
            )
        return token_ids(ids[0])
    ids = [i.item() if hasattr(i, "item") else i for i in ids]  # a list of numpy's or torch's scalars
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool)), None)
    if wrong is not None:
        raise ValueError(f"the prompt holds {short(wrong)}, which is not a token id.")
    return ids


def encode(tokenizer: Any, text: str | Sequence[str]) -> list[int]:
    """Token ids of a user's turn, with the opening of the answer, by the tokenizer's chat template if it has one.

    text: one turn, or the turns of a conversation, the user's first and last. Without a template the turns stand in
    paragraphs. Raises ValueError without a tokenizer, for what is no text, for an empty turn, and for turns that the
    user doesn't end.
    """
    if tokenizer is None:
        raise ValueError("this target has no tokenizer; give the prompts as lists of token ids.")
    turns = [text] if isinstance(text, str) else text
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f"the text to encode is {short(text)}; it must be one text, or the turns of a conversation."
        )
    if not all(turn.strip() for turn in turns):
        raise ValueError("the prompt is empty; give some text.")
    if len(turns) % 2 == 0:
        raise ValueError(
            f"the conversation has {len(turns)} turns; it must end with the user's, so their number is odd."
        )
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "assistant" if at % 2 else "user", "content": turn} for at, turn in enumerate(turns)]
        return token_ids(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    return token_ids(tokenizer("\n\n".join(turns))["input_ids"])


def prepare(tokenizer: Any, prompts: str | Sequence[str | Prompt | Sequence[int]]) -> list[Prompt]:
    """Encoded prompts from a selection, texts, `Prompt`s or token ids in any form of `token_ids`.

    A prompt that isn't the kit's gets an id from its content, so that an id says what was decoded.
    Raises ValueError, one sentence, where there is no prompt or where one is of no known form.
    """
    if not isinstance(prompts, str | Sequence) or isinstance(prompts, bytes):
        raise ValueError(
            f"prompts is {short(prompts)}; it must be a selection, or a list of texts or of token ids."
        )
    given: Sequence[Any] = load_prompts(prompts) if isinstance(prompts, str) else list(prompts)
    if not given:
        raise ValueError("there are no prompts; give at least one.")
    found = []
    for item in given:
        if isinstance(item, Prompt):
            found.append(
                Prompt(item.id, item.category, item.text, item.ids or tuple(encode(tokenizer, item.text)))
            )
        elif isinstance(item, str):
            found.append(Prompt(f"text-{_digest(item)}", "own", item, tuple(encode(tokenizer, item))))
        elif isinstance(item, Iterable) and not isinstance(item, bytes):
            ids = tuple(token_ids(item))
            found.append(Prompt(f"ids-{_digest(str(ids))}", "own", "", ids))
        else:
            raise ValueError(
                f"the prompts hold {short(item)}, which is neither a text nor a list of token ids."
            )
    by_id: dict[str, Prompt] = {}
    for prompt in found:
        if by_id.setdefault(prompt.id, prompt) != prompt:
            raise ValueError(f"two different prompts have the id {prompt.id!r}; give each its own.")
    return found


def ready(
    tokenizer: Any,
    vocabulary: int,
    prompts: str | Sequence[str | Prompt | Sequence[int]],
    most: int | None = None,
) -> list[Prompt]:
    """`prepare`, of a selection the first `most`; without a tokenizer as many of 64 random ids as a selection has, named
    so and always the same."""
    if not isinstance(prompts, str):
        return prepare(tokenizer, prompts)
    chosen = load_prompts(prompts)[:most]
    if tokenizer is not None:
        return prepare(tokenizer, chosen)
    coin, ids = random.Random(0), range(min(10, vocabulary - 1), vocabulary)
    return [
        Prompt(f"random-{n}", "random ids", "", tuple(coin.choices(ids, k=64))) for n in range(len(chosen))
    ]


def brought(prompts: Sequence[Prompt]) -> dict[str, str]:
    """By id, the token ids, as text, of the prompts that data/prompts.jsonl doesn't have."""
    kit = {prompt.id: prompt.text for prompt in load_prompts("all")}
    return {p.id: " ".join(map(str, p.ids)) for p in prompts if kit.get(p.id) != p.text}


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:8]
