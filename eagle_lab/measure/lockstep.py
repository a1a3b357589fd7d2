"""Arms in lock-step: several decodes of one prompt in one process, each stepping in turn, so that a pair is a cycle.

The arm that is furthest behind in the text goes next; where several are, a coin that is drawn anew each time decides.
Whenever all arms stand at the same place, a stretch of text ends, and each arm's seconds for it are one sample. Arms
that commit the same tokens each cycle make stretches of one cycle. What disturbs a machine for longer than a cycle
meets all arms alike.

An instance is one such decode: states, caches and graphs made anew, in an order drawn by a coin. Two equal arms of one
instance differ by where their memory lies, 0.3% on an H100 and up to 0.9% on a CPU, for as long as the instance lives;
so intervals are taken over instances and processes, never over stretches.

Where a cycle takes long and nothing in it is compiled or captured, as on a CPU, the arms take turns inside it too: each
pauses at every layer, and inside a plain product of about two layers' weights or more, as the target's last. A shared
machine's speed wanders within a second, and a cycle there takes half of one.
Sources: duet benchmarking, Bulej et al., ICPE 2020 (arXiv 2001.05811); issue 25.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eagle_lab.decode.forward import asked
from eagle_lab.decode.generate import Cycle, cut
from eagle_lab.decode.strategy import Strategy
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import cycles
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.layers import LAST
from eagle_lab.runtime.prepare import fixed
from eagle_lab.runtime.projections import in_pieces
from eagle_lab.runtime.swap import swapped

# Opens a decode: an iterator that runs one cycle each time it is asked.
Open = Callable[[], Iterator[Cycle]]
# What an arm's slices run inside: its attention and products, where arms may differ in them.
Around = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Stretch:
    """A stretch of text that every arm decoded.

    seconds, cycles: each arm's, by arm; order: which arm stepped, cycle by cycle; tokens: the stretch's length; slices: what
    each arm's seconds are the sum of, by arm, where cycles were cut.
    """

    seconds: tuple[float, ...]
    cycles: tuple[int, ...]
    order: tuple[int, ...]
    tokens: int
    slices: tuple[tuple[float, ...], ...] = ()


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


def slicing(arms: Sequence[tuple[Pair, Strategy]]) -> list[Around] | None:
    """What each arm's slices run inside; None where cycles can't be cut: beside a device, or compiled or captured."""
    if any(pair.device.type != "cpu" or fixed(strategy.runtime) for pair, strategy in arms):
        return None
    return [_slices_of(pair, strategy) for pair, strategy in arms]


def _pause() -> None:
    """Leave the slice that runs here; nothing where none does."""
    from greenlet import getcurrent

    if (home := getcurrent().parent) is not None:
        home.switch()


def _slices_of(pair: Pair, strategy: Strategy) -> Around:
    layers = pair.target.get_decoder().layers
    # a quantized layer may keep its weights as buffers
    sizes = [sum(held.numel() for held in chain(layer.parameters(), layer.buffers())) for layer in layers]
    most = max(1, int(median(sizes)))
    places: list[Any] = in_pieces((pair.target, pair.head), strategy.product, most, len(layers), _pause)
    if strategy.product == "transposed":  # the step asks for these itself, inside
        places.append((vars(pair), "transposed", [*pair.transposed, *places]))

    @contextmanager
    def around() -> Iterator[None]:
        with swapped(places), asked(pair, strategy):
            yield

    return around


@contextmanager
def _pauses(pair: Pair) -> Iterator[None]:
    """Inside, a forward of the target pauses before each layer and the last norm, and the heads before each of theirs."""
    decoder = pair.target.get_decoder()
    last = [norm] if (norm := decoder._modules.get(LAST)) is not None else []
    heads = [one.head for one in (pair, *pair.beside.values())]

    def hook(*_: object) -> None:  # what it returned would be the module's input
        _pause()

    with ExitStack() as stack:
        for module in (*decoder.layers, *last, *heads):
            handle = module.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def _in_slices(
    pair: Pair, runs: dict[int, Callable[[], Cycle]], around: Sequence[Around], coin: random.Random
) -> tuple[dict[int, Cycle], dict[int, list[float]]]:
    """One cycle of each arm at once: a slice of each in turn, in an order drawn anew each time.

    The target's tapped states are each arm's own. Nothing but the slices is timed. Returns cycles, and the seconds of each
    slice, in the order in which the arms began.
    """
    from greenlet import greenlet

    heads = pair.tapped
    running = {arm: greenlet(run) for arm, run in runs.items()}
    for one in running.values():
        one.gr_context = copy_context()  # which transformers keeps a forward's state in
    taps: dict[int, dict[int, Tensor]] = {arm: {} for arm in runs}
    found: dict[int, Cycle] = {}
    seconds: dict[int, list[float]] = {}
    # outside of all slices: the mode is the thread's, and arms end in another order than they began
    with torch.inference_mode(), _pauses(pair):
        try:
            while running:
                for arm in coin.sample(sorted(running), len(running)):
                    with around[arm]():
                        heads.update(taps[arm])
                        start = now(pair.device)
                        got = running[arm].switch()
                        took = (now(pair.device) - start) / 1e9
                        seconds.setdefault(arm, []).append(took)
                        taps[arm] = dict(heads)
                    if running[arm].dead:
                        found[arm] = got
                        del running[arm]
        finally:
            # another arm failed: what was begun is closed, where it was begun
            for arm, one in running.items():
                with around[arm]():
                    one.throw()
    return found, seconds


def lock_step(
    pair: Pair,
    arms: Sequence[Open],
    max_new_tokens: int,
    coin: random.Random,
    on_stretch: Callable[[Stretch], object] | None = None,
    around: Sequence[Around] | None = None,
) -> Instance:
    """Decode one prompt by all arms in lock-step.

    Args: arms: each opens a decode of the same prompt with the same limit; coin: draws who is made first and who goes
    first; on_stretch: told of each stretch as it ends, and what it raises ends the instance; around: of each arm where
    cycles are cut into slices, see `slicing`.
    """
    places = range(len(arms))
    made = coin.sample(places, len(arms))
    decodes: list[Iterator[Cycle]] = [iter(()) for _ in arms]
    tokens: list[list[int]] = [[] for _ in arms]
    first, ended = [0.0] * len(arms), [False] * len(arms)

    def keep(arm: int, cycle: Cycle) -> None:
        tokens[arm].extend(cycle.committed)
        ended[arm] = cut([*tokens[arm], cycle.bonus], max_new_tokens, pair.eos)[1]

    def step(arm: int) -> float:
        start = now(pair.device)
        cycle = next(decodes[arm])
        took = (now(pair.device) - start) / 1e9
        keep(arm, cycle)
        return took

    for arm in made:
        decodes[arm] = arms[arm]()
        first[arm] = step(arm)
    stretches: list[Stretch] = []
    order: list[int] = []
    slices: list[list[float]] = [[] for _ in arms]
    begun = None
    while True:
        at = [len(ids) for ids in tokens]
        if len(set(at)) == 1:
            if begun is not None:
                cycles = tuple(order.count(arm) for arm in places)
                cut_up = tuple(map(tuple, slices)) if around else ()
                seconds = tuple(map(sum, slices))
                stretches.append(Stretch(seconds, cycles, tuple(order), at[0] - begun, cut_up))
                if on_stretch:
                    on_stretch(stretches[-1])
            begun, slices, order = at[0], [[] for _ in arms], []
        behind = [arm for arm in places if at[arm] == min(at)]
        if any(ended[arm] for arm in behind):
            break
        if around is None:
            arm = coin.choice(behind)
            slices[arm].append(step(arm))
            order.append(arm)
            continue
        found, took = _in_slices(pair, {arm: partial(next, decodes[arm]) for arm in behind}, around, coin)
        for arm, cycle in found.items():
            keep(arm, cycle)
            slices[arm] += took[arm]
        order += took
    for decode in decodes:
        decode.close()  # type: ignore[attr-defined]
    shortest = min(map(len, tokens))
    return Instance(
        tuple(made), tuple(first), tuple(stretches), tuple(tuple(ids[:shortest]) for ids in tokens)
    )
