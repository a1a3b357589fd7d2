"""Taking samples: both arms decode one prompt, in turn, in an order drawn by a fair coin that is recorded.

Arms that can be stopped inside a decode step in lock-step (`lockstep`): a pair is a stretch of text, mostly one cycle, and
an instance is one prompt decoded by sessions made anew. Others decode it whole, one directly after the other. The clock
is the host's, with a synchronise at both ends; spans are off unless an arm is there to measure them. The part that the
arms differ in is timed in decodes of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter, perf_counter_ns
from typing import Any

import torch

from eagle_lab.decode.generate import Cycle, cut, to_warm_up
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import cycles, pair_of
from eagle_lab.measure.cores import foreign_load, read_load
from eagle_lab.measure.environment import Cause, throttle_reasons
from eagle_lab.measure.lockstep import Around, Open, Stretch, lock_step, slicing
from eagle_lab.measure.records import Counts, InstanceSample, PairsOf, PartCalls, Sample, Side
from eagle_lab.measure.spans import Spans, Where, waiting
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import no_span, now
from eagle_lab.runtime.prepare import fixed

# A pair of whole decodes during which other programs took more than this share of this machine's cores is dropped whole,
# and so is any sample during which the GPU was held down. Declared here, before any run, so that it can't be chosen to
# suit a result. Cycles in turn are short enough that what other programs take meets all arms alike.
MAX_FOREIGN_LOAD = 0.25

PART = "tree_mask"  # the stage whose time is measured in the separate instrumented runs
PART_TOKENS = 8
WARM_TOKENS = 4
# While a device waits the host begins the next launch. Seen on an H100: of a shorter wait some 7 microseconds hid in that.
LEAST_NS = 30_000
ARMS: tuple[Side, ...] = ("baseline", "candidate")
SESSIONS = (0, 0, 1)  # the arms that step in turn: the baseline twice, as a control, and the candidate

# {"instance": InstanceSample} or {"sample": Sample}, with {"tokens": …} of each session or arm where they differ, or
# {"part": PartCalls}
Message = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the arms decode, in a comparison (baseline, candidate); `spans` turns the instrumentation of an arm on.

    Iteration i decodes prompt i, modulo their number, with the seed plus i. pairs_of: what is timed in turn, decodes of
    two arms or cycles of any number. sessions: the arms of the sessions that step in turn; where: a fork's delays are
    planted on the host or the device.
    """

    arms: tuple[Arm, ...]
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    seed: int = 0
    spans: tuple[bool, ...] = (False, False)
    pairs_of: PairsOf = "decodes"
    sessions: tuple[int, ...] = SESSIONS
    where: Where = "host"

    def prompt(self, iteration: int) -> Prompt:
        """The prompt of an iteration."""
        return self.prompts[iteration % len(self.prompts)]

    def around(self, pair: Pair) -> list[Around] | None:
        """What each session's slices run inside, see `slicing`; None where an arm's stages are timed: their spans would
        hold the others' slices."""
        arms = [self.arms[number] for number in self.sessions]
        return None if any(self.spans) else slicing([(pair_of(pair, arm), arm.strategy) for arm in arms])


@dataclass(frozen=True)
class Fork:
    """The share of one process: `iterations` are the numbers of its instances or pairs.

    control: decodes the baseline twice (pairs of decodes; cycles bring their control with them), and there is no part to
    time; wholes: so many instances are followed by a pair of whole decodes; seconds: after them no other instance is
    begun; delays_s: seconds that are planted into every cycle of each session, none where it is empty.
    """

    number: int
    iterations: tuple[int, ...]
    control: bool = False
    wholes: int = 0
    seconds: float | None = None
    delays_s: tuple[float, ...] = ()


def deals(iterations: int, forks: int) -> list[tuple[int, ...]]:
    """The numbers of the iterations, dealt out to forks as evenly as they go. Raises ValueError where one would have none."""
    if not 1 <= forks <= iterations:
        raise ValueError(
            f"{iterations} iterations can't be spread over {forks} processes: each takes one at least."
        )
    return [tuple(range(iterations * n // forks, iterations * (n + 1) // forks)) for n in range(forks)]


def remaining(fork: Fork, taken: Iterable[InstanceSample | Sample]) -> Fork:
    """What of a fork was not taken, by whichever process: an iteration belongs to one fork, or to one control."""
    mine = [
        s for s in taken if s.iteration in fork.iterations and getattr(s, "control", False) == fork.control
    ]
    done = {s.iteration for s in mine}
    beside = sum(isinstance(s, Sample) for s in mine)
    rest = tuple(i for i in fork.iterations if i not in done)
    return replace(fork, iterations=rest, wholes=max(0, fork.wholes - beside))


def opened(pair: Pair, plan: Plan, arm: int, iteration: int) -> Open:
    """What opens the decode of an iteration's prompt by an arm of that number, cycle by cycle."""
    ids, seed = plan.prompt(iteration).ids, plan.seed + iteration  # all arms draw the same numbers

    def begin() -> Iterator[Cycle]:
        span = Spans(pair.device) if plan.spans[arm] else no_span
        return cycles(pair, plan.arms[arm], ids, plan.max_new_tokens, seed, span)

    return begin


@dataclass(frozen=True)
class Whole:
    """One whole decode: seconds, those until its first cycle was done, those of the others, new tokens, counts."""

    seconds: float
    first_s: float
    cycles_s: tuple[float, ...]
    tokens: list[int]
    counts: Counts


def run_arm(pair: Pair, plan: Plan, arm: int, iteration: int) -> Whole:
    """Decode an iteration's prompt whole by an arm of that number."""
    begin = opened(pair, plan, arm, iteration)
    start = now(pair.device)
    found: list[Cycle] = []
    ends: list[int] = []
    for cycle in begin():
        found.append(cycle)
        # each cycle ends with its tokens on the host, so only the set-up is waited for
        ends.append(perf_counter_ns() if ends else now(pair.device))
    took = now(pair.device) - start
    known = [token for cycle in found for token in cycle.committed] + [found[-1].bonus]
    tokens = cut(known, plan.max_new_tokens, pair.eos)[0]
    counts = Counts(cycles=len(found), committed=len(known) - 1)
    cycles_s = tuple((end - begun) / 1e9 for begun, end in pairwise(ends))
    return Whole(took / 1e9, (ends[0] - start) / 1e9, cycles_s, tokens, counts)


def time_in_pairs(
    run_baseline: Callable[[Any], Any],
    run_candidate: Callable[[Any], Any],
    items: Sequence[Any],
    iterations: int,
    seed: int | str = 0,
    device: torch.device | str = "cpu",
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
    return found


def renew(pair: Pair, plan: Plan) -> None:
    """Forget what sessions were prepared, so that states, caches and graphs are made anew.

    A step that is compiled whole takes minutes: its sessions stay, and are dealt out to the arms anew.
    """
    if not any(arm.strategy.runtime == "compile" for arm in plan.arms):
        for one in (pair, *pair.beside.values()):
            one.sessions.clear()


def delayed(arm: Open, wait: Callable[[int], None], nanoseconds: int) -> Open:
    """The same decode, each of its cycles so much longer."""

    def begin() -> Iterator[Cycle]:
        for cycle in arm():
            wait(nanoseconds)
            yield cycle

    return begin


def take_instance(
    pair: Pair, plan: Plan, fork: Fork, iteration: int, on_stretch: Callable[[Stretch], object] | None = None
) -> Message:
    """One instance as {"instance": …} for the record; where the sessions' tokens differ, with each one's under "tokens"."""
    coin = random.Random(f"{plan.seed}/{fork.number}/{iteration}/cycles")
    renew(pair, plan)
    before, causes = read_load(), set(throttle_reasons(pair.device))
    arms = [opened(pair, plan, arm, iteration) for arm in plan.sessions]
    if fork.delays_s:
        wait = waiting(plan.where, pair.device)
        # on a device each arm waits, and long enough to cover the launch of what follows: only the lengths differ
        least = LEAST_NS if plan.where == "device" else 0
        arms = [
            delayed(arm, wait, least + round(s * 1e9)) for arm, s in zip(arms, fork.delays_s, strict=True)
        ]
    around = plan.around(pair)
    found = lock_step(pair, arms, plan.max_new_tokens, coin, on_stretch, around)
    causes |= set(throttle_reasons(pair.device))
    sample = InstanceSample(
        fork=fork.number, iteration=iteration, prompt=plan.prompt(iteration).id, made=found.made, first_s=found.first_s,
        seconds=tuple(s.seconds for s in found.stretches), order=tuple(s.order for s in found.stretches),
        tokens=tuple(s.tokens for s in found.stretches), foreign_load=round(foreign_load(before, read_load()), 3),
        dropped=tuple(sorted(causes)), slices=tuple(_rounded(s.slices) for s in found.stretches if s.slices),
    )  # fmt: skip
    same = len(set(found.tokens)) == 1
    return (
        {"instance": sample} if same else {"instance": sample, "tokens": [list(ids) for ids in found.tokens]}
    )


def _rounded(slices: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    # to a tenth of a microsecond, and no time is 0
    return tuple(tuple(max(1e-7, round(s, 7)) for s in arm) for arm in slices)


def paired(
    plan: Plan, fork: Fork, iteration: int, order: Sequence[int], load: float, causes: set[Cause], *,
    counts: tuple[Counts | None, Counts | None], **measured: Any,
) -> Sample:  # fmt: skip
    """A pair of whole decodes as a sample, dropped where other programs took more than `MAX_FOREIGN_LOAD`.

    order: the arms as they decoded; causes: for which it is dropped besides; measured: further fields of `Sample`.
    """
    dropped = causes | ({Cause.FOREIGN_LOAD} if load > MAX_FOREIGN_LOAD else set())
    return Sample(
        fork=fork.number, iteration=iteration, prompt=plan.prompt(iteration).id, control=fork.control,
        order="baseline first" if order[0] == 0 else "candidate first", cycles=counts[0].cycles if counts[0] else None,
        counts=counts, foreign_load=round(load, 3), dropped=tuple(sorted(dropped)), **measured,
    )  # fmt: skip


def take_sample(pair: Pair, plan: Plan, fork: Fork, iteration: int) -> Message:
    """One pair of whole decodes as {"sample": …}; where the arms' tokens differ, with both under "tokens"."""
    if fork.control:
        plan = replace(plan, arms=(plan.arms[0],) * 2, spans=(plan.spans[0],) * 2)
    coin = random.Random(f"{plan.seed}/{fork.number}/{iteration}/{fork.control}")
    order = coin.sample((0, 1), 2)
    before, causes = read_load(), set(throttle_reasons(pair.device))
    results = {arm: run_arm(pair, plan, arm, iteration) for arm in order}
    causes |= set(throttle_reasons(pair.device))
    load = foreign_load(before, read_load())
    left, right = results[0], results[1]
    sample = paired(
        plan, fork, iteration, order, load, causes, baseline_s=left.seconds, candidate_s=right.seconds,
        new_tokens=len(left.tokens), candidate_tokens=len(right.tokens), counts=(left.counts, right.counts),
        first_s=(left.first_s, right.first_s),
    )  # fmt: skip
    same = left.tokens == right.tokens
    return {"sample": sample} if same else {"sample": sample, "tokens": (left.tokens, right.tokens)}


def part_calls(pair: Pair, plan: Plan, fork: Fork) -> Iterator[PartCalls]:
    """Instrumented runs, apart from the pairs: seconds of each call of the part, by arm, over a short decode."""
    prompt = plan.prompt(fork.number)
    coin = random.Random(f"{plan.seed}/{fork.number}/part")
    for arm in coin.sample((0, 1), 2):
        if plan.arms[arm].plain:
            continue  # it builds no mask
        spans, limit = Spans(pair.device), min(PART_TOKENS, plan.max_new_tokens)
        taken = len(list(cycles(pair, plan.arms[arm], prompt.ids, limit, plan.seed, spans)))
        # on a GPU a host builder waits inside its span and a device builder runs after it: the longer of the two counts
        calls = [max(s.host, s.device or 0) / 1e9 for s in spans.read() if s.name == PART]
        yield PartCalls(fork=fork.number, arm=ARMS[arm], prompt=prompt.id, cycles=taken, calls_s=tuple(calls))


def warm_up(pair: Pair, plan: Plan, fork: Fork) -> None:
    """Decode by all arms, unmeasured, the fork's first prompt and one for each size of session that its pairs need.

    Before cycles in turn the first prompt is enough, and some tokens of it where nothing is compiled or captured: no
    stretch holds a session's preparation.
    """
    work = fork.iterations or (0,)
    decodings = [arm.decoding(plan.max_new_tokens) for arm in plan.arms]
    sizes = to_warm_up([len(plan.prompt(i).ids) for i in work], decodings)
    if plan.pairs_of == "cycles":
        sizes = sizes[:1]
        if not any(fixed(arm.strategy.runtime) for arm in plan.arms):
            plan = replace(plan, max_new_tokens=min(WARM_TOKENS, plan.max_new_tokens))
    for at in sizes:
        for arm in range(len(set(plan.arms))):  # equal arms are warm together
            run_arm(pair, plan, arm, work[at])


def fork_messages(
    pair: Pair, plan: Plan, fork: Fork, on_stretch: Callable[[Stretch], object] | None = None
) -> Iterator[Message]:
    """One process's samples: each instance or pair as it is taken, then the instrumented runs as {"part": …}.

    The arms must be warm. Whole decodes beside cycles follow an instance directly, while its sessions are there.
    on_stretch: told of each stretch of cycles, between two measurements; what it raises ends the run.
    """
    begun = perf_counter()
    for number, iteration in enumerate(fork.iterations):
        if number and fork.seconds is not None and perf_counter() - begun > fork.seconds:
            break
        if plan.pairs_of == "decodes":
            yield take_sample(pair, plan, fork, iteration)
            continue
        yield take_instance(pair, plan, fork, iteration, on_stretch)
        if number < fork.wholes:
            yield take_sample(pair, plan, fork, iteration)
    if not fork.control:
        for part in part_calls(pair, plan, fork):
            yield {"part": part}
