"""What a head is trained on: texts packed into rows, the draft vocabulary, and what the target says of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eagle_lab.decode.attention import attention_bias
from eagle_lab.models.draft import listen
from eagle_lab.models.targets import window_of
from eagle_lab.runtime.layers import compiled_layers
from eagle_lab.runtime.prepare import never_quietly_eager
from eagle_lab.train.text import Texts, spans
from eagle_lab.train.ttt import Batch, asked, visible_within


def choose_vocabulary(texts: Texts, vocab_size: int, size: int) -> Tensor:
    """The most frequent ids of the target's own answers, sorted, int64 [size]; ties go to the lower id.

    Raises ValueError where size exceeds the target's vocabulary.
    """
    if size > vocab_size:
        raise ValueError(
            f"a draft vocabulary of {size} is larger than the target's of {vocab_size}; lower draft_vocab."
        )
    counts = torch.from_numpy(np.bincount(texts.answer_ids(), minlength=vocab_size))
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def pack(texts: Texts, length: int, seed: int, multiple: int = 1) -> dict[str, Tensor]:
    """Texts packed into rows of `length`, whole ones side by side, longer ones cut; shuffled by the seed.

    The number of rows is brought up to a multiple by rows of padding. Returns: int32 [R, length] `ids`, `document`
    (-1 padding), `positions`, and bool `answer`, as in `Batch`.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    needs = np.minimum(length, texts.lengths)[order]
    starts: list[int] = []
    room: list[int] = []
    for need in needs.tolist():
        # only the last rows are looked at: first fit over all would take quadratic time
        for row in range(max(0, len(room) - 16), len(room)):
            if room[row] >= need:
                break
        else:
            row = len(room)
            room.append(length)
        starts.append(row * length + length - room[row])
        room[row] -= need
    shape = (-(-len(room) // multiple) * multiple, length)
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.zeros(shape, np.int32),
        "document": np.full(shape, -1, np.int32),
        "positions": np.zeros(shape, np.int32),
        "answer": np.zeros(shape, np.bool_),
    }
    there, here = spans(np.asarray(starts, np.int64), needs), spans(texts.starts[order], needs)
    positions = spans(np.zeros(len(needs), np.int64), needs)
    prompts = np.repeat((texts.lengths - texts.answers)[order], needs)
    filled = (texts.ids[here], np.repeat(order, needs), positions, positions >= prompts)
    for array, content in zip(arrays.values(), filled, strict=True):
        array.reshape(-1)[there] = content
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Reader:
    """Runs the target over packed rows, for what the head learns from.

    On CUDA the target's layers are compiled, the first and one for all others: apart, their small operations take most
    of the time.
    """

    def __init__(self, target: nn.Module, taps: Sequence[int], rows: dict[str, Tensor]) -> None:
        self.target, self.taps = target, tuple(taps)
        self.device = target.get_input_embeddings().weight.device
        self.rows = {name: tensor.to(self.device) for name, tensor in rows.items()}
        # places of each row from which a draft can start, int64 [R]
        self.asked = asked(rows["answer"], rows["document"]).sum(1)

    @torch.no_grad()
    def read(self, numbers: Sequence[int]) -> Batch:
        """The batch of so many rows by their numbers."""
        at = torch.tensor(list(numbers), device=self.device)
        part = {name: tensor[at] for name, tensor in self.rows.items()}
        part = {name: x if x.dtype == torch.bool else x.long() for name, x in part.items()}
        return Batch(**part, **self._run(part))

    def _run(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        heard: dict[int, Tensor] = {}
        decoder = self.target.get_decoder()
        hooks = listen(decoder.layers, self.taps, heard)
        visible = visible_within(part["document"])
        kind = self.target.get_input_embeddings().weight.dtype
        bias: Any = attention_bias(visible, kind)
        window, sliding = window_of(self.target.config.get_text_config())
        if window is not None and window < visible.shape[1]:
            place = torch.arange(visible.shape[1], device=visible.device)
            near = attention_bias(visible & (place[:, None] - place < window), kind)
            bias = near if all(sliding) else {"full_attention": bias, "sliding_attention": near}
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
