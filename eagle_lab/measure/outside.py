"""Pairs of whole decodes by arms that this process can't be: workers and servers, one at work at a time, in turn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from eagle_lab.decode.generate import to_warm_up
from eagle_lab.engines.opened import Opened, opened
from eagle_lab.engines.protocol import Decoded
from eagle_lab.measure.cores import foreign_load, read_load
from eagle_lab.measure.environment import throttle_reasons
from eagle_lab.measure.pairs import Fork, Message, Plan, paired
from eagle_lab.measure.records import Counts
from eagle_lab.models.pair import Pair
from eagle_lab.models.targets import free_bytes


class Outside:
    """The engines of one plan's arms, started for each fork anew and ended with it; a context manager.

    by_blocks: two of them don't fit into memory beside each other, so each fork has all of one arm's decodes, then all of
    the other's. Raises what `opened` raises.
    """

    def __init__(self, pair: Pair, plan: Plan) -> None:
        self.pair, self.plan = pair, plan
        own = [arm for arm in plan.arms if arm.engine != "openai"]
        self.by_blocks = len(own) * pair.needed_bytes > free_bytes(pair.device, every=False)
        self.context = max(len(prompt.ids) for prompt in plan.prompts) + plan.max_new_tokens
        # a tree's slots lie beyond the text
        self.context += max(arm.shape.total_tokens + arm.shape.width for arm in plan.arms) + 1
        self.ready: dict[int, Opened] = {}
        self.soon: tuple[int, ...] = (0,)  # the iterations that are decoded next
        self.warm: set[tuple[int, int]] = set()  # arms and iterations that were decoded untimed
        self.stack = ExitStack()
        self.used = False

    def __enter__(self) -> Outside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines that run."""
        self.ready.clear()
        self.warm.clear()
        self.stack.close()

    def engine(self, arm: int) -> Opened:
        """The engine of arm 0 (baseline) or 1 (candidate), started where it isn't; alone where two don't fit."""
        if self.by_blocks and arm not in self.ready:
            self.close()
        if arm not in self.ready:
            one = opened(self.pair, self.plan.arms[arm], self.context)
            self.ready[arm] = self.stack.enter_context(one)
        self._warm_up(arm)
        return self.ready[arm]

    def _warm_up(self, arm: int) -> None:
        """Decode one prompt of each size that comes next, untimed: the first of a size may compile."""
        lengths = [len(self.plan.prompt(iteration).ids) for iteration in self.soon]
        for place in to_warm_up(lengths, [self.plan.arms[arm].decoding(self.plan.max_new_tokens)]):
            if (arm, self.soon[place]) not in self.warm:
                self.warm.add((arm, self.soon[place]))
                self.decode(arm, self.soon[place], first=True)

    def decode(self, arm: int, iteration: int, first: bool = False) -> Decoded:
        """One decode of an iteration's prompt; both arms are given the same seed."""
        plan = self.plan
        return self.engine(arm).decode(
            plan.prompt(iteration), plan.max_new_tokens, plan.seed + iteration, first
        )

    def messages(self, fork: Fork) -> Iterator[Message]:
        """The fork's pairs as {"sample": …, "decodes": (baseline's, candidate's)}, by engines that no other fork used."""
        if self.used:
            self.close()
        self.used, self.soon = True, tuple(fork.iterations)
        arms = (0, 0) if fork.control else (0, 1)
        coin = random.Random(f"{self.plan.seed}/{fork.number}/{fork.control}/outside")
        orders = [coin.sample((0, 1), 2) for _ in fork.iterations]
        if self.by_blocks:
            orders = [orders[0] for _ in orders]
        done: dict[tuple[int, int], tuple[Decoded, float, set[Any]]] = {}

        def take(place: int, iteration: int) -> None:
            process = self.engine(arms[place]).process
            beside = () if process is None else (process,)
            before, causes = read_load(beside), set(throttle_reasons(self.pair.device))
            found = self.decode(arms[place], iteration)
            causes |= set(throttle_reasons(self.pair.device))
            load = foreign_load(before, read_load(beside))
            # what a server of this machine takes can't be told from what others take, unless its process is seen
            here = process is not None or self.plan.arms[arms[place]].engine != "openai"
            done[iteration, place] = found, load if here else 0.0, causes

        for place in orders[0] if self.by_blocks and orders else ():
            for iteration in fork.iterations:
                take(place, iteration)
        for iteration, order in zip(fork.iterations, orders, strict=True):
            for place in order:
                if (iteration, place) not in done:
                    take(place, iteration)
            yield self._sample(fork, iteration, order, [done[iteration, place] for place in (0, 1)])

    def _sample(
        self,
        fork: Fork,
        iteration: int,
        order: Sequence[int],
        taken: Sequence[tuple[Decoded, float, set[Any]]],
    ) -> Message:
        (left, one, causes), (right, other, more) = taken
        first = left.first_token_seconds, right.first_token_seconds
        sample = paired(
            self.plan, fork, iteration, order, max(one, other), causes | more, baseline_s=left.seconds,
            candidate_s=right.seconds, new_tokens=left.length, candidate_tokens=right.length,
            counts=(_counts(left), _counts(right)), gap_s=(_gap(left), _gap(right)),
            first_s=(first[0], first[1]) if first[0] and first[1] else None,
        )  # fmt: skip
        return {"sample": sample, "decodes": (left, right)}


def _counts(found: Decoded) -> Counts | None:
    return Counts(cycles=found.counts[0], committed=found.counts[1]) if found.counts else None


def _gap(found: Decoded) -> float | None:
    """The median time between pieces of a stream, seconds; None where nobody saw two."""
    arrivals = found.arrivals_s or ()
    return float(np.median(np.diff(arrivals))) if len(arrivals) > 1 else None
