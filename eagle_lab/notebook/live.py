"""Work that goes on beside a notebook and can be stopped; and a decode that is watched cycle by cycle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from tokenizers.decoders import DecodeStream

from eagle_lab.decode.generate import Cycle, cut, tau
from eagle_lab.measure.spans import SpanRecord, Spans
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import encode
from eagle_lab.runtime.clock import Span

PREFILL = "prefill"  # the stage before the first cycle, which belongs to none
LAST = "to_host"  # the stage that ends every cycle


class Stopped(Exception):
    """The reader pressed Stop."""


class Work:
    """One long work at a time, in a thread of its own. It ends where it next calls `go_on` after `stop`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def running(self) -> bool:
        """Whether a started work has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def demand_free(self) -> None:
        """Raise RuntimeError while a work goes on."""
        if self.running:
            raise RuntimeError("another run, check or comparison is still going on; stop it first.")

    def start(self, job: Callable[[], Any], wait: bool = False) -> Any:
        """Begin; with `wait` in this thread, whose result is returned. Raises RuntimeError while another goes on."""
        self.demand_free()
        self._stop.clear()
        if wait:
            return job()
        self._thread = threading.Thread(target=job, daemon=True, name="eagle_lab console")
        self._thread.start()
        return None

    def stop(self) -> None:
        """Ask the work to end."""
        self._stop.set()

    def go_on(self, *_: object) -> None:
        """Raise `Stopped` where `stop` was called."""
        if self._stop.is_set():
            raise Stopped

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False where it has not come within `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.running


def seldom(draw: Callable[..., object]) -> Callable[..., None]:
    """`draw`, which does nothing where it was called 0.15 s before: the page can't follow each cycle."""
    drawn = 0.0

    def drawing(*values: Any) -> None:
        nonlocal drawn
        if perf_counter() - drawn > 0.15:
            draw(*values)
            drawn = perf_counter()

    return drawing


@dataclass
class Run:
    """A decode as far as it has come.

    tokens: id, and the depth at which it was drafted, 0 for what the target itself chose; texts: what each token adds;
    cycle_s: the host's seconds of each cycle, the first with set-up and prefill; stages: each cycle's seconds by stage,
    filled at the end. Plain decoding is a run without drafts, a cycle for each token.
    """

    limit: int
    cycles: list[Cycle] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cycle_s: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def committed(self) -> int:
        """Tokens that the cycles committed; what the last one committed beyond the limit is counted too."""
        return sum(len(c.committed) for c in self.cycles)

    @property
    def acceptance_length(self) -> float:
        """τ: tokens committed a cycle, the bonus included."""
        return tau(self.cycles) if self.cycles else 0.0

    @property
    def cycle_time(self) -> float:
        """Median seconds of a cycle, the first left out where there are others."""
        return median(self.cycle_s[1:] or self.cycle_s) if self.cycle_s else 0.0

    @property
    def speed(self) -> float:
        """Tokens committed per second after the first cycle, so without set-up and prefill; the whole of a single cycle."""
        first = len(self.cycle_s) > 1
        seconds, count = sum(self.cycle_s[first:]), sum(len(c.committed) for c in self.cycles[first:])
        return count / seconds if seconds else 0.0

    def stage_ranges(self, number: int) -> dict[str, tuple[float, float, float]]:
        """For cycle `number` from 1, each stage's seconds between the shortest and the longest of all cycles."""
        among = {n: [stage.get(n, 0.0) for stage in self.stages] for n in self.stages[number - 1]}
        return {n: (min(among[n]), value, max(among[n])) for n, value in self.stages[number - 1].items()}


def watch(
    pair: Pair,
    run: Run,
    opened: Callable[[Span], Iterator[Cycle]],
    on_prefill: Callable[[], None],
    on_cycle: Callable[[Run], None],
) -> None:
    """Decode into `run`, in this thread. What `on_cycle` raises ends the decode; `Stopped` marks the run.

    Args: opened: opens the decode with a span; on_prefill: called when the prompt is about to be read. The callbacks'
    own time doesn't count.
    """
    spans, pieces = Spans(pair.device), Pieces(pair.tokenizer)

    def span(name: str) -> AbstractContextManager[None]:
        if name == PREFILL:
            on_prefill()
        return spans(name)

    cycles = opened(span)
    try:
        while True:
            start = perf_counter()
            cycle = next(cycles, None)
            if cycle is None:
                break
            run.cycle_s.append(perf_counter() - start)
            run.cycles.append(cycle)
            run.tokens = committed(run.cycles, run.limit, pair.eos)
            pieces.add([token for token, _ in run.tokens[len(pieces.texts) :]])
            run.texts = pieces.texts
            on_cycle(run)
    except (Stopped, KeyboardInterrupt) as stop:  # the latter is the kernel's own stop, while a cell waits
        run.stopped = True
        if isinstance(stop, KeyboardInterrupt):
            raise
    finally:
        cycles.close()  # type: ignore[attr-defined]
        run.stages = by_cycle(spans.read())[: len(run.cycles)]


class Pieces:
    """The text that each token adds. A character of several tokens comes with its last one; ids without a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._vocabulary = tokenizer and tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def add(self, ids: Sequence[int]) -> None:
        """Append the texts of further tokens."""
        known = self._vocabulary is not None
        for token in ids:
            self.texts.append((self._stream.step(self._vocabulary, token) or "") if known else f"#{token} ")


def committed(cycles: Sequence[Cycle], limit: int, eos: frozenset[int]) -> list[tuple[int, int]]:
    """New token ids with the depth at which each was drafted: 0 for those that the target itself chose."""
    known = [(token, depth) for cycle in cycles for depth, token in enumerate(cycle.committed)]
    known.append((cycles[-1].bonus, 0))
    return known[: len(cut([token for token, _ in known], limit, eos)[0])]


def by_cycle(records: Sequence[SpanRecord]) -> list[dict[str, float]]:
    """Seconds of each stage in each cycle, from spans in order of time; on a GPU the longer of host and device."""
    found: list[dict[str, float]] = []
    now: dict[str, float] = {}
    for record in sorted(records, key=lambda r: r.start):
        if record.name == PREFILL:
            continue
        now[record.name] = now.get(record.name, 0.0) + max(record.host, record.device or 0) / 1e9
        if record.name == LAST:
            found.append(now)
            now = {}
    return found


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A prompt's token ids; without a tokenizer the text must be ids itself, such as "1 17 42" (ValueError else)."""
    if tokenizer is not None:
        return encode(tokenizer, text)
    if not text.strip() or not all(word.isdigit() for word in text.split()):
        raise ValueError("this target has no tokenizer; write the prompt as token ids, such as 1 17 42.")
    return [int(word) for word in text.split()]
