"""Where a decode's time goes, measured stage by stage; what the record says is in `eagle_lab.studies.breakdown`.

A decode is the prefill, then cycles; a cycle ends with the copy of its outcome to the host (the span "to_host"). What
no span covers is the "rest": the host's bookkeeping between stages. Which time counts: on a GPU the device's (from
event to event in its stream, so waiting for the host's launches is inside, and a host stage that waits for the device
isn't charged for what it waits for), on a CPU the host's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_lab.decode.generate import generate, to_warm_up
from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.measure.floor import floor
from eagle_lab.measure.old_records import Record, new
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import Span, SpanRecord, Spans, SynchronisedSpans, no_span, now
from eagle_lab.runtime.prepare import fixed

MODES = ("off", "spans", "synchronised")

Wrap = Callable[[Span], Span]


def parse_acceptance(text: str) -> float | None:
    """None for "measured"; the number of "stated 3.0". ValueError for anything else."""
    word, _, number = text.strip().partition(" ")
    if word == "measured" and not number:
        return None
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if word != "stated" or not 1 <= value < 1000:
        raise ValueError(
            f"acceptance is {text!r}; use 'measured', or 'stated 3.0' (tokens a cycle, at least 1)."
        )
    return value


def check_acceptance(pair: Pair, acceptance: str) -> float | None:
    """`parse_acceptance`, and ValueError where random weights are asked for a measured acceptance."""
    stated = parse_acceptance(acceptance)
    if stated is None and pair.target_name.startswith("shape:"):
        raise ValueError(
            f"{pair.target_name} has random weights, so its acceptance means nothing; "
            f"give acceptance='stated 3.0' with the length you want to reckon with."
        )
    return stated


def without_folder(where: str) -> str:
    """A hub name or a shape as it is, a folder by its last part: a record doesn't tell where on a disk it was made."""
    return Path(where).name if Path(where).is_absolute() else where


def profile_prompts(pair: Pair, prompts: Sequence[Prompt], length: int = 64, seed: int = 0) -> list[Prompt]:
    """The prompts with their ids; where there is no tokenizer, as many of `length` random ids, named so.

    Raises ValueError where there is a tokenizer and prompts without ids.
    """
    if all(p.ids for p in prompts):
        return list(prompts)
    if pair.tokenizer is not None:
        raise ValueError(
            "these prompts have no token ids; pass them through eagle_lab.models.prompts.prepare first."
        )
    coin = random.Random(seed)
    low, high = min(10, pair.config.vocab_size - 1), pair.config.vocab_size
    drawn = [tuple(coin.randrange(low, high) for _ in range(length)) for _ in prompts]
    return [Prompt(f"random-{n}", "random ids", "", ids) for n, ids in enumerate(drawn)]


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


def _cycle(stages: list[SpanRecord], before: SpanRecord) -> dict[str, Any]:
    """One cycle from the end of the span before it to the end of its own last: seconds, by stage."""
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
    return {
        "host_s": (last.start + last.host - before.start - before.host) / 1e9,
        "device_s": (_device_end(last) - _device_end(before)) / 1e9 if timed else None,
        "calls": dict(calls),
        "host": dict(host),
        "device": dict(device) if timed else None,
    }


def _lanes(stages: list[SpanRecord]) -> list[list[Any]]:
    """[stage, host start, host length, device start, device length] in seconds from the first stage's start."""
    zero = min(stages[0].start, stages[0].device_start or stages[0].start)
    rows: list[list[Any]] = []
    for s in stages:
        rows.append([s.name, (s.start - zero) / 1e9, s.host / 1e9])
        if s.device_start is not None and s.device is not None:
            rows[-1] += [(s.device_start - zero) / 1e9, s.device / 1e9]
    return rows


def take(
    pair: Pair,
    prompt: Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    mode: str = "spans",
    wrap: Wrap | None = None,
) -> dict[str, Any]:
    """One decode in a mode ("off", "spans", "synchronised"): seconds by the outer clock, its prefill and its cycles."""
    kinds: dict[str, type[Spans] | None] = {"off": None, "spans": Spans, "synchronised": SynchronisedSpans}
    kind = kinds[mode]
    recorder = kind(pair.device) if kind else None
    span: Span = recorder if recorder else no_span
    start = now(pair.device)
    done = generate(
        pair, prompt.ids, max_new_tokens, record=False, span=wrap(span) if wrap else span, **options
    )
    seconds = (now(pair.device) - start) / 1e9
    found: dict[str, Any] = {
        "prompt": prompt.id,
        "mode": mode,
        "seconds": seconds,
        "tokens": len(done.tokens),
    }
    found |= {
        "prefixes": [c.prefix for c in done.cycles],
        "committed": [len(c.committed) for c in done.cycles],
    }
    if recorder is None:
        return found
    first, cycles = cut(recorder.read())
    ends = [first, *(c[-1] for c in cycles)]
    found["setup_s"] = (first.start - start) / 1e9  # caches made ready, before the prefill
    found["prefill"] = {
        "host": first.host / 1e9,
        "device": None if first.device is None else first.device / 1e9,
    }
    found["cycles"] = [_cycle(c, before) for c, before in zip(cycles, ends, strict=False)]
    lengths = [c["host_s"] for c in found["cycles"]]
    found["timeline"] = _lanes(cycles[int(np.argsort(lengths)[len(lengths) // 2])])
    return found


def profile(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 50,
    repeats: int = 1,
    acceptance: str = "measured",
    strategy: str = "rebuild",
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    seed: int = 0,
    modes: Sequence[str] = MODES,
    floors: bool = True,
    wrap: Wrap | None = None,
) -> Record:
    """Decode every prompt `repeats` times in each mode, modes in random order, after a warm-up; → a "profile" record.

    Args: acceptance: "measured", or "stated 3.0" for weights that are random; wrap: put around the span of every decode
    (`clock.Delayed`). Raises ValueError for bad settings, before any decode.
    """
    stated = check_acceptance(pair, acceptance)
    prompts = profile_prompts(pair, prompts, seed=seed)
    if not prompts or repeats < 1:
        raise ValueError("a profile needs at least one prompt and one repeat.")
    options: dict[str, Any] = {
        "strategy": strategy,
        "top_k": top_k,
        "depth": depth,
        "total_tokens": total_tokens,
    }
    settings = {
        "target": without_folder(pair.target_name), "draft": without_folder(pair.draft_name), "device": str(pair.device),
        "dtype": str(pair.dtype).removeprefix("torch."), **options, "prompts": [p.id for p in prompts],
        "max_new_tokens": max_new_tokens, "repeats": repeats, "seed": seed, "acceptance": acceptance,
        "stated_acceptance": stated,
    }  # fmt: skip
    record = new("profile", settings, str(pair.device))
    coin, decodes = random.Random(seed), []
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    # a machine under a fixed runtime is made for so many tokens; elsewhere a few warm up as well
    few = max_new_tokens if fixed(parse(strategy).runtime) else min(8, max_new_tokens)
    for at in to_warm_up([len(p.ids) for p in prompts], [Decoding.of(max_new_tokens, strategy, **sizes)]):
        for mode in modes:
            take(pair, prompts[at], few, options, mode)
    for _ in range(repeats):
        for prompt in prompts:
            for mode in coin.sample(tuple(modes), len(modes)):
                decodes.append(take(pair, prompt, max_new_tokens, options, mode, wrap))
    typical = sorted((d for d in decodes if d["mode"] == "spans"), key=lambda d: d["seconds"])
    record["timeline"] = typical[len(typical) // 2]["timeline"] if typical else []
    for decode in decodes:
        decode.pop("timeline", None)
    record["decodes"] = decodes
    if floors:
        prefix = round(float(np.mean([p for d in decodes for p in d["prefixes"]])))
        record["floor"] = floor(pair, top_k, depth, total_tokens, prefix)
    return record
