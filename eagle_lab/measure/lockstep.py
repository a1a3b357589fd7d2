"""Arms in lock-step: several decodes of one prompt in one process, each stepping in turn, so that a pair is a cycle.

The arm that is furthest behind in the text goes next; where several are, a coin that is drawn anew each time decides.
Whenever all arms stand at the same place, a stretch of text ends, and each arm's seconds for it are one sample. Arms
that commit the same tokens each cycle make stretches of one cycle. What disturbs a machine for longer than a cycle
meets all arms alike.

An instance is one such decode: states, caches and graphs made anew, in an order drawn by a coin. Two equal arms of one
instance differ by where their memory lies, 0.3% on an H100 and 0.5 to 0.9% on a CPU, for as long as the instance
lives; so intervals are taken over instances and processes, never over stretches.
Source: duet benchmarking, Bulej et al., ICPE 2020 (arXiv 2001.05811).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from eagle_lab.decode.generate import Cycle, cut
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import cycles
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import now

# Opens a decode: an iterator that runs one cycle each time it is asked.
Open = Callable[[], Iterator[Cycle]]


@dataclass(frozen=True)
class Stretch:
    """A stretch of text that every arm decoded.

    seconds, cycles: each arm's, by arm; order: which arm stepped, cycle by cycle; tokens: the stretch's length.
    """

    seconds: tuple[float, ...]
    cycles: tuple[int, ...]
    order: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Instance:
    """One decode of a prompt by all arms in lock-step.

    made: the arms in the order in which their states were made; first_s: seconds of each arm's set-up, prefill and first
    cycle, which no stretch has; tokens: each arm's new ids, up to where the first arm ended.
    """

    made: tuple[int, ...]
    first_s: tuple[float, ...]
    stretches: tuple[Stretch, ...]
    tokens: tuple[tuple[int, ...], ...]


def seconds_a_token(
    pair: Pair,
    arm: Arm,
    shapes: Sequence[TreeShape],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds a token, prefill and first cycle left out, of the arm with each of some trees, which take turns by cycles.

    The tree that is furthest behind in the text goes next. Each prompt is decoded twice, and the first time warms up.
    done: told of each prompt. NaN: no cycle came after the first.
    """
    seconds, tokens = [0.0] * len(shapes), [0] * len(shapes)
    for prompt in prompts:
        for warm in (False, True):
            decodes = [
                cycles(pair, replace(arm, shape=shape), prompt.ids, max_new_tokens, seed) for shape in shapes
            ]
            at = {n: len(next(decode).committed) for n, decode in enumerate(decodes)}
            while at:
                n = min(at, key=lambda n: at[n])
                start = now(pair.device)
                cycle = next(decodes[n], None)
                took = (now(pair.device) - start) / 1e9
                if cycle is None:
                    del at[n]
                    continue
                at[n] += len(cycle.committed)
                seconds[n] += took * warm
                tokens[n] += len(cycle.committed) * warm
        done()
    return [s / t if t else math.nan for s, t in zip(seconds, tokens, strict=True)]


def lock_step(
    pair: Pair,
    arms: Sequence[Open],
    max_new_tokens: int,
    coin: random.Random,
    on_stretch: Callable[[Stretch], object] | None = None,
) -> Instance:
    """Decode one prompt by all arms in lock-step.

    Args: arms: each opens a decode of the same prompt with the same limit; coin: draws who is made first and who goes
    first; on_stretch: told of each stretch as it ends, and what it raises ends the instance.
    """
    places = range(len(arms))
    made = coin.sample(places, len(arms))
    decodes: list[Iterator[Cycle]] = [iter(()) for _ in arms]
    tokens: list[list[int]] = [[] for _ in arms]
    first, ended = [0.0] * len(arms), [False] * len(arms)

    def step(arm: int) -> float:
        start = now(pair.device)
        cycle = next(decodes[arm])
        took = (now(pair.device) - start) / 1e9
        tokens[arm].extend(cycle.committed)
        ended[arm] = cut([*tokens[arm], cycle.bonus], max_new_tokens, pair.eos)[1]
        return took

    for arm in made:
        decodes[arm] = arms[arm]()
        first[arm] = step(arm)
    stretches: list[Stretch] = []
    order: list[int] = []
    seconds, begun = [0.0] * len(arms), None
    while True:
        at = [len(ids) for ids in tokens]
        if len(set(at)) == 1:
            if begun is not None:
                cycles = tuple(order.count(arm) for arm in places)
                stretches.append(Stretch(tuple(seconds), cycles, tuple(order), at[0] - begun))
                if on_stretch:
                    on_stretch(stretches[-1])
            begun, seconds, order = at[0], [0.0] * len(arms), []
        behind = [arm for arm in places if at[arm] == min(at)]
        if any(ended[arm] for arm in behind):
            break
        arm = coin.choice(behind)
        seconds[arm] += step(arm)
        order.append(arm)
    for decode in decodes:
        decode.close()  # type: ignore[attr-defined]
    shortest = min(map(len, tokens))
    return Instance(
        tuple(made), tuple(first), tuple(stretches), tuple(tuple(ids[:shortest]) for ids in tokens)
    )
