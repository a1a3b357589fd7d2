"""The protocol of a worker, and the client that feeds one: JSON lines, version 1.

A worker reads one request a line from its standard input and writes one answer a line to its standard output, with
`answer` as the request's `ask`. What it prints must go to its standard error, which is a log here. The requests, in
their order:

    {"ask": "hello", ARM}   {"protocol": 1, "engine": NAME, "version": TEXT}
    {"ask": "load", ARM}    {"facts": {…}}, anything worth keeping in a record
    {"ask": "decode", "prompt_ids": […], "max_new_tokens": N, "seed": N or null}
                            {"seconds": S, "first_token_seconds": S or null, "tokens": […], "cycles": […] or null}
    {"ask": "end"}          the process ends

ARM has the fields of `told`. Instead of any answer: {"error": "one sentence"}. `seconds` run from the request to the last
token, by the worker's own clock; `cycles` are the tokens that each cycle committed. A worker that knows no list may give
`cycle_count` and `committed`, their sum. Decodes to warm up are decodes whose times nobody keeps.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eagle_lab.runtime.checks import sentence

VERSION = 1
LOG_LINES = 5


class EngineFailed(RuntimeError):
    """An arm's process or server can't go on; the message is one sentence, with the end of its log where it has one."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker or server may take to start, to load, and for one decode; first: for the decode that
    compiles."""

    start: float = 120
    load: float = 1200
    first: float = 1200
    decode: float = 300


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True)


class Hello(_Answer):
    """Who answers. protocol: the version that it speaks."""

    protocol: int
    engine: str
    version: str


class Loaded(_Answer):
    """What the engine says of itself once it is loaded."""

    facts: dict[str, str | int | float | bool | None] = {}


Seconds = Annotated[float, Field(gt=0)]


class Decoded(_Answer):
    """One decode. seconds: to the last token; first_token_seconds: to the first that came, None where nobody saw it.

    tokens: the new ids, None from a server, which gives the text and how many new tokens it has. cycles: tokens that each
    cycle committed; where only their sum is known: cycle_count and committed; None for plain decoding and where the
    engine doesn't tell. arrivals_s: seconds at which a server's pieces of text came.
    """

    seconds: Seconds
    first_token_seconds: Seconds | None = None
    tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    text: str | None = None
    new_tokens: Annotated[int, Field(ge=1)] | None = None
    cycles: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    cycle_count: Annotated[int, Field(ge=0)] | None = None
    committed: Annotated[int, Field(ge=0)] | None = None
    arrivals_s: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Decoded:
        if not self.tokens and not self.new_tokens:
            raise ValueError("tokens are missing")
        if self.first_token_seconds and self.first_token_seconds > self.seconds:
            raise ValueError("first_token_seconds are more than seconds")
        return self

    @property
    def length(self) -> int:
        """The number of new tokens."""
        return len(self.tokens) if self.tokens else self.new_tokens or 0

    @property
    def counts(self) -> tuple[int, int] | None:
        """Cycles and the tokens that they committed; None where the engine doesn't tell."""
        if self.cycles is not None:
            return len(self.cycles), sum(self.cycles)
        if self.cycle_count is not None and self.committed is not None:
            return self.cycle_count, self.committed
        return None


A = TypeVar("A", bound=_Answer)
Doing = Literal["start", "load", "first", "decode"]


class Worker:
    """A process that speaks the protocol, started by `command`; a context manager that ends it and all its children.

    name: what errors call it. Raises EngineFailed where it can't start, and from every request where the worker dies,
    takes longer than its limit, reports an error or answers what is no answer.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 it is as long-lived as the process
        try:
            # a session of its own, so that what it starts can be ended with it
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=env, start_new_session=True
            )  # fmt: skip
        except OSError as error:
            self.log.close()
            raise EngineFailed(f"{name} can't start: {command[0]} ({error.strerror}).") from None
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.requests: queue.Queue[bytes] = queue.Queue()
        # a process that reads nothing blocks whoever writes more than a pipe holds
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def _write(self) -> None:
        assert self.process.stdin
        with suppress(OSError), self.process.stdin as requests:
            while line := self.requests.get():
                requests.write(line)
                requests.flush()

    def hello(self, told: Mapping[str, Any]) -> Hello:
        """The first request; EngineFailed where the worker speaks another version of the protocol."""
        found = self._ask("start", Hello, "hello", **told)
        if found.protocol != VERSION:
            raise EngineFailed(
                f"{self.name} speaks version {found.protocol} of the protocol, this kit {VERSION}."
            )
        return found

    def load(self, told: Mapping[str, Any]) -> Loaded:
        """Load the models; `told` is the arm."""
        return self._ask("load", Loaded, "load", **told)

    def decode(
        self, ids: Sequence[int], max_new_tokens: int, seed: int | None, first: bool = False
    ) -> Decoded:
        """One decode of a prompt's ids; `first`: it may compile."""
        request = {"prompt_ids": list(ids), "max_new_tokens": max_new_tokens, "seed": seed}
        found = self._ask("first" if first else "decode", Decoded, "decode", **request)
        if found.length > max_new_tokens:
            raise EngineFailed(
                f"{self.name} made {found.length} tokens where {max_new_tokens} were asked for."
            )
        return found

    def _ask(self, doing: Doing, kind: type[A], ask: str, **values: Any) -> A:
        limit = getattr(self.limits, doing)
        self.requests.put(json.dumps({"ask": ask, **values}).encode() + b"\n")
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise self._failed(f"did not answer {ask!r} within {limit:g} s") from None
        if not line.endswith(b"\n"):
            self.lines.put(b"")  # for whoever asks again
            self.close()
            code = self.process.returncode
            how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise self._failed(f"ended at {ask!r} with {how}")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._failed(f"answered {ask!r} with {_short(line)}, which is no JSON object")
        if "error" in found:
            raise self._failed(f"can't {ask}: {str(found['error']).rstrip('.')}")
        if found.pop("answer", None) != ask:
            raise self._failed(f"answered {ask!r} with {_short(line)}, which is the answer to something else")
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            raise self._failed(f"gave a wrong answer to {ask!r}: {sentence(error).rstrip('.')}") from None

    def _failed(self, what: str) -> EngineFailed:
        said = "" if self.log.closed else self._last_lines()
        return EngineFailed(f"{self.name} {what}.{said}")

    def _last_lines(self) -> str:
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n  ".join(["\nThe end of its log:", *lines[-LOG_LINES:]]) if lines else ""

    def close(self) -> None:
        """End the process and whatever it started; the log stays until the worker is gone."""
        for last in (b'{"ask": "end"}\n', b""):  # and the end of the file, for one that waits for that
            self.requests.put(last)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _short(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else f"{text[:77]}…")
