"""How a cycle scales: with the batch and with the text before it, EAGLE-3 and plain decoding side by side.

A cycle's arithmetic grows with batch · nodes, plain decoding's only with the batch, so a batch that fills the machine
leaves speculative decoding nothing to gain: where that happens is what is measured here, with a tree that grows smaller
where the batch grows. A long prefix costs both its keys
and values, once a cycle and once a token: how near to the floor of reading them each comes is measured too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, cycle, islice, product
from statistics import fmean, median
from typing import Literal

import numpy as np
from pydantic import Field

from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.forward import asked
from eagle_lab.decode.generate import Cycle, check_shape, decode, decode_stream, plain_stream, to_warm_up
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import Decoding, check
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import base_arm
from eagle_lab.measure.floor import Experts, Floor, floors
from eagle_lab.measure.pairs import Plan, deals, time_in_pairs
from eagle_lab.measure.records import Decoded, Difference, Part, Record, made
from eagle_lab.measure.worker import check_anew, in_processes
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.runtime.clock import now
from eagle_lab.studies.profile import get_prompts
from eagle_lab.verdict.agreement import agree, settle
from eagle_lab.verdict.stats import Interval, ratios_of, shift

PREFIXES = (1024, 4096, 16384, 32768)  # tokens before the cycles, where the target's context holds them
CYCLES = 24  # timed of each way after each prefix
TEXTS = 8  # as many are begun where answers end before so many cycles
CHOOSING = 3  # timed decodes of a tree in the choice for a batch


class Batch(Part):
    """One batch size: by process, seconds of each timed pair, plain and EAGLE-3, prefill included, and the plain one's new
    tokens.

    rows_parted: rows of the first batch that part at a near tie from what they give alone; widest_tie: the one whose
    margin is the largest for its tolerance.
    """

    batch: int
    new_tokens: list[list[int]]
    plain_s: list[list[float]]
    eagle_s: list[list[float]]
    acceptance_length: float
    stated: bool
    strategy: str
    top_k: int
    depth: int
    total_tokens: int
    rows_parted: int
    widest_tie: Difference | None = None

    @cached_property
    def ratio(self) -> Interval:
        """EAGLE-3's time over plain decoding's: low, estimate, high."""
        both = zip(self.plain_s, self.eagle_s, strict=True)
        return ratios_of(shift([np.log(eagle) - np.log(plain) for plain, eagle in both]))

    @property
    def pairs(self) -> int:
        """Timed pairs of all processes."""
        return sum(map(len, self.plain_s))

    @property
    def plain_decode_s(self) -> float:
        """Seconds of plain decoding, the median."""
        return median(chain(*self.plain_s))

    @property
    def eagle_decode_s(self) -> float:
        """Seconds of EAGLE-3 decoding, the median."""
        return median(chain(*self.eagle_s))

    @property
    def plain_rate(self) -> float:
        """Plain decoding's median of new tokens a second."""
        return self._rate(self.plain_s)

    @property
    def eagle_rate(self) -> float:
        """EAGLE-3's median of new tokens a second."""
        return self._rate(self.eagle_s)

    def _rate(self, seconds: list[list[float]]) -> float:
        return median(t / s for t, s in zip(chain(*self.new_tokens), chain(*seconds), strict=True))


def sweep(
    pair: Pair,
    prompts: Sequence[Prompt],
    decodings: Sequence[Decoding],
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 6,
    forks: int = 1,
    seed: int = 0,
    stated: Mapping[int, float] | None = None,
) -> list[Batch]:
    """Each batch size decoded both ways `repeats` times in random order, spread over `forks` fresh processes.

    decodings: alike but for their trees. A batch takes the one that `fastest_way` finds here, so no measured pair has chosen
    it.
    A batch takes the next prompts in turn. Before any is timed, the rows of the first batch of each size are held against
    what they give alone. stated: tokens a cycle by draft nodes (random weights accept next to nothing); EAGLE-3 then decodes
    so many fewer tokens, a token a cycle or so. Raises ValueError for a bad batch size and for a number of processes that the repeats or
    the pair can't have, before any decode, ArmsDisagree where a row gives other tokens than alone and no near tie of
    logits explains it, and WorkerDied where a process ends early.
    """
    tau = [stated[d.shape.total_tokens] if stated else None for d in decodings]
    ways = [
        (d, replace(d, max_new_tokens=math.ceil(d.max_new_tokens / (length or 1))))
        for d, length in zip(decodings, tau, strict=True)
    ]
    name = str(decodings[0].strategy)
    for batch, one in product(batches, decodings):
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch size {batch!r} must be a whole number of at least 1.")
        check_early(pair, check(one.strategy, pair.device, rows=batch), batch * (one.shape.total_tokens + 1))
    shares, rows, taken_ways = deals(repeats, forks), [], list[int]()
    arms = [base_arm(pair, Arm(decodings[0].strategy))]
    if forks > 1:
        check_anew(pair, Plan(tuple(arms), (), 0))
    for batch in batches:
        several = groups(prompts, batch, range(CHOOSING))
        taken_ways.append(fastest_way(pair, several, [short for _, short in ways]))
        rows.append(rows_against_alone(pair, several[0], ways[taken_ways[-1]][1]))
        for row in rows[-1]:
            settle(row, f"in a batch of {batch} {name!r} decodes other tokens than alone")
    each = in_processes(
        pair, arms, forks, batches_here, prompts=prompts, batches=batches, shares=shares, ways=[ways[at] for at in taken_ways],
        seed=seed,
    )  # fmt: skip
    return [
        Batch(
            batch=batch, strategy=name, **asdict(decodings[at].shape), new_tokens=[one.new_tokens for one in taken],
            plain_s=[one.plain_s for one in taken], eagle_s=[one.eagle_s for one in taken],
            acceptance_length=tau[at] or fmean(length for one in taken for length in one.lengths), stated=stated is not None,
            rows_parted=sum(row is not None for row in alone), widest_tie=widest(alone),
        )
        for batch, at, alone, taken in zip(batches, taken_ways, rows, zip(*each, strict=True), strict=True)
    ]  # fmt: skip


def fastest_way(pair: Pair, batches: Sequence[Sequence[Sequence[int]]], decodings: Sequence[Decoding]) -> int:
    """The number of the decoding that takes the least time for the same batches, ids [rows, length] each, all together."""
    if len(decodings) == 1:
        return 0
    took = []
    for decoding in decodings:
        for at in to_warm_up([max(map(len, ids)) for ids in batches], [decoding]):
            decode_batch(pair, batches[at], decoding)
        start = now(pair.device)
        for ids in batches:
            decode_batch(pair, ids, decoding)
        took.append(now(pair.device) - start)
    return took.index(min(took))


@dataclass(frozen=True)
class OfBatch:
    """What one process found of one batch size: of each pair plain decoding's new tokens and the seconds of both ways, and
    tokens a cycle of each row."""

    new_tokens: list[int]
    plain_s: list[float]
    eagle_s: list[float]
    lengths: list[float]


def groups(prompts: Sequence[Prompt], batch: int, numbers: Sequence[int]) -> list[list[Sequence[int]]]:
    """The prompts' ids in the batches of these numbers: the next prompts in turn, from the first again after the last whole
    batch."""
    starts = [n % max(1, len(prompts) // batch) * batch for n in numbers]
    return [[prompts[(start + i) % len(prompts)].ids for i in range(batch)] for start in starts]


def batches_here(
    pair: Pair,
    number: int,
    *,
    prompts: Sequence[Prompt],
    batches: Sequence[int],
    shares: Sequence[Sequence[int]],
    ways: Sequence[tuple[Decoding, Decoding]],
    seed: int,
) -> list[OfBatch]:
    """One process's share of the pairs of `sweep`, for each batch size; ways: of each, what plain decoding and what EAGLE-3
    decodes."""
    found = []
    for batch, (decoding, short) in zip(batches, ways, strict=True):
        mine, made, lengths = groups(prompts, batch, shares[number]), list[int](), list[float]()

        def plain(ids: list[Sequence[int]], made: list[int] = made, decoding: Decoding = decoding) -> None:
            made.append(sum(len(row.tokens) for row in decode_batch(pair, ids, decoding, plain=True)))

        def eagle(ids: list[Sequence[int]], lengths: list[float] = lengths, short: Decoding = short) -> None:
            lengths += [row.acceptance_length for row in decode_batch(pair, ids, short)]

        longest, count = [max(map(len, group)) for group in mine], len(mine)
        first = sorted({*to_warm_up(longest, [decoding]), *to_warm_up(longest, [short])})
        seconds = time_in_pairs(plain, eagle, mine, count, f"{seed}/{number}", pair.device, warmup=first)
        both = [p for p, _ in seconds], [e for _, e in seconds]
        found.append(OfBatch(made[-count:], *both, lengths[-count * batch :]))  # the first ones warmed up
    return found


def rows_against_alone(
    pair: Pair, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[Difference | None]:
    """Where each row of one batch parts from the same prompt decoded alone, judged by the target's logits; None for the
    same tokens."""
    together = decode_batch(pair, prompts, decoding)
    return [
        agree(pair, ids, row.tokens, decode(pair, ids, decoding, record=False).tokens, decoding)
        for ids, row in zip(prompts, together, strict=True)
    ]


def widest(found: Sequence[Difference | None]) -> Difference | None:
    """The difference whose margin is the largest for its tolerance; None where there is none."""
    parted = [one for one in found if one is not None]
    return max(
        parted, key=lambda one: (one.margin or 0.0) / one.tolerance if one.tolerance else 0.0, default=None
    )


def crossing(found: Sequence[Batch], slower: bool = False) -> int | None:
    """The smallest batch from which on speculative decoding is not measured to be faster, or, with `slower`, is measured
    to be slower; None where there is none."""
    ends = [row.ratio[0] > 1 if slower else row.ratio[2] >= 1 for row in found]
    return next((row.batch for at, row in enumerate(found) if all(ends[at:])), None)


class Turns(Part):
    """Cycles of one way after one prefix. Times in seconds.

    first_s: set-up, prefill and first cycle of each text; cycles_s: each cycle after it; tokens: what each of these committed.
    """

    first_s: list[float]
    cycles_s: list[float]
    tokens: list[int]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first quartile of the cycles' seconds, their median, and the third."""
        low, middle, high = np.quantile(self.cycles_s, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    @property
    def median(self) -> float:
        """Seconds of the median cycle."""
        return self.quartiles[1]


class Context(Part):
    """Cycles after `prefix` tokens, EAGLE-3's and plain decoding's in turn, and their floor there.

    tie: where the tokens of the two part at a near tie of logits, None where they are the same.
    """

    prefix: int
    eagle: Turns
    plain: Turns
    floor: Floor | Experts
    tie: Difference | None = None

    @property
    def floor_s(self) -> float | None:
        """Seconds that a cycle takes at the least; None where there is no floor."""
        return None if isinstance(self.floor, Experts) else self.floor.cycle

    @property
    def plain_floor_s(self) -> float | None:
        """Seconds that a plain token takes at the least; None where there is no floor."""
        return None if isinstance(self.floor, Experts) else self.floor.parts["plain token"].seconds


class ContextsSettings(Decoded):
    """What was decoded; stated_acceptance: tokens a cycle, where they are stated and not measured."""

    cycles: int
    stated_acceptance: float | None


class ContextsRecord(Record):
    """A cycle's time after prefixes of several lengths, for one target on one machine."""

    schema_name: Literal["eagle_lab.contexts.v1"] = Field("eagle_lab.contexts.v1", alias="schema")
    settings: ContextsSettings
    contexts: list[Context] = []

    def acceptance_length(self, row: Context) -> float:
        """Tokens a cycle after one prefix: the stated ones, else those that its cycles committed."""
        return self.settings.stated_acceptance or fmean(row.eagle.tokens)

    def speed(self, row: Context) -> float:
        """How many times as fast as plain decoding, prefill left out, EAGLE-3 is after one prefix."""
        return self.acceptance_length(row) * row.plain.median / row.eagle.median


def best_at_length(pair: Pair) -> str:
    """The strategy whose cycles are the fastest after a long prefix on the pair's device."""
    graph = pair.device.type == "cuda"
    return "cuda,attention=tree_fused,runtime=compile+cuda_graph" if graph else "doubling,attention=tree"


def beyond(shape: TreeShape, cycles: int) -> int:
    """Tokens after a prefix for which there must be room, so that so many cycles can be timed."""
    return (cycles + 2) * shape.width


def contexts(
    pair: Pair,
    prefixes: Sequence[int] | None = None,
    *,
    strategy: str | None = None,
    shape: TreeShape = TREES[63],
    cycles: int = CYCLES,
    seed: int = 0,
    stated: float | None = None,
    keep: Callable[[ContextsRecord], object] = lambda record: None,
) -> ContextsRecord:
    """Time `cycles` cycles of EAGLE-3 and of plain decoding, in turn, after prefixes of so many tokens.

    All lengths share one cache, that of the longest. Each is decoded once before it is timed, and the tokens of both are
    held against each other. Args: prefixes: those of PREFIXES that the target's context holds, if left out; strategy:
    `best_at_length`, if left out; stated: tokens a cycle, where weights are random; keep: given the record after each length.
    Raises ValueError for bad lengths, before any decode, and ArmsDisagree where tokens differ and no near tie explains it.
    """
    room = beyond(shape, cycles)
    given = [n for n in PREFIXES if n + room <= pair.context] if prefixes is None else list(prefixes)
    check_prefixes(pair, given, room)
    if cycles < 1:
        raise ValueError(f"cycles is {cycles}; at least one must be timed.")
    plan = check(strategy or best_at_length(pair), pair.device)
    check_shape(pair, shape)
    check_early(pair, plan, shape.total_tokens + 1)
    settings = ContextsSettings(
        **pair.names, strategy=str(plan), **asdict(shape), cycles=cycles, seed=seed, stated_acceptance=stated
    )
    record = ContextsRecord(**made(str(pair.device)), settings=settings)
    with asked(pair, plan):
        least = floors(pair, **asdict(shape), prefixes=given)
    prompts, coin = get_prompts(pair, 1000), random.Random(seed)
    for at, prefix in enumerate(given):
        decoding = Decoding(plan, shape, Sampling(), max(given) + room - prefix)
        one_length(pair, prompts, prefix, decoding, 1, coin)
        eagle, plain, tie = one_length(pair, prompts, prefix, decoding, cycles, coin)
        there = least if isinstance(least, Experts) else least[at]
        record.contexts.append(Context(prefix=prefix, eagle=eagle, plain=plain, floor=there, tie=tie))
        keep(record)
    return record


def lengths(text: str) -> list[int]:
    """The numbers of tokens in a text such as "1024,4096"; ValueError where one is no whole number."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"prefixes are {text!r}; give whole numbers with commas, such as 1024,4096."
        ) from None


def check_prefixes(pair: Pair, prefixes: Sequence[int], room: int) -> None:
    """ValueError for lengths that are none, or that the target's context doesn't hold with `room` tokens after them."""
    if not prefixes:
        raise ValueError(
            f"{pair.target_name} has a context of {pair.context:,} tokens, too few for the usual prefixes; name shorter ones."
        )
    for prefix in prefixes:
        if not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 1:
            raise ValueError(f"prefix {prefix!r} must be a whole number of tokens, at least 1.")
        if prefix + room > pair.context:
            raise ValueError(
                f"a prefix of {prefix:,} tokens and the {room:,} after it exceed the target's context of {pair.context:,}; "
                "leave it out."
            )


def text_of(prompts: Sequence[Prompt], length: int, first: int = 0) -> tuple[int, ...]:
    """So many ids: the prompts' one after the other, from a first prompt on, again and again."""
    places = islice(cycle(range(len(prompts))), first % len(prompts), None)
    return tuple(islice((i for place in places for i in prompts[place].ids), length))


def one_length(
    pair: Pair, prompts: Sequence[Prompt], prefix: int, decoding: Decoding, count: int, coin: random.Random
) -> tuple[Turns, Turns, Difference | None]:
    """`count` cycles of EAGLE-3 and of plain decoding after one prefix, and where their tokens part at a near tie.

    An answer that ends before is followed by that of another text. Raises ArmsDisagree where tokens differ otherwise, and
    ValueError where all answers end at once.
    """
    both = [Turns(first_s=[], cycles_s=[], tokens=[]) for _ in range(2)]
    ties: list[Difference | None] = []
    for number in range(TEXTS):
        ids = text_of(prompts, prefix, number)
        ways = decode_stream(pair, ids, decoding, record=False), plain_stream(pair, ids, decoding)
        tokens = in_turns(pair, ways, both, count, coin)
        shared = min(map(len, tokens))
        tie = agree(pair, ids, tokens[1][:shared], tokens[0][:shared], decoding)
        who = f"after {prefix:,} tokens {str(decoding.strategy)!r}"
        ties.append(settle(tie, f"{who} decodes other tokens than plain decoding"))
        if len(both[0].cycles_s) >= count:
            break
    if not both[0].cycles_s:
        raise ValueError(
            f"every answer after {prefix:,} tokens ended with its first cycle, so there is nothing to time; name another length."
        )
    return both[0], both[1], widest(ties)


def in_turns(
    pair: Pair, decodes: Sequence[Iterator[Cycle]], found: Sequence[Turns], count: int, coin: random.Random
) -> list[list[int]]:
    """Run decodes of one text in turn, a cycle each, until `count` are found or one has ended, and add what each took to
    `found`; → each one's new tokens. A coin draws who goes first."""
    tokens: list[list[int]] = [[] for _ in decodes]
    last = [0] * len(decodes)

    def step(arm: int) -> tuple[float, int] | None:
        start = now(pair.device)
        done = next(decodes[arm], None)
        seconds = round((now(pair.device) - start) / 1e9, 7)
        if done is None:
            return None
        tokens[arm] += done.committed
        last[arm] = done.bonus
        return seconds, len(done.committed)

    every = range(len(decodes))
    for arm in coin.sample(every, len(decodes)):
        if first := step(arm):
            found[arm].first_s.append(first[0])
    while len(found[0].cycles_s) < count:
        taken = {arm: step(arm) for arm in coin.sample(every, len(decodes))}
        if None in taken.values():
            break
        for arm, done in taken.items():
            assert done is not None
            found[arm].cycles_s.append(done[0])
            found[arm].tokens.append(done[1])
    for one_way in decodes:
        one_way.close()  # type: ignore[attr-defined]
    return [[*ids, bonus] for ids, bonus in zip(tokens, last, strict=True)]
