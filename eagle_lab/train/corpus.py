"""The texts of a training on disk, in parts: what is written stays, and the same call goes on where it stopped.

A folder holds `texts.json` (the settings) and `STREAM-PROCESS-NUMBER.safetensors`, each with texts in the order of
their requests' numbers. The texts are the first that hold enough answer tokens, so a stopped and resumed run keeps the
same ones as one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from eagle_lab.models.prompts import SPLITS, encode, load_prompts
from eagle_lab.models.targets import end_ids
from eagle_lab.runtime.progress import progress
from eagle_lab.train.processes import ALONE, Processes, claim
from eagle_lab.train.text import Request, Text, Texts, TextSettings, open_questions
from eagle_lab.train.writer import write

PART = 500_000  # answer tokens a part
SHORTEST = 8  # answers of fewer tokens teach nothing and are left out
IN_VAIN = 500  # texts in a row that are left out, after which no more are asked for


@dataclass(frozen=True)
class Stream:
    """Numbered requests of one kind and how their texts are sampled; the number is the place in `requests`."""

    name: str
    requests: Iterable[Request]
    settings: TextSettings


def random_requests(vocab_size: int, seed: int) -> Iterator[Request]:
    """Endless requests of 8 random token ids, for a target without a tokenizer."""
    generator = np.random.default_rng(seed)
    while True:
        yield Request(tuple(generator.integers(3, vocab_size, 8).tolist()))


def first_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """The first three prompts that a target without a tokenizer is trained on."""
    return [list(request.opening) for request in islice(random_requests(vocab_size, seed), 3)]


def streams(target: nn.Module, tokenizer: Any, settings: TextSettings) -> list[Stream]:
    """Answers to the training prompts first, then questions and answers of the target's own.

    A target without a tokenizer continues random ids.
    """
    if tokenizer is None:
        size = target.config.get_text_config().vocab_size
        return [Stream("random", random_requests(size, settings.seed), settings)]
    prompts = [Request(tuple(encode(tokenizer, prompt.text))) for prompt in load_prompts("train")]
    own = sorted(prompts, key=lambda request: -len(request.opening))
    # the training prompts are longer than the chat's opening, and are answered greedily, as they will be decoded
    greedy = replace(settings, batch=min(settings.batch, len(own)), greedy_share=1.0)
    asked = open_questions(tokenizer)
    return [Stream("prompts", own, greedy), Stream("open", (asked for _ in count()), settings)]


def write_texts(
    target: nn.Module,
    tokenizer: Any,
    answer_tokens: int,
    settings: TextSettings,
    folder: str | Path,
    until: float = float("inf"),
    processes: Processes = ALONE,
) -> int:
    """Let the target write until the folder's texts hold so many answer tokens; → how many they hold.

    Args: until: the time of `time.monotonic` at which to stop, what is whole kept; processes: each writes its share.
    A prompt is taken once a process; prompts of data/prompts.jsonl outside its training half never are. Shows a progress
    bar. Raises ValueError where the folder holds texts of other settings, where `IN_VAIN` texts in a row are left out, and
    as `write` does.
    """
    folder = Path(folder)
    claim(folder, "texts", asdict(settings) | {"processes": processes.count}, processes)
    apart = [p for split in SPLITS if split != "train" for p in load_prompts(split)] if tokenizer else []
    seen = {hash(tuple(encode(tokenizer, prompt.text))) for prompt in apart}
    share, eos, total = -(-answer_tokens // processes.count), sorted(end_ids(target)), 0
    with progress(share, "token", "text from the target", shown=processes.rank == 0) as bar:
        for stream in streams(target, tokenizer, settings):
            name = f"{stream.name}-{processes.rank:02d}"
            done = 0  # requests that are answered, whether or not their texts were kept
            for path in _parts(folder, name):
                texts, asked = _load(path)
                seen |= {hash(text.prompt) for text in texts}
                done, total = done + asked, total + texts.answer_tokens
            bar.update(total - bar.n)
            if total >= share or time.monotonic() > until:
                continue
            mine = islice(enumerate(stream.requests), processes.rank, None, processes.count)
            numbers = count(done * processes.count + processes.rank, processes.count)
            part, in_vain = _Part(folder, name), 0
            with closing(write(target, islice(mine, done, None), stream.settings, eos)) as ended:
                for _, text in _in_order(ended, numbers):
                    if text is None or len(text.answer) < SHORTEST or hash(text.prompt) in seen:
                        part.add(None)
                        in_vain += 1
                    else:
                        in_vain = 0
                        seen.add(hash(text.prompt))
                        part.add(text)
                        total += len(text.answer)
                        bar.update(len(text.answer))
                    if total >= share or time.monotonic() > until or in_vain == IN_VAIN:
                        break
            part.save()
            if in_vain == IN_VAIN:
                raise ValueError(
                    f"{IN_VAIN} texts in a row can't be learnt from: their questions don't end, repeat one that was asked, or "
                    f"are answered by fewer than {SHORTEST} tokens; does the target follow its chat template?"
                )
    processes.wait()
    return sum(_load(path)[0].answer_tokens for path in _parts(folder))


def read_texts(folder: str | Path, answer_tokens: int) -> Texts:
    """The first texts of a folder that hold so many answer tokens, answers to the kit's prompts before all others."""
    paths = sorted(_parts(Path(folder)), key=lambda path: (not path.name.startswith("prompts"), path.name))
    return Texts.join([_load(path)[0] for path in paths]).first(answer_tokens)


def _in_order(
    ended: Iterator[tuple[int, Text | None]], numbers: Iterable[int]
) -> Iterator[tuple[int, Text | None]]:
    """What ended, in the order of the numbers: a text waits for those before it."""
    waiting: dict[int, Text | None] = {}
    for number in numbers:
        while number not in waiting:
            found = next(ended, None)
            if found is None:
                return
            waiting[found[0]] = found[1]
        yield number, waiting.pop(number)


def _parts(folder: Path, prefix: str = "") -> list[Path]:
    return sorted(folder.glob(f"{prefix}*.safetensors"))


class _Part:
    """The texts since the last part was written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.number = folder, name, len(_parts(folder, name))
        self.texts: list[Text] = []
        self.asked = self.held = 0

    def add(self, text: Text | None) -> None:
        """A request's text, or None for one that left nothing; a full part is written."""
        self.asked += 1
        if text is not None:
            self.texts.append(text)
            self.held += len(text.answer)
        if self.held >= PART:
            self.save()

    def save(self) -> None:
        """Write what there is, in one step."""
        if not self.asked:
            return
        t, name = Texts.of(self.texts), f"{self.name}-{self.number:05d}"
        partial = self.folder / f"{name}.partial"
        save_file(dict(vars(t)), partial, {"asked": str(self.asked)})
        # safetensors writes files that only their owner can read
        partial.chmod(self.folder.stat().st_mode & 0o666)
        os.replace(partial, self.folder / f"{name}.safetensors")
        self.texts, self.asked, self.held, self.number = [], 0, 0, self.number + 1


def _load(path: Path) -> tuple[Texts, int]:
    """A part's texts, and how many requests they are the answers to."""
    with safe_open(path, "np") as file:
        asked = int(file.metadata()["asked"])
        return Texts(**{name: file.get_tensor(name) for name in file.keys()}), asked  # noqa: SIM118
