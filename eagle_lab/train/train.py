"""Training an EAGLE-3 head for any Llama-style target that the kit loads, on text that the target wrote.

The run is a function of its settings and its texts, unless `minutes` end it by the clock: rows are packed and ordered
by the seed, a checkpoint holds weights, optimizers and step, and a killed run that is started again ends with the same
bits as one that was not.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.dialects import default_taps
from eagle_lab.models.draft import DraftHead
from eagle_lab.train.new_head import new_head
from eagle_lab.train.packing import Reader, choose_vocabulary, pack
from eagle_lab.train.schedule import TrainSettings, learning_rate, row_order
from eagle_lab.train.text import Text
from eagle_lab.train.ttt import Losses, chain_length, step_losses, total_loss

READ_EVERY = 10  # steps between two looks at the losses


def _optimizers(head: DraftHead, s: TrainSettings) -> list[torch.optim.Optimizer]:
    trained = [(name, p) for name, p in head.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if s.optimizer == "muon" and p.dim() == 2 and "midlayer" in name]
    rest = [p for _, p in trained if not any(p is m for m in matrices)]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda)
    ]
    if matrices:
        # its update has the size of AdamW's, so that one learning rate serves both
        made.append(torch.optim.Muon(matrices, lr=s.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


@dataclass
class TrainResult:
    """The trained head, the settings, and one entry a step of: step, loss, accuracy by draft step, lr, seconds, tokens."""

    head: DraftHead
    settings: TrainSettings
    history: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def train(
    target: nn.Module,
    texts: Sequence[Text],
    out: str | Path,
    settings: TrainSettings | None = None,
    resume: bool = True,
    on_save: Callable[[int, Path], None] | None = None,
) -> TrainResult:
    """Train a head for the target on texts that it wrote.

    Args: target: a loaded model in eval mode, on the device and in the dtype to use (bfloat16 on CUDA, float32 on the
    CPU); texts: see `eagle_lab.train.text`; out: a folder for `state.pt`, `training.json` and the head in `draft/`;
    on_save: called with the step and the folder after every checkpoint.
    Raises: ValueError where the folder holds another run, where the target has too few layers, or where the texts
    hold no answers. A folder that holds the same run is taken up where it stopped.
    """
    s, out = settings or TrainSettings(), Path(out)
    if not texts or not any(len(t.answer) > 2 for t in texts):
        raise ValueError("there are no texts with answers to train on; let the target write some first.")
    taps = default_taps(target.config.get_text_config().num_hidden_layers)
    signature = json.loads(
        json.dumps({"settings": asdict(s), "texts": len(texts), "tokens": sum(len(t.answer) for t in texts)})
    )
    _claim(out, signature, resume)
    shuffled = random.Random(s.seed).sample(list(texts), len(texts))
    aside = min(len(texts) - 1, 256, round(s.validation * len(texts)))
    seen, unseen = shuffled[aside:], shuffled[:aside]
    vocabulary = choose_vocabulary(seen, target.config.get_text_config().vocab_size, s.draft_vocab)
    reader = Reader(target, taps, pack(seen, s.length, s.seed), s.store)
    # whole batches: a compiled step serves one shape
    judge = Reader(target, taps, pack(unseen, s.length, s.seed, s.batch), s.store) if unseen else None
    head = new_head(target, vocabulary, s.warm_start, s.seed)
    head.lm_head.weight.requires_grad_(s.train_output)
    output = target.get_output_embeddings().weight[vocabulary.to(reader.device)].float()
    optimizers = _optimizers(head, s)
    run = _Run(head, optimizers, s, reader, judge, output)
    if (out / "state.pt").exists():
        run.restore(torch.load(out / "state.pt", map_location=reader.device, weights_only=True))
    run.go(out, on_save)
    return TrainResult(head, s, run.history, run.validation)


def _claim(out: Path, signature: dict[str, Any], resume: bool) -> None:
    note = out / "training.json"
    if note.exists():
        found = json.loads(note.read_text())
        if found != signature:
            other = {**found.get("settings", {}), **{k: v for k, v in found.items() if k != "settings"}}
            mine = {**signature["settings"], **{k: v for k, v in signature.items() if k != "settings"}}
            names = [name for name in mine if mine[name] != other.get(name)]
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(names)}); name another output folder."
            )
        if not resume:
            raise ValueError(f"{out} already holds this run and resume is off; name another output folder.")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no training run; name another output folder.")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(signature, indent=1))


def _read(pending: Sequence[tuple[dict[str, Any], Tensor]]) -> list[dict[str, Any]]:
    # one copy for many steps: a wait for the device at each would keep it idle between them
    found = []
    for (known, _), told in zip(pending, torch.stack([told for _, told in pending]).tolist(), strict=True):
        hits, counted = told[1::2], told[2::2]
        accuracy = [round(h / max(1, n), 4) for h, n in zip(hits, counted, strict=True)]
        found.append({**known, "loss": round(told[0], 4), "accuracy": accuracy, "tokens": int(counted[0])})
    return found


class _Run:
    def __init__(self, head, optimizers, settings, reader, judge, output) -> None:  # type: ignore[no-untyped-def]
        self.head, self.optimizers, self.settings = head, optimizers, settings
        self.reader, self.judge, self.output = reader, judge, output
        self.step, self.elapsed = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=reader.device.type == "cuda")

    def progress(self) -> float:
        s = self.settings
        share = self.step / s.steps
        return share if s.minutes is None else max(share, self.elapsed / (60 * s.minutes))

    def go(self, out: Path, on_save: Callable[[int, Path], None] | None) -> None:
        s = self.settings
        pending: list[tuple[dict[str, Any], Tensor]] = []
        warm = False  # the first step compiles for a minute, which is no training
        with tqdm(total=s.steps, initial=self.step, unit="step", desc="training the head") as bar:
            while self.progress() < 1:
                began = time.monotonic()
                pending.append(self.train_step())
                self.elapsed += (time.monotonic() - began) * warm
                warm = True
                bar.update()
                due = self.step % s.save_every == 0 or self.progress() >= 1
                if due or len(pending) == READ_EVERY:
                    began = time.monotonic()
                    entries = _read(pending)  # waits for the device
                    self.elapsed += time.monotonic() - began
                    self.history += [{**entry, "seconds": round(self.elapsed, 3)} for entry in entries]
                    bar.set_postfix(loss=entries[-1]["loss"], first=entries[-1]["accuracy"][0], refresh=False)
                    pending.clear()
                if due or self.progress() >= 1:
                    self.save(out)
                    if on_save:
                        on_save(self.step, out)

    def train_step(self) -> tuple[dict[str, Any], Tensor]:
        """One step; what the host knows of it, and loss, hits and counts by draft step, still on the device."""
        s, rate = self.settings, learning_rate(self.progress(), self.settings)
        batch = self.reader.read(row_order(len(self.reader.rows["ids"]), self.step, s))
        with self.autocast:
            losses = step_losses(self.head, batch, s.ttt_steps, self.output)
            loss = total_loss(losses)
        loss.backward()
        clip_grad_norm_([p for p in self.head.parameters() if p.grad is not None], s.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        counts = torch.stack((losses.hits, losses.counted), 1).flatten()
        return {"step": self.step, "lr": rate}, torch.cat((loss.detach()[None], counts))

    def _judged(self, numbers: range) -> Losses:
        # with gradients on, as in training: on CUDA the same compiled function then serves both
        assert self.judge is not None
        with self.autocast:
            found = step_losses(self.head, self.judge.read(numbers), self.settings.ttt_steps, self.output)
        return Losses(*(x.detach() for x in found))

    def validate(self) -> dict[str, Any] | None:
        """Accuracy by draft step and the mean length of a chain of drafts on the texts set aside."""
        s = self.settings
        if self.judge is None:
            return None
        right = asked_for = 0.0
        hits, counted = torch.zeros(s.ttt_steps), torch.zeros(s.ttt_steps)
        for at in range(0, len(self.judge.rows["ids"]), s.batch):
            losses = self._judged(range(at, at + s.batch))
            long, number = chain_length(losses)
            right, asked_for = right + long, asked_for + number
            hits += losses.correct.sum((1, 2)).cpu()
            counted += losses.inside.sum((1, 2)).cpu()
        rates = (hits / counted.clamp(min=1)).tolist()
        return {
            "step": self.step,
            "accuracy": [round(x, 4) for x in rates],
            "chain": round(1 + right / max(1, asked_for), 4),
        }

    def save(self, out: Path) -> None:
        found = self.validate()
        if found:
            self.validation.append(found)
        save_draft(self.head, out / "draft")
        state = {
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
            "random": torch.get_rng_state(),
            "history": self.history,
            "validation": self.validation,
        }
        torch.save(state, out / "state.partial")
        os.replace(out / "state.partial", out / "state.pt")

    def restore(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.history, self.validation = state["history"], state["validation"]
        torch.set_rng_state(state["random"].cpu())
