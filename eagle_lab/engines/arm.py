"""`Arm`: one side of a comparison, with a short written form.

A written arm is a list of KEY=VALUE with commas between; a value with a comma stands in double quotes. `parse` reads it
on top of another arm: what the text doesn't name is inherited, the candidate's from the baseline, the baseline's from
the pair and the keywords of `compare`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import AXES, DRAFT_AXES, Decoding, Strategy, choices
from eagle_lab.decode.tree import TreeShape
from eagle_lab.runtime.checks import nearest, settings

Engine = Literal["eagle_lab", "official", "vllm", "openai"]


@settings
class Arm:
    """What decodes, and how. "" stands for a text that nobody gave.

    plain: the target alone; shape and draft then mean nothing. draft, target, dtype, quantization: as `load` takes them,
    or as another engine calls it. code: a git revision of this checkout, or a folder; python: the interpreter; command: a
    program that speaks the protocol, in place of an engine; url: a server's address; tensor_parallel_size: the processes,
    each with a GPU of its own, that split the target. Raises ValueError, one sentence, for values that make no arm.
    """

    strategy: Strategy = Strategy()
    plain: bool = False
    shape: TreeShape = TreeShape()
    sampling: Sampling = Sampling()
    draft: str = ""
    target: str = ""
    dtype: str = ""
    quantization: str = ""
    engine: Engine = "eagle_lab"
    code: str = ""
    python: str = ""
    command: str = ""
    url: str = ""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if self.engine == "official" and not self.code:
            raise ValueError("engine=official needs code=FOLDER, a checkout of SafeAILab/EAGLE or of a fork.")
        if self.engine == "openai" and not self.url:
            raise ValueError("engine=openai needs url=ADDRESS, such as url=http://127.0.0.1:8000/v1.")
        if "@" in self.url or "?" in self.url:
            raise ValueError(
                "an arm's url is kept in records, so it may hold no password; the key is read from OPENAI_API_KEY."
            )
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; it must begin with http:// or https://.")
        if self.engine == "vllm" and not self.plain and self.shape.top_k > 1:
            raise ValueError("engine=vllm drafts chains only; name num_speculative_tokens, or plain.")

    def decoding(self, max_new_tokens: int, seed: int | None = None) -> Decoding:
        """What this kit's own decoder is told."""
        return Decoding(self.strategy, self.shape, self.sampling, max_new_tokens, seed)


SHAPE = tuple(field.name for field in fields(TreeShape))  # type: ignore[arg-type]
SAMPLING = tuple(field.name for field in fields(Sampling))  # type: ignore[arg-type]
# where an arm runs: an arm that names an engine or a command of its own inherits none of the others
PLACE = ("engine", "code", "python", "command", "url", "tensor_parallel_size")
# what only a draft has: an arm that names one is not plain
DRAFTING = (*DRAFT_AXES, *SHAPE, "draft")
_COMMON = ("plain", *SHAPE, *SAMPLING, "draft", "target", "dtype")
# the keys that an engine can be told; None is a command's
TAKES: Mapping[str | None, tuple[str, ...]] = {
    "eagle_lab": (*AXES, *_COMMON, "quantization", "engine", "code", "python", "tensor_parallel_size"),
    "official": (*_COMMON, "engine", "code", "python"),
    "vllm": (*_COMMON, "quantization", "engine", "python"),
    "openai": (*SAMPLING, "target", "engine", "url"),
    None: (*AXES, *_COMMON, "quantization", "command"),
}
KEYS = tuple(dict.fromkeys(key for keys in TAKES.values() for key in keys))
# other engines' words: our key, and what is added to their number. They count the root and the head's first step.
ALIASES: Mapping[str, tuple[str, int]] = {
    "speculative_num_steps": ("depth", -1),
    "speculative_eagle_topk": ("top_k", 0),
    "speculative_num_draft_tokens": ("total_tokens", -1),
}
CHAIN = "num_speculative_tokens"  # so many draft tokens in a chain
AUTO = "total_tokens=auto"  # a tree that `compare` chooses by measuring, in an arm's text


def values(arm: Arm) -> dict[str, Any]:
    """The arm as one flat dict of KEYS."""
    flat = {f.name: getattr(arm, f.name) for f in fields(Arm)}  # type: ignore[arg-type]
    strategy, shape, sampling = (flat.pop(name) for name in ("strategy", "shape", "sampling"))
    found = asdict(strategy) | flat | {k: getattr(shape, k) for k in SHAPE}
    found |= {k: getattr(sampling, k) for k in SAMPLING}
    return {key: found[key] for key in KEYS}


def of_values(flat: Mapping[str, Any]) -> Arm:
    """The arm of a flat dict of KEYS; those left out are the defaults. Raises ValueError as `Arm` does."""

    def part(kind: Any, keys: Any) -> Any:
        return kind(**{k: flat[k] for k in keys if k in flat})

    rest = {k: v for k, v in flat.items() if k not in (*AXES, *SHAPE, *SAMPLING)}
    return Arm(part(Strategy, AXES), shape=part(TreeShape, SHAPE), sampling=part(Sampling, SAMPLING), **rest)


def parse(text: str | Strategy | Arm, since: Arm | None = None) -> Arm:
    """The arm that a text names on top of `since`, the kit's defaults where None; a `Strategy` names all its axes.

    Raises ValueError, one sentence, for an unknown or repeated key, a wrong value, and keys that don't go together.
    """
    if isinstance(text, Arm):
        return text
    since = Arm() if since is None else since
    named = asdict(text) if isinstance(text, Strategy) else _named(text)
    flat = values(since)
    if "engine" in named or "command" in named:
        flat |= {key: getattr(Arm, key) for key in PLACE}
    elif flat["command"] and (elsewhere := [key for key in PLACE if key in named]):
        raise ValueError(
            f"{elsewhere[0]} goes with an engine; name engine too, as the other arm has a command."
        )
    engine = None if (flat | named)["command"] else (flat | named)["engine"]
    for key in named:
        if engine in TAKES and key not in TAKES[engine]:
            who = "a command" if engine is None else f"engine={engine}"
            raise ValueError(f"{who} takes no {key}; it takes {', '.join(TAKES[engine])}.")
    if engine in TAKES and "quantization" not in TAKES[engine]:
        flat["quantization"] = ""  # it decodes the target as it is, and is judged as that
    drafting = [key for key in DRAFTING if key in named]
    if named.get("plain") and drafting:
        raise ValueError(f"plain decoding drafts nothing, so {drafting[0]} can't go with it.")
    return of_values(flat | {"plain": flat["plain"] and not drafting} | named)


def wants_tree(text: Any) -> bool:
    """Whether an arm's text leaves its tree to be chosen (AUTO)."""
    return isinstance(text, str) and any(map(_is_auto, _parts(text)))


def with_tree(text: str, shape: TreeShape) -> str:
    """The text with the sizes of `shape` in place of AUTO."""
    sizes = ",".join(f"{key}={getattr(shape, key)}" for key in SHAPE)
    sides = (part.partition("=") for part in _parts(text))
    return ",".join(
        sizes if _is_auto(key + equals + value) else key + equals + (_quoted(value) if equals else "")
        for key, equals, value in sides
    )


def _is_auto(part: str) -> bool:
    return part.replace(" ", "") == AUTO


def told(arm: Arm) -> dict[str, Any]:
    """What the arm's engine is told, by key: nothing that it doesn't take, or that plain decoding leaves aside."""
    takes = TAKES[None if arm.command else arm.engine]
    return {
        key: value
        for key, value in values(arm).items()
        if key in takes and value != "" and value is not False and not (arm.plain and key in DRAFTING)
        if key != "tensor_parallel_size" or value > 1
    }


def written(arm: Arm, since: Arm | None = None) -> str:
    """The shortest text that `parse` reads back on top of the same `since`; it is never empty."""
    since = Arm() if since is None else since
    flat, before = values(arm), values(since)
    takes = TAKES[None if arm.command else arm.engine]
    names = {key for key in KEYS if flat[key] != before[key]} - {"plain"}
    if names & {"engine", "command"}:
        names |= {"command" if arm.command else "engine", *(k for k in PLACE if flat[k] != getattr(Arm, k))}
    if arm.plain:
        names = names - set(DRAFTING) | {"plain"}
    elif since.plain and not names & set(DRAFTING) & set(takes):
        names.add("mask" if "mask" in takes else "total_tokens")
    found = {key: flat[key] for key in takes if key in names}
    if not found:  # the same arm: any key that keeps its place
        found = {key: flat[key] for key in ("mask" if "mask" in takes else "temperature",)}
    return ",".join(key if key == "plain" else f"{key}={_quoted(value)}" for key, value in found.items())


def _quoted(value: Any) -> str:
    text = str(value)
    if not any(c in text for c in ",\"'\\"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _named(text: str) -> dict[str, Any]:
    """Each key that a text names, with its value of the key's type."""
    if not isinstance(text, str):
        raise ValueError(f"an arm is text such as 'doubling' or 'plain', not {type(text).__name__}.")
    found: dict[str, Any] = {}

    def take(key: str, value: Any) -> None:
        if key in found:
            raise ValueError(f"the arm {text!r} names {key} twice.")
        found[key] = value

    for part in _parts(text):
        key, equals, value = (side.strip() for side in part.partition("="))
        if key == "plain" and not equals:
            take(key, True)
        elif key == CHAIN:
            count = _read(key, value, int)
            if count < 2:
                raise ValueError(f"{CHAIN} is {count}; this decoder's shortest chain has 2.")
            for name, number in (("top_k", 1), ("depth", count - 1), ("total_tokens", count)):
                take(name, number)
        elif key in ALIASES:
            name, more = ALIASES[key]
            take(name, _read(key, value, int) + more)
        elif not equals or key in AXES:
            for axis, name in choices(part).items():
                take(axis, name)
        elif key in (*SHAPE, "top_k_sampling", "tensor_parallel_size"):
            take(key, _read(key, value, int))
        elif key in SAMPLING:
            take(key, _read(key, value, float))
        elif key in KEYS and key != "plain":
            take(key, value)
        elif key == "plain":
            raise ValueError(f"plain takes no value, but the arm has {part!r}.")
        else:
            known = [*KEYS, *ALIASES, CHAIN]
            raise ValueError(
                f"an arm has no key {key!r}{nearest(key, known) or '.'} The keys: {', '.join(known)}."
            )
    if "engine" in found and found["engine"] not in get_args(Engine):
        raise ValueError(f"engine is {found['engine']!r}; it must be {', '.join(get_args(Engine))}.")
    if not found:
        raise ValueError(f"the arm is empty; masks are {', '.join(AXES['mask'])}.")
    return found


def _parts(text: str) -> list[str]:
    words = shlex.shlex(text, posix=True)
    words.whitespace, words.whitespace_split, words.commenters, words.quotes = ",", True, "", '"'
    try:
        return [part.strip() for part in words if part.strip()]
    except ValueError as error:
        raise ValueError(f"the arm {text!r} can't be read: {str(error).lower()}.") from None


def _read(key: str, value: str, kind: type) -> Any:
    if f"{key}={value}" == AUTO:
        raise ValueError(f"{AUTO} is measured by `compare` alone, as it begins; name a number here.")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{key} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}."
        ) from None
