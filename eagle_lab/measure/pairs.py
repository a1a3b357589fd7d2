"""Taking pairs of latencies: one prompt by both arms, one directly after the other, in an order drawn by a fair coin.

The order is recorded. The clock is the host's, around a whole decode, with one synchronise before and one after; spans
are off unless an arm is there to measure them. The part that the arms differ in is timed in decodes of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from eagle_lab.decode.generate import decode, to_warm_up
from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.cores import foreign_load, read_load
from eagle_lab.measure.environment import Cause, throttle_reasons
from eagle_lab.measure.records import PartCalls, Sample
from eagle_lab.measure.spans import Spans
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import no_span, now

# A pair during which other programs took more than this share of this machine's cores, or the GPU was held down, is dropped
# whole. Declared here, before any run, so that it can't be chosen to suit a result.
MAX_FOREIGN_LOAD = 0.25

PART = "tree_mask"  # the stage whose time is measured in the separate instrumented runs
PART_TOKENS = 16
ARMS: tuple[Literal["baseline"], Literal["candidate"]] = ("baseline", "candidate")

# {"sample": Sample}, with {"tokens": (…, …)} where the arms' differ, or {"part": PartCalls}
Message = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is decoded in every pair, by (baseline, candidate); `spans` turns the instrumentation of an arm on.

    Pair number i decodes prompt i, modulo their number, with the seed of `arms` plus i.
    """

    arms: tuple[Decoding, Decoding]
    prompts: tuple[Prompt, ...]
    seed: int = 0
    spans: tuple[bool, bool] = (False, False)

    def prompt(self, iteration: int) -> Prompt:
        """The prompt of a pair."""
        return self.prompts[iteration % len(self.prompts)]


@dataclass(frozen=True)
class Fork:
    """The share of one process: `iterations` are the numbers of its pairs; a control decodes the baseline twice."""

    number: int
    iterations: tuple[int, ...]
    control: bool = False


def run_arm(pair: Pair, plan: Plan, arm: int, iteration: int) -> tuple[float, list[int], int]:
    """Decode a pair's prompt by arm 0 (baseline) or 1 (candidate): seconds, new tokens, number of cycles."""
    span = Spans(pair.device) if plan.spans[arm] else no_span
    decoding = replace(plan.arms[arm], seed=plan.seed + iteration)  # both arms draw the same numbers
    ids = plan.prompt(iteration).ids
    start = now(pair.device)
    done = decode(pair, ids, decoding, record=False, span=span)
    return (now(pair.device) - start) / 1e9, done.tokens, len(done.cycles)


def time_in_pairs(
    run_baseline: Callable[[Any], Any],
    run_candidate: Callable[[Any], Any],
    items: Sequence[Any],
    iterations: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_sample: Callable[[tuple[float, float]], None] | None = None,
    warmup: int | Sequence[int] = 1,
) -> list[tuple[float, float]]:
    """Pairs of seconds of any two functions of an item, each pair in random order, after `warmup` unmeasured ones: so
    many, or those of the items in these places.

    The general form of what `fork_messages` does for two decodes: the profile's what-ifs and the microbenchmarks use it.
    """
    coin = random.Random(seed)
    runs = (run_baseline, run_candidate)
    found = []
    before = range(-warmup, 0) if isinstance(warmup, int) else warmup
    for number, at in [*((-1, at) for at in before), *((n, n) for n in range(iterations))]:
        item = items[at % len(items)]
        took = [0.0, 0.0]
        for arm in coin.sample((0, 1), 2):
            start = now(device)
            runs[arm](item)
            took[arm] = (now(device) - start) / 1e9
        if number >= 0:
            found.append((took[0], took[1]))
            if on_sample:
                on_sample(found[-1])
    return found


def take_sample(pair: Pair, plan: Plan, fork: Fork, iteration: int) -> Message:
    """One pair as {"sample": …} for the record; where the arms' tokens differ, with both under "tokens"."""
    if fork.control:
        plan = replace(plan, arms=(plan.arms[0],) * 2, spans=(plan.spans[0],) * 2)
    coin = random.Random(f"{plan.seed}/{fork.number}/{iteration}/{fork.control}")
    order = coin.sample((0, 1), 2)
    before, causes = read_load(), set(throttle_reasons(pair.device))
    results = {arm: run_arm(pair, plan, arm, iteration) for arm in order}
    causes |= set(throttle_reasons(pair.device))
    load = foreign_load(before, read_load())
    if load > MAX_FOREIGN_LOAD:
        causes.add(Cause.FOREIGN_LOAD)
    (baseline_s, left, cycles), (candidate_s, right, _) = results[0], results[1]
    sample = Sample(
        fork=fork.number, iteration=iteration, prompt=plan.prompt(iteration).id, control=fork.control,
        order="baseline first" if order[0] == 0 else "candidate first", baseline_s=baseline_s, candidate_s=candidate_s,
        new_tokens=len(left), cycles=cycles, foreign_load=round(load, 3), dropped=tuple(sorted(causes)),
    )  # fmt: skip
    return {"sample": sample} if left == right else {"sample": sample, "tokens": (left, right)}


def part_calls(pair: Pair, plan: Plan, fork: Fork) -> Iterator[PartCalls]:
    """Instrumented runs, apart from the pairs: seconds of each call of the part, by arm, over a short decode."""
    prompt = plan.prompt(fork.number)
    coin = random.Random(f"{plan.seed}/{fork.number}/part")
    for arm in coin.sample((0, 1), 2):
        spans, whole = Spans(pair.device), plan.arms[arm]
        short = replace(whole, max_new_tokens=min(PART_TOKENS, whole.max_new_tokens), seed=plan.seed)
        cycles = len(decode(pair, prompt.ids, short, record=False, span=spans).cycles)
        # on a GPU a host builder waits inside its span and a device builder runs after it: the longer of the two counts
        calls = [max(s.host, s.device or 0) / 1e9 for s in spans.read() if s.name == PART]
        yield PartCalls(
            fork=fork.number, arm=ARMS[arm], prompt=prompt.id, cycles=cycles, calls_s=tuple(calls)
        )


def warm_up(pair: Pair, plan: Plan, fork: Fork) -> None:
    """Decode by both arms, unmeasured, the fork's first prompt and one for each size of session that its pairs need."""
    work = fork.iterations or (0,)
    for at in to_warm_up([len(plan.prompt(i).ids) for i in work], plan.arms):
        for arm in (0, 1):
            run_arm(pair, plan, arm, work[at])


def fork_messages(pair: Pair, plan: Plan, fork: Fork) -> Iterator[Message]:
    """Each pair as {"sample": …}, then the instrumented runs as {"part": …}; the arms must be warm."""
    for iteration in fork.iterations:
        yield take_sample(pair, plan, fork, iteration)
    if not fork.control:
        for part in part_calls(pair, plan, fork):
            yield {"part": part}
