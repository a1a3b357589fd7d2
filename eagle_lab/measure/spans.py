"""Spans: the time of each stage of a decode, and a planted delay in one of them.

`Spans` takes host stamps and, on CUDA, device events from a preallocated pool, and reads them after the end.
`SynchronisedSpans` waits for the device around every stage: it shows how much that changes what it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Literal

import torch

from eagle_lab.runtime.clock import Span, now, synchronise

Where = Literal["host", "device"]  # a delay is planted there


@dataclass(frozen=True)
class SpanRecord:
    """One stage, once: host start and length in ns; device start and length in ns, None without a device."""

    name: str
    start: int
    host: int
    device_start: int | None
    device: int | None


class _Host:
    """One open host span; a plain class is several times cheaper to enter than a generator."""

    __slots__ = ("owner", "name", "start")

    def __init__(self, owner: Spans, name: str) -> None:
        self.owner = owner
        self.name = name

    def __enter__(self) -> None:
        self.start = perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self.owner._host.append((self.name, self.start, perf_counter_ns()))


class _Device:
    __slots__ = ("owner", "name", "start", "first", "last")

    def __init__(self, owner: Spans, name: str) -> None:
        self.owner = owner
        self.name = name

    def __enter__(self) -> None:
        self.first, self.last = self.owner._events()
        self.start = perf_counter_ns()
        self.first.record()

    def __exit__(self, *_: object) -> None:
        self.last.record()
        self.owner._host.append((self.name, self.start, perf_counter_ns()))
        self.owner._device.append((self.first, self.last))


class Spans:
    """Records stages without synchronising. Call it with a stage's name for a context manager.

    `pool` device events are made in advance on CUDA; more are made when they run out.
    """

    def __init__(self, device: torch.device | str = "cpu", pool: int = 4096) -> None:
        self.device = torch.device(device)
        self._host: list[tuple[str, int, int]] = []
        self._device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timed = self.device.type == "cuda"
        self._pool = [torch.cuda.Event(enable_timing=True) for _ in range(pool)] if self._timed else []
        self._zero: torch.cuda.Event | None = None
        self._zero_host = 0

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """The span of one stage."""
        return _Device(self, name) if self._timed else _Host(self, name)  # type: ignore[return-value]

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self._zero is None:
            torch.cuda.synchronize(self.device)
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
            self._zero_host = perf_counter_ns()
        if len(self._pool) < 2:
            self._pool += [torch.cuda.Event(enable_timing=True) for _ in range(512)]
        return self._pool.pop(), self._pool.pop()

    def read(self) -> list[SpanRecord]:
        """All stages so far, in order of their ends. Synchronises once."""
        synchronise(self.device)
        if not self._timed:
            return [SpanRecord(name, start, end - start, None, None) for name, start, end in self._host]
        zero = self._zero
        found = []
        for (name, start, end), (first, last) in zip(self._host, self._device, strict=True):
            began = self._zero_host + round(zero.elapsed_time(first) * 1e6)  # type: ignore[union-attr]
            found.append(SpanRecord(name, start, end - start, began, round(first.elapsed_time(last) * 1e6)))
        return found


class SynchronisedSpans(Spans):
    """Waits for the device before and after each stage."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device, pool=0)
        self._timed = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:  # type: ignore[override]
        """The span of one stage, with the device waited for at both ends."""
        start = now(self.device)
        yield
        self._host.append((name, start, now(self.device)))


def spin(nanoseconds: int) -> None:
    """Keep the host busy for so long; a sleep would overshoot by tens of microseconds."""
    until = perf_counter_ns() + nanoseconds
    while perf_counter_ns() < until:
        pass


def device_spin(device: torch.device | str) -> Callable[[int], None]:
    """A function that keeps the *device* busy for so many nanoseconds, in the stream, without waiting for it.

    `torch.cuda._sleep` counts clock ticks, so the ticks of a nanosecond are measured here, once. ValueError where
    there is no device beside the host.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"a delay on the device needs a CUDA GPU, not {str(device)!r}; use where='host'.")
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ticks, rates = 20_000_000, []
    with torch.cuda.device(device):
        for _ in range(5):
            first.record()
            torch.cuda._sleep(ticks)
            last.record()
            torch.cuda.synchronize(device)
            rates.append(ticks / (first.elapsed_time(last) * 1e6))
    rate = sorted(rates)[2]

    def wait(nanoseconds: int) -> None:
        if nanoseconds > 0:
            with torch.cuda.device(device):
                torch.cuda._sleep(round(nanoseconds * rate))

    return wait


def waiting(where: str, device: torch.device) -> Callable[[int], None]:
    """What waits on the "host" or the "device" for so many nanoseconds; ValueError for a place that there isn't."""
    if where not in ("host", "device"):
        raise ValueError(f"where is {where!r}; use 'host' or 'device'.")
    return spin if where == "host" else device_spin(device)


class _Slow:
    __slots__ = ("owner", "inner")

    def __init__(self, owner: Delayed, inner: AbstractContextManager[None]) -> None:
        self.owner = owner
        self.inner = inner

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *_: object) -> None:
        # inside the inner span, so that a profile sees the delay as part of the stage
        start = perf_counter_ns()
        self.owner.wait(self.owner.nanoseconds)
        self.owner.calls += 1
        self.owner.waited += perf_counter_ns() - start
        self.inner.__exit__(None, None, None)


class Delayed:
    """A span that makes each call of one stage longer by a known delay.

    `calls` counts them; `waited` is the host's nanoseconds in them all, which on a busy machine are more than asked for.

    Args: span: what records, or `no_span`; stage: its name; nanoseconds: of each call; wait: `spin` for the host, or
    `device_spin(device)`.
    """

    def __init__(self, span: Span, stage: str, nanoseconds: int, wait: Callable[[int], None] = spin) -> None:
        if nanoseconds < 0:
            raise ValueError(f"the delay is {nanoseconds} ns; it must be 0 or more.")
        self.span, self.stage, self.nanoseconds, self.wait = span, stage, nanoseconds, wait
        self.calls = self.waited = 0

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """The span of one stage, delayed where it is the chosen one."""
        inner = self.span(name)
        return _Slow(self, inner) if name == self.stage else inner  # type: ignore[return-value]
