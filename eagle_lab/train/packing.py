"""What a head is trained on: texts packed into rows, the draft vocabulary, and what the target says of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from eagle_lab.models.draft import listen
from eagle_lab.runtime.layers import compiled_layers
from eagle_lab.runtime.prepare import never_quietly_eager
from eagle_lab.train.text import Text
from eagle_lab.train.ttt import Batch, visible_within


def choose_vocabulary(texts: Sequence[Text], vocab_size: int, size: int) -> Tensor:
    """The most frequent ids of the target's own answers, sorted, int64 [size]; ties go to the lower id.

    Raises ValueError where size exceeds the target's vocabulary.
    """
    if size > vocab_size:
        raise ValueError(
            f"a draft vocabulary of {size} is larger than the target's of {vocab_size}; lower draft_vocab."
        )
    ids = np.fromiter(chain.from_iterable(t.answer for t in texts), np.int64)
    counts = torch.bincount(torch.from_numpy(ids), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def pack(texts: Sequence[Text], length: int, seed: int, multiple: int = 1) -> dict[str, Tensor]:
    """Texts packed into rows of `length`, whole ones side by side, longer ones cut; shuffled by the seed.

    The number of rows is brought up to a multiple by rows of padding. Returns: int64 [R, length] `ids`, `document`
    (-1 padding), `positions`, and bool `answer`, as in `Batch`.
    """
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        need = min(length, len(texts[number].prompt) + len(texts[number].answer))
        # only the last rows are looked at: first fit over all would take quadratic time
        near = range(max(0, len(rows) - 64), len(rows))
        home = next((r for r in near if room[r] >= need), None)
        if home is None:
            rows.append([])
            room.append(length)
            home = len(rows) - 1
        rows[home].append(number)
        room[home] -= need
    shape = (-(-len(rows) // multiple) * multiple, length)
    # numpy: a tensor's slice is tens of times slower to fill, and there are millions of texts
    ids, document = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions, answer = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for r, members in enumerate(rows):
        at = 0
        for number in members:
            whole = (texts[number].prompt + texts[number].answer)[:length]
            end = at + len(whole)
            ids[r, at:end] = whole
            document[r, at:end] = number
            positions[r, at:end] = np.arange(len(whole))
            answer[r, at + len(texts[number].prompt) : end] = True
            at = end
    arrays = {"ids": ids, "document": document, "positions": positions, "answer": answer}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Reader:
    """Runs the target over packed rows and keeps what the head learns from; stores it in half precision if asked.

    On CUDA the target's layers are compiled, the first and one for all others: apart, their small operations take most
    of the time.
    """

    def __init__(self, target: nn.Module, taps: Sequence[int], rows: dict[str, Tensor], store: bool) -> None:
        self.target, self.taps = target, tuple(taps)
        self.device = target.get_input_embeddings().weight.device
        self.rows = {name: tensor.to(self.device) for name, tensor in rows.items()}
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] | None = {} if store else None

    @torch.no_grad()
    def read(self, numbers: Sequence[int]) -> Batch:
        """The batch of so many rows by their numbers."""
        at = torch.tensor(list(numbers), device=self.device)
        part = {name: tensor[at] for name, tensor in self.rows.items()}
        if self.kept is None:
            return Batch(**part, **self._run(part))
        missing = [i for i, number in enumerate(numbers) if number not in self.kept]
        if missing:
            found = self._run({name: tensor[missing] for name, tensor in part.items()})
            for at_missing, i in enumerate(missing):
                kept = [found[name][at_missing] for name in ("taps", "final", "top1")]
                self.kept[numbers[i]] = tuple(x.half() if x.is_floating_point() else x for x in kept)  # type: ignore
        known = [torch.stack([self.kept[n][k] for n in numbers]) for k in range(3)]
        return Batch(**part, taps=known[0].float(), final=known[1].float(), top1=known[2])

    def _run(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        heard: dict[int, Tensor] = {}
        decoder = self.target.get_decoder()

        hooks = listen(decoder.layers, self.taps, heard)
        visible = visible_within(part["document"])[:, None]
        kind = self.target.get_input_embeddings().weight.dtype
        bias = torch.zeros(visible.shape, dtype=kind, device=visible.device)
        bias.masked_fill_(~visible, torch.finfo(kind).min)
        try:
            # two compilations for each shape of the rows: more than torch's own limit allows
            with (
                never_quietly_eager(),
                compiled_layers(decoder) if self.device.type == "cuda" else nullcontext(),
            ):
                final = decoder(
                    input_ids=part["ids"],
                    position_ids=part["positions"],
                    attention_mask=bias,
                    use_cache=False,
                ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        output = self.target.get_output_embeddings()
        # in pieces, as the logits of all places at once are gigabytes
        best = torch.cat([output(some).argmax(-1) for some in final.flatten(0, 1).split(2048)])
        # the target is asked for the token after each token of an answer
        top1 = torch.where(part["answer"], best.view_as(part["ids"]), -1)
        return {"taps": torch.cat([heard[i] for i in self.taps], -1), "final": final, "top1": top1}
