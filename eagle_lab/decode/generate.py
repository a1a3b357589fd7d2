"""EAGLE-3 decoding and plain decoding: the host's side, with one small copy from the device a cycle.

`stream`, `generate` and `generate_plain` take keywords and make one `Decoding` of them; `decode_stream`, `decode` and
`decode_plain` take it ready, and are what the kit itself calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eagle_lab.decode.cycle import CycleTensors
from eagle_lab.decode.forward import HEAD, TARGET
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import session, sizes
from eagle_lab.decode.strategy import Decoding, Strategy, check
from eagle_lab.decode.tree import TreeShape
from eagle_lab.models import parallel
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import token_ids
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.clock import Span, no_span
from eagle_lab.runtime.prepare import fixed


@dataclass(frozen=True)
class Cycle:
    """One cycle on the host. `prefix` tokens stood before the root; parents[0] is -1; scores are those of nodes 1…n;
    `committed` are the ids that the cycle appended, the root's first; `bonus` is the next root."""

    prefix: int
    committed: tuple[int, ...]
    bonus: int
    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()


def tau(cycles: Sequence[Cycle]) -> float:
    """τ, the mean acceptance length: tokens committed a cycle, the bonus token counted (as the next cycle's root).

    Raises ValueError for no cycles.
    """
    if not cycles:
        raise ValueError("τ needs at least one cycle; the prompts gave none.")
    return sum(len(cycle.committed) for cycle in cycles) / len(cycles)


@dataclass
class Generation:
    """Exactly the new ids, and the cycles that made them (none for plain decoding)."""

    tokens: list[int] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """`tau` of the cycles; 1 for plain decoding, which has none."""
        return tau(self.cycles) if self.cycles else 1.0


def check_prompt(pair: Pair, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int) -> Tensor:
    """The prompt as int64 [1, L] on the pair's device.

    Raises ValueError where it is empty or several, holds what is no id, or exceeds the context with the new tokens.
    """
    ids = token_ids(prompt_ids)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token id.")
    vocabulary = pair.config.vocab_size
    wrong = [i for i in ids if not 0 <= i < vocabulary]
    if wrong:
        raise ValueError(
            f"the prompt holds {wrong[0]!r}, which is not a token id from 0 to {vocabulary - 1}."
        )
    if len(ids) + max_new_tokens > pair.context:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the target's context of "
            f"{pair.context}; shorten one of them."
        )
    return torch.tensor([ids], dtype=torch.int64, device=pair.device)


def check_finite(pair: Pair, report: list[int]) -> list[int]:
    """A row's report as it came to the host.

    Raises ValueError where it says that logits or scores weren't finite.
    """
    fault = -report[0]
    if fault <= 0:
        return report
    names = {TARGET: "the target's logits", HEAD: "the head's scores"}
    who = " and ".join(name for bit, name in names.items() if fault & bit)
    raise ValueError(
        f"{who} aren't finite in {dtype_name(pair.dtype)}, as weights or activations leave its range; load "
        "the pair with another dtype, such as float32."
    )


def draw_uniforms(pair: Pair, count: int, sampling: Sampling, seed: int | None) -> Tensor:
    """One uniform number for each position, float64 [1, count]; made on the CPU, so that all devices draw the same.

    Raises ValueError for a seed that is no whole number.
    """
    if sampling.temperature == 0:
        return torch.zeros(1, count, dtype=torch.float64, device=pair.device)
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"seed is {seed!r}; it must be a whole number.")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    drawn = torch.rand(1, count, dtype=torch.float64, generator=generator).to(pair.device)
    if seed is None and parallel.joined():
        torch.distributed.broadcast(drawn, 0)  # the processes of a tensor-parallel target must draw alike
    return drawn


def cut(tokens: list[int], limit: int, eos: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens up to the limit and the first end-of-sequence id, and whether decoding is over."""
    tokens = tokens[:limit]
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1], True
    return tokens, len(tokens) == limit


def stream(
    pair: Pair,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = "rebuild",
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k_sampling: int = 0,
    seed: int | None = None,
    record: bool = True,
    span: Span = no_span,
) -> Iterator[Cycle]:
    """EAGLE-3 decoding, one `Cycle` at a time; stop iterating to stop decoding.

    `prompt_ids`: token ids, a sequence or int64 [L] or [1, L]. `record=False` leaves the trees out of the cycles, so
    that nothing but the accepted tokens is copied to the host. Under a runtime with fixed shapes a cycle is one span,
    "replay": nothing inside it can be timed from the host.
    Raises ValueError for bad sizes, strategies and prompts before any forward.
    """
    decoding = Decoding.of(
        max_new_tokens, strategy, top_k=top_k, depth=depth, total_tokens=total_tokens,
        temperature=temperature, top_p=top_p, top_k_sampling=top_k_sampling, seed=seed,
    )  # fmt: skip
    return decode_stream(pair, prompt_ids, decoding, record=record, span=span)


@torch.inference_mode()
def decode_stream(
    pair: Pair,
    prompt_ids: Sequence[int] | Tensor,
    decoding: Decoding,
    *,
    record: bool = True,
    span: Span = no_span,
) -> Iterator[Cycle]:
    """`stream` of a prompt's ids [n], its settings in one piece."""
    strategy, shape, limit = check(decoding.strategy, pair.device), decoding.shape, decoding.max_new_tokens
    check_shape(pair, shape)
    prompt = check_prompt(pair, prompt_ids, limit)
    slots = prompt.shape[1] + limit + shape.reach + shape.width
    uniforms = draw_uniforms(pair, slots + 1, decoding.sampling, decoding.seed)
    known: list[int] = []
    with session(pair, strategy, shape, decoding.sampling, 1, slots, prompt.shape[1]) as ready:
        with span("prefill"):
            ready.prefill(0, prompt, uniforms)
        while True:
            out = ready.step(span)
            assert isinstance(out, CycleTensors)
            with span("to_host"):
                count, bonus, *committed = check_finite(pair, out.report[0].tolist())
            done = Cycle(ready.state.visible_length, tuple(committed[:count]), bonus)
            ready.state.visible_length += count
            yield with_tree(done, out) if record else done
            known += done.committed
            if cut([*known, bonus], limit, pair.eos)[1]:
                return


def check_shape(pair: Pair, shape: TreeShape) -> None:
    """ValueError where the head's vocabulary is too small for the tree."""
    vocabulary = pair.head.config.draft_vocab_size
    if shape.top_k > vocabulary:
        raise ValueError(f"top_k is {shape.top_k}, but the draft vocabulary has only {vocabulary} tokens.")


def with_tree(cycle: Cycle, out: CycleTensors) -> Cycle:
    """The cycle with its tree copied to the host."""
    tokens, parents, depths, scores = (
        tuple(x[0].tolist()) for x in (out.tokens, out.parents, out.depths, out.scores)
    )
    return replace(cycle, tokens=tokens, parents=(-1, *parents), depths=depths, scores=scores)


def generate(
    pair: Pair, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int, **options: object
) -> Generation:
    """EAGLE-3 decoding to the end; options as for `stream`.

    `prompt_ids`: token ids, a sequence or int64 [L] or [1, L].
    Returns the new ids, at most `max_new_tokens` and cut after the first end-of-sequence id, and every cycle.
    Raises ValueError as `stream` does.
    """
    return _whole(pair, stream(pair, prompt_ids, max_new_tokens, **options), max_new_tokens)  # type: ignore[arg-type]


def decode(
    pair: Pair,
    prompt_ids: Sequence[int] | Tensor,
    decoding: Decoding,
    *,
    record: bool = True,
    span: Span = no_span,
) -> Generation:
    """`generate` for a prompt's ids [n], its settings in one piece."""
    cycles = decode_stream(pair, prompt_ids, decoding, record=record, span=span)
    return _whole(pair, cycles, decoding.max_new_tokens)


def _whole(pair: Pair, stream: Iterator[Cycle], limit: int) -> Generation:
    cycles = list(stream)
    known = [token for c in cycles for token in c.committed] + [cycles[-1].bonus]
    return Generation(cut(known, limit, pair.eos)[0], cycles)


def generate_plain(
    pair: Pair,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = "rebuild",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k_sampling: int = 0,
    seed: int | None = None,
) -> Generation:
    """The target's own decoding, one token a forward, on the same caches and runtimes and with the same sampling.

    `prompt_ids`: token ids, a sequence or int64 [L] or [1, L].
    Returns a `Generation` without cycles. Raises ValueError for bad settings and prompts before any forward.
    """
    decoding = Decoding.of(
        max_new_tokens, strategy, temperature=temperature, top_p=top_p, top_k_sampling=top_k_sampling, seed=seed
    )  # fmt: skip
    return decode_plain(pair, prompt_ids, decoding)


@torch.inference_mode()
def plain_stream(
    pair: Pair, prompt_ids: Sequence[int] | Tensor, decoding: Decoding, span: Span = no_span
) -> Iterator[Cycle]:
    """`decode_plain`, a forward at a time: each commits one token and has the next one as its bonus. prompt_ids: int64 [L].

    Where the prefill's token is the last one, the only cycle commits nothing.
    """
    strategy, limit = check(decoding.strategy, pair.device, tree=False), decoding.max_new_tokens
    prompt = check_prompt(pair, prompt_ids, limit)
    slots = prompt.shape[1] + limit + 1
    uniforms = draw_uniforms(pair, slots + 1, decoding.sampling, decoding.seed)
    with session(pair, strategy, None, decoding.sampling, 1, slots, prompt.shape[1]) as ready:
        with span("prefill"):
            tokens = check_finite(pair, ready.prefill(0, prompt, uniforms).tolist())[1:]
        if cut(tokens, limit, pair.eos)[1]:
            yield Cycle(prompt.shape[1], (), tokens[0])
        while not cut(tokens, limit, pair.eos)[1]:
            report = ready.step(span)
            assert isinstance(report, Tensor)
            tokens.append(check_finite(pair, report[0].tolist())[1])
            ready.state.visible_length += 1
            yield Cycle(ready.state.visible_length - 1, (tokens[-2],), tokens[-1])


def decode_plain(pair: Pair, prompt_ids: Sequence[int] | Tensor, decoding: Decoding) -> Generation:
    """`generate_plain` for a prompt's ids [n], its settings in one piece; their tree is left aside."""
    stream = plain_stream(pair, prompt_ids, decoding)
    return Generation(_whole(pair, stream, decoding.max_new_tokens).tokens)


def to_warm_up(lengths: Sequence[int], decodings: Sequence[Decoding]) -> list[int]:
    """Which of the prompts of such lengths must be decoded before anything is timed.

    A runtime with fixed shapes compiles or captures at the first decode of each size of session, with a tree or plain,
    from the prompt's window on: the first prompt of each size, and any later one whose window is smaller. Where nothing
    does: the first of all.
    Returns indices into `lengths`, ascending.
    """
    if not any(fixed(one.strategy.runtime) for one in decodings):
        return [0]
    found, ready = [], dict[tuple[int, ...], tuple[int, ...]]()
    for at, length in enumerate(lengths):
        needs = [sizes(one, length, plain) for one in decodings for plain in (True, False)]
        capacities, first = tuple(n[0] for n in needs), tuple(n[1] for n in needs)
        before = ready.get(capacities)
        if before is None or any(mine < theirs for mine, theirs in zip(first, before, strict=True)):
            found.append(at)
            ready[capacities] = first if before is None else tuple(map(min, first, before))
    return found
