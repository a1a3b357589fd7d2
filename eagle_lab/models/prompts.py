"""The kit's own prompts, and the ones a caller brings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from eagle_lab import ROOT

FILE = ROOT / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A prompt with the id that stands for it in records; `ids` are its token ids once encoded."""

    id: str
    category: str
    text: str
    ids: tuple[int, ...] = ()


def load_prompts(selection: str = "heldout") -> list[Prompt]:
    """Prompts of data/prompts.jsonl: "all", "train", "heldout", a category, or ids separated by commas.

    Categories take turns, so that the first few are a mixture. ValueError lists what can be selected.
    """
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_id = {row["id"]: row for row in rows}
    categories = list(dict.fromkeys(row["category"] for row in rows))
    if selection == "all":
        chosen = rows
    elif selection in ("train", "heldout"):
        chosen = [row for row in rows if row["split"] == selection]
    elif selection in categories:
        chosen = [row for row in rows if row["category"] == selection]
    else:
        wanted = [name.strip() for name in selection.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in by_id]
        if unknown or not wanted:
            raise ValueError(
                f"prompts {selection!r} is unknown; use all, train, heldout, a category ({', '.join(categories)}) "
                f"or ids such as {rows[0]['id']}."
            )
        return [_prompt(by_id[name]) for name in wanted]
    columns = [[row for row in chosen if row["category"] == category] for category in categories]
    return [_prompt(row) for row in chain.from_iterable(zip_longest(*columns)) if row]


def _prompt(row: dict[str, str]) -> Prompt:
    return Prompt(row["id"], row["category"], row["text"])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's turn, with the opening of the answer, by the tokenizer's chat template if it has one.

    Raises ValueError without a tokenizer, and for an empty text.
    """
    if tokenizer is None:
        raise ValueError("this target has no tokenizer; give the prompts as lists of token ids.")
    if not text.strip():
        raise ValueError("the prompt is empty; give some text.")
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(text)["input_ids"])


def prepare(tokenizer: Any, prompts: str | Sequence[str | Prompt | Sequence[int]]) -> list[Prompt]:
    """Encoded prompts from a selection, texts, `Prompt`s or lists of token ids; ValueError where there is none.

    What is no prompt of the kit's gets an id from its content, so that an id says what was decoded.
    """
    if not isinstance(prompts, str | Sequence) or isinstance(prompts, bytes):
        raise ValueError(
            f"prompts is {prompts!r}; it must be a selection, or a list of texts or of token ids."
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
        elif hasattr(item, "__iter__"):
            ids = tuple(item.flatten().tolist() if hasattr(item, "flatten") else item)
            found.append(Prompt(f"ids-{_digest(str(ids))}", "own", "", ids))
        else:
            raise ValueError(f"the prompts hold {item!r}, which is neither a text nor a list of token ids.")
    by_id: dict[str, Prompt] = {}
    for prompt in found:
        if by_id.setdefault(prompt.id, prompt) != prompt:
            raise ValueError(f"two different prompts have the id {prompt.id!r}; give each its own.")
    return found


def brought(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Token ids, as text, of the prompts that a caller brought: data/prompts.jsonl does not have those, by their ids."""
    kit = {prompt.id: prompt.text for prompt in load_prompts("all")}
    return {p.id: " ".join(map(str, p.ids)) for p in prompts if kit.get(p.id) != p.text}


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:8]
