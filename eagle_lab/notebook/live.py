"""A decode that runs beside a notebook and can be stopped between two cycles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from eagle_lab.decode.generate import Cycle, cut, stream, tau
from eagle_lab.measure.spans import SpanRecord, Spans
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import encode

# stages before the first cycle, which belong to no cycle
BEFORE = ("prefill",)
LAST = "to_host"  # the stage that ends every cycle


@dataclass
class Run:
    """A decode as far as it has come. `seconds` is from the start, the prefill included; `stages` has, for each cycle,
    the seconds of each stage, and is filled at the end; `error` is what ended it, if anything did."""

    prompt_ids: tuple[int, ...]
    options: dict[str, Any]
    cycles: list[Cycle] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    # (id, depth at which it was drafted; 0 = a bonus)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False
    error: Exception | None = None

    @property
    def acceptance_length(self) -> float:
        """τ: tokens committed a cycle, the bonus included."""
        return tau(self.cycles) if self.cycles else 0.0

    @property
    def speed(self) -> float:
        """Tokens per second, the prefill included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def reraise(self) -> None:
        """Raise what ended the run, where anything did."""
        if self.error is not None:
            raise self.error

    def stage_ranges(self, number: int) -> dict[str, tuple[float, float, float]]:
        """For cycle `number` from 1, each stage's seconds between the shortest and the longest of all cycles."""
        among = {n: [stage.get(n, 0.0) for stage in self.stages] for n in self.stages[number - 1]}
        return {n: (min(among[n]), value, max(among[n])) for n, value in self.stages[number - 1].items()}


class Live:
    """Decodes on a pair, one run at a time: `start` it, `stop` it between cycles, `wait` for its end."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def running(self) -> bool:
        """Whether a started run has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        pair: Pair,
        prompt_ids: Sequence[int],
        options: dict[str, Any],
        on_cycle: Callable[[Run], None],
        on_end: Callable[[Run], None],
        wait: bool = False,
    ) -> Run:
        """Begin to decode; the callbacks come from the decode's own thread, or from this one where `wait` is set.

        Args: options: those of `eagle_lab.stream`, with max_new_tokens. Raises RuntimeError while another run goes on.
        Whatever the decode raises ends up in `Run.error`.
        """
        if self.running:
            raise RuntimeError("a run is still going on; stop it first.")
        self._stop.clear()
        run = Run(tuple(prompt_ids), dict(options))
        work = (pair, run, on_cycle, on_end)
        if wait:
            self._decode(*work)
        else:
            self._thread = threading.Thread(
                target=self._decode, args=work, daemon=True, name="eagle_lab decode"
            )
            self._thread.start()
        return run

    def stop(self) -> None:
        """Ask the run to end after the cycle that it is in."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False where it has not come within `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.running

    def _decode(
        self, pair: Pair, run: Run, on_cycle: Callable[[Run], None], on_end: Callable[[Run], None]
    ) -> None:
        spans = Spans(pair.device)
        limit = run.options["max_new_tokens"]
        cycles = None
        try:
            start = perf_counter()
            cycles = stream(pair, run.prompt_ids, span=spans, **run.options)
            for cycle in cycles:
                run.cycles.append(cycle)
                run.seconds = perf_counter() - start
                run.tokens = committed(run.cycles, limit, pair.eos)
                on_cycle(run)
                if self._stop.is_set():
                    run.stopped = len(run.tokens) < limit
                    break
            run.stages = by_cycle(spans.read())
        except (
            Exception
        ) as error:  # the reader's own builder may raise anything; it is shown, not lost in a thread
            run.error = error
        except KeyboardInterrupt:  # the kernel's own stop button, while a cell waits for the run
            run.stopped = True
            run.stages = by_cycle(spans.read())[: len(run.cycles)]
            raise
        finally:
            if cycles is not None:
                cycles.close()  # type: ignore[attr-defined]
            on_end(run)


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
        if record.name in BEFORE:
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
