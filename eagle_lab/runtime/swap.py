"""Other values in the places of somebody's objects for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def swapped(places: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, each (object, attribute, value) or (dict, key, value) is set; afterwards all is as it was.

    An attribute that an object had from its class alone is taken away again.
    """
    undo: list[tuple[Any, str, Any]] = []
    try:
        for place, name, value in places:
            own = place if isinstance(place, dict) else vars(place)
            undo.append((place, name, own.get(name, _ABSENT)))
            _set(place, name, value)
        yield
    finally:
        for place, name, before in reversed(undo):
            _set(place, name, before)


def _set(place: Any, name: str, value: Any) -> None:
    if isinstance(place, dict):
        if value is _ABSENT:
            del place[name]
        else:
            place[name] = value
    elif value is _ABSENT:
        delattr(place, name)
    else:
        setattr(place, name, value)
