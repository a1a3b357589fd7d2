"""The target writes many texts at once: one static cache, one loop of fixed shapes.

Each step feeds every row one token, known or just sampled, so that a row that is done takes the next request while
the others go on, and a CUDA graph can hold the whole step. Random numbers depend on the seed, the request's number and
the place in its text alone: a text is the same whichever row writes it, and whenever.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import chain, islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from eagle_lab.decode.attention import Visibility, attention_bias
from eagle_lab.decode.strategy import unavailable
from eagle_lab.decode.tree import largest
from eagle_lab.models.architecture import observe
from eagle_lab.models.cache import KeyValueCache
from eagle_lab.models.targets import cache_keyword, context_of, kv_sizes, pin_rotations, window_of
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.graphs import record
from eagle_lab.runtime.layers import compiled_parts
from eagle_lab.train.text import Request, Text, TextSettings


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    # one query token: the heads that share a key become its query rows, so keys and values are never repeated
    rows, heads, count, size = query.shape
    assert count == 1, "grouped attention is for one token a row"
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    mixed = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return mixed.reshape(rows, 1, heads, size), None


AttentionInterface.register("eagle_lab_grouped", _grouped_attention)


def _attention(target: nn.Module, window: int | None) -> str:
    """The fastest attention that keeps all that the target's class asks for; `window`: a sliding one that binds."""
    asks = observe(target)
    # the kernel reads each row's keys as far as it has written and takes no mask; the other reads all slots of the longest
    fused = window is None and not unavailable(
        "attention", "tree_fused", target.get_input_embeddings().weight.device
    )
    name = "tree_fused" if fused else "eagle_lab_grouped"
    return name if asks.interface and not asks.lost_by(name) else "eager"


def _mixed(x: Tensor) -> Tensor:
    # splitmix64's last steps (Steele et al., 2014) in wrapping int64; a shift must not drag the sign along
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms(seed: int, numbers: Tensor, places: Tensor) -> Tensor:
    """Random numbers in [0, 1), float32, of requests' numbers and places in their texts, int64 of one shape."""
    golden = -0x61C8864680B583EB
    mixed = _mixed(_mixed(numbers * golden + seed) + places * golden)
    return (mixed & ((1 << 24) - 1)).float() / (1 << 24)


class _Writer:
    """The rows in flight; every tensor keeps its shape and place, so that a CUDA graph can replay `step`."""

    def __init__(
        self,
        target: nn.Module,
        settings: TextSettings,
        capacity: int,
        eos: Sequence[int],
        middle: tuple[int, ...],
    ):
        weight = target.get_input_embeddings().weight
        self.target, self.settings, self.dtype, device = target, settings, weight.dtype, weight.device
        rows, c = settings.batch, target.config.get_text_config()
        places = [next(layer.parameters()).device for layer in target.get_decoder().layers]
        self.keyword = cache_keyword(target)
        heads, size = kv_sizes(c)
        self.cache = KeyValueCache(places, rows, heads, capacity, size, self.dtype)
        window, self.sliding = window_of(c)
        self.window = window if window is not None and window < capacity else None
        self.attention = _attention(target, self.window)
        whole = {"dtype": torch.int64, "device": device}
        self.rows = torch.arange(rows, device=device)
        self.columns = torch.arange(capacity, device=device)
        self.itself = torch.ones(rows, 1, 1, dtype=torch.int8, device=device)
        self.ids = torch.zeros(rows, capacity + len(middle) + 1, **whole)
        self.at = torch.zeros(rows, **whole)  # the place of the token that is fed next
        self.known = torch.ones(rows, **whole)  # tokens known in `ids`
        self.question = torch.zeros(rows, dtype=torch.bool, device=device)
        self.start = torch.zeros(rows, **whole)  # where the question, then the answer, starts
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.lost = torch.zeros(rows, dtype=torch.bool, device=device)  # the question did not end in time
        self.wrong = torch.zeros(rows, dtype=torch.bool, device=device)  # logits that aren't finite were seen
        self.answer_temperature = torch.zeros(rows, device=device)
        self.numbers = torch.zeros(rows, **whole)
        self.fed: list[tuple[int, ...]] = [()] * rows  # the opening whose keys and values lie in the cache
        self.eos = torch.tensor(list(eos), **whole)
        self.middle = torch.tensor(middle, **whole)
        self.graph: torch.cuda.CUDAGraph | None = None

    def place(self, rows: Sequence[int], requests: Sequence[tuple[int, Request]]) -> None:
        """Give rows their next requests, with their numbers, all in a few copies."""
        device, s = self.ids.device, self.settings
        at = torch.tensor(list(rows), device=device)
        openings = [request.opening for _, request in requests]
        padded = pad_sequence([torch.tensor(o) for o in openings], batch_first=True).to(device)
        self.ids[at, : padded.shape[1]] = padded
        # a row that began with the same tokens has their keys and values already; the last is fed for its logits
        known = [min(_common(self.fed[row], o), len(o) - 1) for row, o in zip(rows, openings, strict=True)]
        self.at[at] = torch.tensor(known, device=device)
        for row, opening in zip(rows, openings, strict=True):
            self.fed[row] = opening
        self.known[at] = self.start[at] = torch.tensor([len(o) for o in openings], device=device)
        self.question[at] = torch.tensor([bool(r.middle) for _, r in requests], device=device)
        self.done[at] = self.lost[at] = self.wrong[at] = False
        numbers = torch.tensor([number for number, _ in requests])
        greedy = uniforms(s.seed, numbers, torch.full_like(numbers, -1)) < s.greedy_share
        self.answer_temperature[at] = torch.where(greedy, 0.0, s.answer_temperature).to(device)
        self.numbers[at] = numbers.to(device)

    def choose(self, logits: Tensor) -> Tensor:
        """Sample each row's next token at its own temperature from logits [B, V]; 0 is greedy."""
        temperature = torch.where(self.question, self.settings.question_temperature, self.answer_temperature)
        values, ids = largest(logits, min(self.settings.top_k, logits.shape[-1]))
        self.wrong |= ~values[:, 0].isfinite()
        share = (values.float() / temperature.clamp(min=1e-4)[:, None]).softmax(-1).cumsum(-1)
        drawn = uniforms(self.settings.seed, self.numbers, self.at)
        pick = (share < drawn[:, None] * share[:, -1:]).sum(-1, keepdim=True)
        pick = torch.where(temperature[:, None] > 0, pick, 0)
        return ids.gather(1, pick)[:, 0]

    def masks(self, columns: Tensor) -> Any:
        """What each row's token sees of the columns int64 [W]: a mask [B, 1, 1, W] for all layers, or one for each kind."""
        visible = (columns <= self.at[:, None])[:, None]
        whole = attention_bias(visible, self.dtype)
        if self.window is None:
            return whole
        near = attention_bias(visible & (self.at[:, None] - columns < self.window)[:, None], self.dtype)
        return near if all(self.sliding) else {"full_attention": whole, "sliding_attention": near}

    def step(self) -> None:
        """Feed one token a row and learn the next."""
        s, self.cache.slots = self.settings, self.at[:, None]
        told: dict[str, Any] = {self.keyword: self.cache}
        if self.attention == "tree_fused":
            seen = Visibility(self.itself, self.at, self.cache.window, False, None)
            told |= {"attention_mask": None, "visibility": seen}
        else:
            told["attention_mask"] = self.masks(self.columns[: self.cache.window])
        logits = self.target(
            input_ids=self.ids.gather(1, self.at[:, None]),
            position_ids=self.at[:, None],
            use_cache=True,
            **told,
        ).logits[:, -1]
        after = self.at + 1
        free = (after >= self.known) & ~self.done
        token = torch.where(free, self.choose(logits), self.ids[self.rows, after])
        self.ids[self.rows, after] = token
        self.known += free
        ended = free & (token[:, None] == self.eos).any(-1)
        length = after + 1 - self.start
        turn = ended & self.question
        self.lost |= free & self.question & ~ended & (length >= s.question_tokens)
        self.done |= self.lost | (free & ~self.question & (ended | (length >= s.answer_tokens)))
        # a question that has ended is followed by the template up to the answer, in place of its end id
        for i in range(len(self.middle)):
            here = after + i
            self.ids[self.rows, here] = torch.where(turn, self.middle[i], self.ids[self.rows, here])
        self.known = torch.where(turn, after + len(self.middle), self.known, out=self.known)
        torch.where(turn, self.known, self.start, out=self.start)
        self.question &= ~turn
        self.at += ~self.done

    def run(self, steps: int) -> None:
        """So many steps; they replay the graph where one was captured."""
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.cache.window = int(self.at.max()) + 1
                self.step()

    def capture(self) -> None:
        """Capture the step in a CUDA graph."""
        state = (self.ids, self.at, self.known, self.question, self.start, self.done, self.lost, self.wrong)
        kept = [tensor.clone() for tensor in state]

        def warm() -> None:
            for _ in range(3):
                self.step()

        self.graph, _ = record(self.step, warm, self.ids.device)
        for tensor, old in zip(state, kept, strict=True):
            tensor.copy_(old)

    def take(self, rows: Sequence[int]) -> list[tuple[int, Text | None]]:
        """Number and text of those rows that are finished, in their order; None where the question never ended.

        Raises ValueError where logits weren't finite: the text is no text of the target's then.
        """
        at = torch.tensor(list(rows), device=self.ids.device)
        if bool(self.wrong[at].any()):
            raise ValueError(
                f"the target's logits aren't finite in {dtype_name(self.dtype)}, so it writes no text of its own; load it "
                "in another dtype."
            )
        good = at[self.done[at]]
        columns = (self.numbers, self.lost, self.start, self.known, self.answer_temperature, self.ids)
        found: list[tuple[int, Text | None]] = []
        for number, lost, start, known, heat, ids in zip(*(c[good].tolist() for c in columns), strict=True):
            text = Text(tuple(ids[:start]), tuple(ids[start:known]), heat == 0)
            found.append((number, None if lost else text))
        return found


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many ids two openings have in common from the start."""
    return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(one, other, strict=False)))


@torch.inference_mode()
def write(
    target: nn.Module, requests: Iterable[tuple[int, Request]], settings: TextSettings, eos: Sequence[int]
) -> Generator[tuple[int, Text | None], None, None]:
    """Texts that the target writes, as (number, text), in the order in which they end.

    Every row takes the next request when it is free. A text is None where its question did not end in time. A number's
    text depends on the seed, the settings and its request alone, up to ties in the arithmetic. Raises ValueError for
    requests that differ in `middle`, and for texts that would not fit in the target's context.
    """
    waiting = iter(requests)
    first = list(islice(waiting, 4 * settings.batch))
    if not first:
        return
    waiting = iter(chain(first, waiting))
    middle = max((r.middle for _, r in first), key=len)
    longest = max(len(r.opening) for _, r in first) + settings.answer_tokens
    capacity = longest + (settings.question_tokens + len(middle) if middle else 0)
    context = context_of(target.config.get_text_config())
    if capacity > context:
        raise ValueError(
            f"texts of up to {capacity} tokens exceed the target's context of {context}; lower answer_tokens."
        )
    capacity = min(context, -(-capacity // 64) * 64)  # masks are read in 16 bytes
    pin_rotations(target)
    before = target.config._attn_implementation
    writer = _Writer(target, settings, capacity, eos, middle)
    target.set_attn_implementation(writer.attention)
    on_gpu = writer.ids.is_cuda
    check = 16 if on_gpu else 1
    try:
        # what is compiled is captured with the graph; a replay needs it no more
        if on_gpu:
            with compiled_parts(target.get_decoder()):
                writer.capture()
        while True:
            free = writer.done.nonzero()[:, 0].tolist()
            given = list(islice(waiting, len(free)))
            for _, request in given:
                if (
                    request.middle not in ((), middle)
                    or len(request.opening) + settings.answer_tokens > capacity
                ):
                    raise ValueError(
                        "a request has another template, or is longer than those before it; sort them."
                    )
            if given:
                writer.place(free[: len(given)], given)
            busy = (~writer.done).nonzero()[:, 0].tolist()
            if not busy:
                return
            writer.run(check)
            yield from writer.take(busy)
    finally:
        target.set_attn_implementation(before)
