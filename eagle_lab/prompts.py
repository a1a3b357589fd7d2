"""The kit's own prompts, and the ones a caller brings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "data" / "prompts.jsonl"


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
    """Encoded prompts from a selection, texts, `Prompt`s or lists of token ids; ValueError where there is none."""
    given: Sequence[Any] = load_prompts(prompts) if isinstance(prompts, str) else list(prompts)
    if not given:
        raise ValueError("there are no prompts; give at least one.")
    found = []
    for number, item in enumerate(given):
        if isinstance(item, Prompt):
            found.append(
                Prompt(item.id, item.category, item.text, item.ids or tuple(encode(tokenizer, item.text)))
            )
        elif isinstance(item, str):
            found.append(Prompt(f"text-{number}", "own", item, tuple(encode(tokenizer, item))))
        else:
            found.append(Prompt(f"ids-{number}", "own", "", tuple(item)))
    return found
