"""One command from a target to its draft head: text, training, acceptance on the held-out prompts, record and card.

`python -m eagle_lab.train.make_draft --help` lists the settings. Every stage leaves its result in the work folder, so that
the same command started again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_lab import ROOT
from eagle_lab.measure import old_records as records
from eagle_lab.measure.acceptance import SIZES, acceptance
from eagle_lab.measure.old_records import Record
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.pair import DEFAULT_TARGET, load
from eagle_lab.models.prompts import encode, load_prompts
from eagle_lab.models.targets import check_device, check_dtype, find_target, load_target, load_tokenizer
from eagle_lab.train.card import card, thin
from eagle_lab.train.schedule import TrainSettings
from eagle_lab.train.text import (
    Request,
    Text,
    TextSettings,
    ask,
    collect,
    load_texts,
    open_questions,
    save_texts,
)
from eagle_lab.train.train import TrainResult, train
from eagle_lab.train.writer import write


def own_requests(tokenizer: Any) -> list[Request]:
    """The training half of data/prompts.jsonl as requests; the held-out half is never among them."""
    return [ask(tokenizer, prompt.text) for prompt in load_prompts("train")]


def random_requests(vocab_size: int, seed: int, length: int = 8) -> Iterator[Request]:
    """Endless requests of random token ids, for a target without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Request(tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist()))


def first_prompts(vocab_size: int, seed: int, count: int = 3) -> list[list[int]]:
    """The first prompts that a target without a tokenizer is trained on."""
    return [list(request.opening) for request in islice(random_requests(vocab_size, seed), count)]


def end_ids(target: nn.Module) -> list[int]:
    """The target's end-of-sequence ids."""
    ids = (
        getattr(target.generation_config, "eos_token_id", None)
        or target.config.get_text_config().eos_token_id
    )
    return [ids] if isinstance(ids, int) else list(ids or [])


def write_texts(target: nn.Module, tokenizer: Any, answer_tokens: int, settings: TextSettings) -> list[Text]:
    """Text from the target: answers to the training prompts first, then questions and answers of its own.

    A target without a tokenizer continues random ids. Held-out prompts never enter.
    """
    eos = end_ids(target)
    if tokenizer is None:
        requests: Iterable[Request] = random_requests(
            target.config.get_text_config().vocab_size, settings.seed
        )
        return collect(write(target, requests, settings, eos), answer_tokens)
    heldout = [encode(tokenizer, prompt.text) for prompt in load_prompts("heldout")]
    own = sorted(own_requests(tokenizer), key=lambda r: -len(r.opening))
    # the training prompts are longer than the chat's opening, and are answered greedily, as they will be decoded
    greedy = dataclasses.replace(settings, batch=min(settings.batch, len(own)), greedy_share=1.0)
    made = chain(
        write(target, own, greedy, eos), write(target, repeat(open_questions(tokenizer)), settings, eos)
    )
    return collect(made, answer_tokens, heldout)


def make_draft(
    target: str | Path | None,
    out: str | Path,
    answer_tokens: int,
    text: TextSettings,
    training: TrainSettings,
    device: str | None = None,
    prompts: str | Sequence[Sequence[int]] = "heldout",
    max_new_tokens: int = 128,
    sizes: Sequence[int] = SIZES,
    growth: Sequence[float] = (),
) -> tuple[Record, TrainResult]:
    """Text, training and acceptance; the head ends in `out`/draft, the record in `out`/record.json.

    Args: target: None is the embedded one; answer_tokens: how many the target writes; prompts, max_new_tokens and
    sizes: how acceptance is measured; growth: shares of the text, such as 0.125, on which a head of its own is trained
    with the same settings, to see whether more text would help.
    Returns the record and the training's result. Raises ValueError as the stages do.
    """
    place = check_device(device)
    kind = check_dtype(None, place)
    out = Path(out)
    if target is not None and not Path(target).is_dir() and (ROOT / target).is_dir():
        target = ROOT / target  # a folder of the kit, wherever the caller stands
    model, tokenizer = load_target(target, place, kind), load_tokenizer(find_target(target))
    began = time.monotonic()
    kept = out / f"texts-{answer_tokens}-{text.seed}.safetensors"
    if not kept.exists():
        save_texts(write_texts(model, tokenizer, answer_tokens, text), kept, text)
    texts = load_texts(kept)
    written = time.monotonic()
    # the same tokens and trees either way, in a fraction of the time
    fast: dict[str, Any] = {"replay": True}
    if place.type == "cuda":
        fast = {"strategy": "doubling,runtime=cuda_graph"}
    grown = []
    for share in growth:
        part = texts[:: max(1, round(1 / share))]
        head = train(model, part, out / f"training-{share:g}", _as_many_passes(training, share)).head
        save_draft(copy.deepcopy(head).half(), out / f"draft-{share:g}")
        pair = load(target, out / f"draft-{share:g}", place, kind, verbose=False)
        found = acceptance(pair, prompts, max_new_tokens, sizes=sizes[:1], **fast)
        grown.append({"answer_tokens": sum(len(t.answer) for t in part), "tau": found["tau"]})
    started = time.monotonic()
    result = train(model, texts, out / "training", training)
    trained = time.monotonic()
    save_draft(copy.deepcopy(result.head).half(), out / "draft")
    del model
    pair = load(target, out / "draft", place, kind, verbose=False)
    settings = {
        "target": str(target or DEFAULT_TARGET) if target is None else Path(target).name,
        "texts": len(texts),
        "answer_tokens": sum(len(t.answer) for t in texts),
        "text": dataclasses.asdict(text),
        "training": dataclasses.asdict(training),
    }
    record = records.new("training", settings, place.type)
    record["seconds"] = {"text": round(written - began, 1), "training": round(trained - started, 1)}
    record["history"] = thin(result.history)
    record["validation"] = result.validation
    record["acceptance"] = acceptance(pair, prompts, max_new_tokens, sizes=sizes, **fast)
    whole = {"answer_tokens": settings["answer_tokens"], "tau": record["acceptance"]["tau"]}
    record["growth"] = [*grown, whole] if grown else []
    records.write(record, out / "record.json")
    return record, result


def _as_many_passes(training: TrainSettings, share: float) -> TrainSettings:
    minutes = None if training.minutes is None else training.minutes * share
    return dataclasses.replace(training, steps=max(1, round(training.steps * share)), minutes=minutes)


def ship(out: str | Path, folder: str | Path, results: str | Path, smaller: str | Path | None = None) -> None:
    """Copy a finished head, in half precision, and its card to `folder`, and its record to `results`.

    `smaller`: the record of a run on less text, for the card to tell how τ grew.
    """
    out, folder = Path(out), Path(folder)
    record = records.read(out / "record.json")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((out / "draft").iterdir()):
        shutil.copyfile(file, folder / file.name)
    less = records.read(smaller) if smaller else None
    (folder / "README.md").write_text(card(record, folder.name, less), encoding="utf-8")
    records.write(record, results)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle_lab.train.make_draft", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", help="hub name or folder; the embedded SmolLM2-135M-Instruct if left out")
    parser.add_argument("--out", default="results/draft", help="work folder; the same command resumes there")
    parser.add_argument("--device", help="cuda or cpu; the best one if left out")
    parser.add_argument(
        "--answer-tokens", type=int, default=20_000_000, help="answer tokens the target writes"
    )
    parser.add_argument(
        "--ship", help="folder for the finished head and its card, such as data/draft-smollm2-135m"
    )
    parser.add_argument(
        "--record", help="where the record goes with --ship, such as data/results/train-h200.json"
    )
    parser.add_argument(
        "--smaller",
        help="with --ship: the record of a run on less text, for the card, such as data/results/train-growth-h100.json",
    )
    parser.add_argument(
        "--growth",
        type=float,
        nargs="*",
        default=[],
        help="also train on these shares of the text, such as 0.125 0.5",
    )
    for prefix, kind in (("text", TextSettings), ("train", TrainSettings)):
        for field in dataclasses.fields(kind):
            name = f"--{prefix}-{field.name.replace('_', '-')}"
            if isinstance(field.default, bool):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
            else:
                parser.add_argument(
                    name, type=float if field.default is None else type(field.default), default=field.default
                )
    return parser


def _fields(kind: type, prefix: str, given: dict[str, Any]) -> dict[str, Any]:
    return {field.name: given[f"{prefix}_{field.name}"] for field in dataclasses.fields(kind)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _options()
    given = vars(parser.parse_args(arguments))
    if bool(given["ship"]) != bool(given["record"]):
        parser.error("--ship and --record belong together; give both or neither.")
    try:
        text = TextSettings(**_fields(TextSettings, "text", given))
        training = TrainSettings(**_fields(TrainSettings, "train", given))
        record, _ = make_draft(
            given["target"],
            given["out"],
            given["answer_tokens"],
            text,
            training,
            given["device"],
            growth=given["growth"],
        )
        if given["ship"]:
            ship(given["out"], given["ship"], given["record"], given["smaller"])
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"τ = {record['acceptance']['tau']:.2f} on {record['acceptance']['settings']['prompts']} prompts")


if __name__ == "__main__":
    main()
