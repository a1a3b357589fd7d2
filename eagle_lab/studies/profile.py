"""Where a decode's time goes, measured stage by stage; what the record says is in `eagle_lab.studies.breakdown`.

A decode is the prefill, then cycles; a cycle ends with the copy of its outcome to the host (the span "to_host"). What
no span covers is the "rest": the host's bookkeeping between stages. Which time counts: on a GPU the device's (from
event to event in its stream, so waiting for the host's launches is inside, and a host stage that waits for the device
isn't charged for what it waits for), on a CPU the host's.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eagle_lab.decode.forward import asked
from eagle_lab.decode.generate import decode, to_warm_up
from eagle_lab.decode.strategy import Decoding
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm, parse
from eagle_lab.engines.here import base_arm, check_arm, is_here, pair_of
from eagle_lab.measure.floor import Experts, Floor, floor
from eagle_lab.measure.records import Decoded, Part, Record, made
from eagle_lab.measure.spans import SpanRecord, Spans, SynchronisedSpans, Where
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt, ready
from eagle_lab.runtime.clock import Span, no_span, now
from eagle_lab.runtime.prepare import fixed
from eagle_lab.studies.operators import Operators

Mode = Literal["off", "spans", "synchronised"]
MODES: tuple[Mode, ...] = ("off", "spans", "synchronised")
STATED = "stated 3.0"  # tokens a cycle of random weights, where nothing else is asked for
# of the drafts that a tree of 63 nodes has accepted, what smaller ones of its top_k and depth have: the shipped head's,
# data/results/train-h100.json
SHARES = {63: 1.0, 31: 0.89, 15: 0.78, 7: 0.64}


class ProfileSettings(Decoded):
    """What was decoded; stated_acceptance: tokens a cycle, where they are stated and not measured."""

    device: str
    prompts: list[str]
    max_new_tokens: int
    repeats: int
    stated_acceptance: float | None

    @property
    def decoding(self) -> Decoding:
        """How each decode was made."""
        return Decoding.of(
            self.max_new_tokens,
            self.strategy,
            top_k=self.top_k,
            depth=self.depth,
            total_tokens=self.total_tokens,
        )


class Call(Part):
    """One call of a stage in one cycle: seconds from the cycle's start; the device's are None without one."""

    stage: str
    start_s: float
    host_s: float
    device_start_s: float | None = None
    device_s: float | None = None


class CycleTimes(Part):
    """One cycle in seconds, from the end of the span before it to the end of its own last; its stages by name."""

    host_s: float
    device_s: float | None
    calls: dict[str, int]
    host: dict[str, float]
    device: dict[str, float] | None


class Prefill(Part):
    """Seconds of a prefill, by the host and by the device."""

    host: float
    device: float | None


class Decode(Part):
    """One decode, timed from outside, and inside unless its mode is "off".

    prefixes and committed: of each cycle, the tokens before it and those that it added; setup_s: the caches made ready,
    before the prefill.
    """

    prompt: str
    mode: Mode
    seconds: float
    tokens: int
    prefixes: list[int]
    committed: list[int]
    setup_s: float | None = None
    prefill: Prefill | None = None
    cycles: list[CycleTimes] = []


class DelayedPair(Part):
    """A decode without and with a delay of `delay_s` in each call of a stage; waited_s: the delay in all."""

    prompt: str
    delay_s: float
    calls: int
    waited_s: float
    baseline_s: float
    delayed_s: float


class WhatIf(Part):
    """Timed pairs of decodes with and without a delay in one stage, on the host or on the device."""

    stage: str
    where: Where
    max_new_tokens: int
    seed: int
    samples: list[DelayedPair]


class ProfileRecord(Record):
    """A profile: its decodes, the calls of the median cycle, the floor, what torch.profiler saw, delays."""

    schema_name: Literal["eagle_lab.profile.v2"] = Field("eagle_lab.profile.v2", alias="schema")
    settings: ProfileSettings
    timeline: list[Call]
    decodes: list[Decode]
    floor: Floor | Experts | None = None
    operators: Operators | None = None
    whatif: list[WhatIf] = []


def stated_acceptance(pair: Pair, acceptance: str | None = None) -> float | None:
    """The tokens a cycle that are stated; None where the acceptance is measured.

    `acceptance`: "measured" or "stated 3.0"; None: measured, and STATED for a shape, whose weights are random. Raises
    ValueError for anything else, and for a shape's acceptance "measured".
    """
    shaped = pair.target_name.startswith("shape:")
    word, _, number = (acceptance or (STATED if shaped else "measured")).strip().partition(" ")
    if (word, number, shaped) == ("measured", "", True):
        raise ValueError(
            f"{pair.target_name} has random weights, so its acceptance means nothing; "
            f"give acceptance='stated 3.0' with the length you want to reckon with."
        )
    if (word, number) == ("measured", ""):
        return None
    if word == "stated" and re.fullmatch(r"\d+(\.\d*)?", number.strip()) and 1 <= float(number) < 1000:
        return float(number)
    raise ValueError(
        f"acceptance is {acceptance!r}; use 'measured', or 'stated 3.0' (tokens a cycle, at least 1)."
    )


def stated_by_nodes(stated: float) -> dict[int, float]:
    """Tokens a cycle of trees of so many nodes, top_k and depth as of `TREES[63]`, where they are stated for that one."""
    return {nodes: 1 + (stated - 1) * share for nodes, share in SHARES.items()}


def arm_of(pair: Pair, text: str, shape: TreeShape) -> tuple[Pair, Arm]:
    """The arm that a text names (a strategy, or another tree or head), and the pair that decodes it.

    Raises ValueError, before any decode, for one whose cycles have no stages here.
    """
    return _staged(pair, text, parse(text, base_arm(pair, Arm(shape=shape))))


def arm_beside(pair: Pair, text: str, first: Arm) -> tuple[Pair, Arm]:
    """`arm_of` for another arm, which inherits from the first what it doesn't name. Raises ValueError for the same one too."""
    arm = parse(text, first)
    if arm == first:
        raise ValueError(f"beside is {text!r}, the same as the first arm; name another one, or none.")
    return _staged(pair, text, arm)


def _staged(pair: Pair, text: str, arm: Arm) -> tuple[Pair, Arm]:
    if arm.plain or arm.sampling.temperature or not is_here(pair, arm):
        raise ValueError(
            f"{text!r} can't be profiled: only greedy cycles of this kit's decoder have stages; name a strategy, tree or head."
        )
    own = pair_of(pair, arm)
    check_arm(own, arm)
    return own, arm


def get_prompts(pair: Pair, count: int, selection: str = "heldout") -> list[Prompt]:
    """`count` prompts of a selection with ids; where the pair has no tokenizer, as many of 64 random ids, named so."""
    return ready(pair.tokenizer, pair.config.vocab_size, selection, count)


def cut(spans: Sequence[SpanRecord]) -> tuple[SpanRecord, list[list[SpanRecord]]]:
    """The prefill, and the stages of each cycle, each list ended by its "to_host"; what follows the last is dropped.

    Raises ValueError for spans that are not a decode's.
    """
    if not spans or spans[0].name != "prefill" or not any(s.name == "to_host" for s in spans):
        raise ValueError(
            "these spans aren't those of a decode: one 'prefill' first, a 'to_host' at each cycle's end."
        )
    cycles: list[list[SpanRecord]] = [[]]
    for span in spans[1:]:
        cycles[-1].append(span)
        if span.name == "to_host":
            cycles.append([])
    return spans[0], cycles[:-1]


def _device_end(span: SpanRecord) -> int:
    return (span.device_start or 0) + (span.device or 0)


def cycle_times(stages: list[SpanRecord], before: SpanRecord) -> CycleTimes:
    """One cycle from its spans and the span before it."""
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for s in stages:
        calls[s.name] += 1
        host[s.name] += s.host / 1e9
        if s.device is not None:
            device[s.name] += s.device / 1e9
    last = stages[-1]
    timed = last.device is not None
    return CycleTimes(
        host_s=(last.start + last.host - before.start - before.host) / 1e9,
        device_s=(_device_end(last) - _device_end(before)) / 1e9 if timed else None,
        calls=dict(calls),
        host=dict(host),
        device=dict(device) if timed else None,
    )


def _calls(stages: list[SpanRecord]) -> list[Call]:
    zero = min(stages[0].start, stages[0].device_start or stages[0].start)
    return [
        Call(
            stage=s.name, start_s=(s.start - zero) / 1e9, host_s=s.host / 1e9,
            device_start_s=None if s.device_start is None else (s.device_start - zero) / 1e9,
            device_s=None if s.device is None else s.device / 1e9,
        )
        for s in stages
    ]  # fmt: skip


def take(pair: Pair, prompt: Prompt, decoding: Decoding, mode: Mode = "spans") -> tuple[Decode, list[Call]]:
    """One decode in a mode, and the calls of its median cycle; none where the mode is "off"."""
    kinds = {"spans": Spans, "synchronised": SynchronisedSpans}
    recorder = kinds[mode](pair.device) if mode in kinds else None
    span: Span = recorder or no_span
    start = now(pair.device)
    done = decode(pair, prompt.ids, decoding, record=False, span=span)
    seconds = (now(pair.device) - start) / 1e9
    found: dict[str, Any] = {
        "prompt": prompt.id, "mode": mode, "seconds": seconds, "tokens": len(done.tokens),
        "prefixes": [c.prefix for c in done.cycles], "committed": [len(c.committed) for c in done.cycles],
    }  # fmt: skip
    if recorder is None:
        return Decode(**found), []
    first, cycles = cut(recorder.read())
    ends = [first, *(c[-1] for c in cycles)]
    times = [cycle_times(c, before) for c, before in zip(cycles, ends, strict=False)]
    timed = Decode(
        **found,
        setup_s=(first.start - start) / 1e9,
        prefill=Prefill(host=first.host / 1e9, device=None if first.device is None else first.device / 1e9),
        cycles=times,
    )
    return timed, _calls(cycles[int(np.argsort([c.host_s for c in times])[len(times) // 2])])


def profile_beside(
    pair: Pair, record: ProfileRecord, text: str, prompts: Sequence[Prompt], **settings: Any
) -> ProfileRecord:
    """The profile of another arm on a record's prompts; it inherits the record's strategy, tree and number of tokens.

    Raises ValueError as `arm_beside` and `profile` do.
    """
    asked = record.settings.decoding
    own, arm = arm_beside(pair, text, base_arm(pair, Arm(asked.strategy, shape=asked.shape)))
    return profile(own, prompts, arm.decoding(asked.max_new_tokens), floors=False, **settings)


def profile(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    repeats: int = 1,
    acceptance: str | None = None,
    seed: int = 0,
    modes: Sequence[Mode] = MODES,
    floors: bool = True,
) -> ProfileRecord:
    """Decode every prompt `repeats` times in each mode, modes in random order, after a warm-up.

    Args: acceptance: as for `stated_acceptance`; seed: draws the orders. Raises ValueError for bad settings, before any decode.
    """
    stated = stated_acceptance(pair, acceptance)
    if not prompts or repeats < 1:
        raise ValueError("a profile needs at least one prompt and one repeat.")
    if not all(p.ids for p in prompts):
        raise ValueError("these prompts have no token ids; take those of eagle_lab.models.prompts.prepare.")
    settings = ProfileSettings(
        **pair.names, device=str(pair.device), strategy=str(decoding.strategy), **asdict(decoding.shape),
        prompts=[p.id for p in prompts], max_new_tokens=decoding.max_new_tokens, repeats=repeats, seed=seed,
        stated_acceptance=stated,
    )  # fmt: skip
    record = ProfileRecord(**made(str(pair.device)), settings=settings, timeline=[], decodes=[])
    coin, calls = random.Random(seed), []
    # a fixed runtime prepares a session for so many tokens; elsewhere a few warm up as well
    count = decoding.max_new_tokens if fixed(decoding.strategy.runtime) else min(8, decoding.max_new_tokens)
    for at in to_warm_up([len(p.ids) for p in prompts], [decoding]):
        for mode in modes:
            take(pair, prompts[at], replace(decoding, max_new_tokens=count), mode)
    for _ in range(repeats):
        for prompt in prompts:
            for mode in coin.sample(tuple(modes), len(modes)):
                timed, median_cycle = take(pair, prompt, decoding, mode)
                record.decodes.append(timed)
                if mode == "spans":
                    calls.append((timed.seconds, median_cycle))
    if calls:
        record.timeline = sorted(calls, key=lambda call: call[0])[len(calls) // 2][1]
    if floors:
        prefix = round(float(np.mean([p for d in record.decodes for p in d.prefixes])))
        with asked(pair, decoding.strategy):
            record.floor = floor(pair, **asdict(decoding.shape), prefix=prefix)
    return record
