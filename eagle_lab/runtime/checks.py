"""Settings checked by pydantic when they are made, and what it found told in one clear sentence."""

from __future__ import annotations

import difflib
import functools
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # True is no number, 1.0 no count, and "1" neither

KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "True or False",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "True or False",
    "list_type": "a list",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make a frozen pydantic dataclass whose constructor raises ValueError, one sentence, for the first bad value."""
    made = dataclass(cls, frozen=True, config=STRICT)
    init, names = made.__init__, list(made.__dataclass_fields__)  # type: ignore[attr-defined]

    @functools.wraps(init)
    def one_sentence(self: Any, *args: Any, **named: Any) -> None:
        try:
            # by name, as pydantic calls a value that is given by its place by that place's number
            init(self, *args[len(names) :], **dict(zip(names, args, strict=False)), **named)
        except ValidationError as error:
            raise ValueError(sentence(error)) from None

    made.__init__ = one_sentence  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def check(kind: Any, value: Any, name: str) -> Any:
    """`value` where it is of the type `kind`; ValueError, one sentence that calls it `name`, where it isn't."""
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        raise ValueError(sentence(error, name)) from None


def sentence(error: ValidationError, name: str = "") -> str:
    """The first fault that pydantic found: what is wrong and what it must be."""
    fault = error.errors(include_url=False)[0]
    kind, context = fault["type"], fault.get("ctx", {})
    place = ".".join(map(str, (*([name] if name else []), *fault["loc"]))) or "the whole"
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return f"{place} is missing."
    if kind in KINDS:
        must = f"it must be {KINDS[kind]}"
    elif kind in BOUNDS:
        must = f"it must be {BOUNDS[kind][0]} {context[BOUNDS[kind][1]]}"
    elif kind == "literal_error":
        must = f"it must be {context['expected']}"
    else:
        must = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}"
    return f"{place} is {short(fault['input'])}; {must}."


def flat(text: object) -> str:
    """A whole text on one line."""
    return " ".join(str(text).split())


def short(value: object) -> str:
    """How a sentence shows a value: its repr on one line, cut where it is long."""
    text = flat(repr(value))
    return text if len(text) < 60 else f"{text[:56]} ..."


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An error in one line; a refusal of this package's own is a sentence already."""
    kind, line = type(error).__name__, first_line(error)
    return line.removesuffix(".") if line == kind or isinstance(error, ValueError) else f"{kind}: {line}"


def nearest(name: str, known: list[str]) -> str:
    """ "; did you mean 'x'?" where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
