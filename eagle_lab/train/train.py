"""Training an EAGLE-3 head for any Llama-style target that the kit loads, on text that the target wrote.

A run is a function of its settings and its texts. Rows are packed and ordered by the seed and the step, and no other
random number is drawn; the state on disk holds weights, optimizers, schedules and the step. So a run that was stopped,
by the clock or by a kill, and is started again ends with the same bits as one that was not. Under `torchrun` each
process takes its share of every batch.
"""

from __future__ import annotations

import copy
import math
import os
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from eagle_lab.measure.records import Part
from eagle_lab.models.checkpoints import load_draft, save_draft
from eagle_lab.models.dialects import default_taps
from eagle_lab.models.draft import DraftHead
from eagle_lab.runtime.checks import Field, settings
from eagle_lab.runtime.progress import progress
from eagle_lab.train.new_head import new_head
from eagle_lab.train.packing import Reader, choose_vocabulary, pack
from eagle_lab.train.processes import ALONE, Processes, claim
from eagle_lab.train.text import Count, Share, Texts
from eagle_lab.train.ttt import Batch, Loss, Losses, chain_length, start_places, step_losses, total_loss

READ_EVERY = 10  # steps between two looks at the losses
LOWEST = 0.02  # the learning rate's last share of its top
ASIDE = 256  # texts set aside, at most


@settings
class TrainSettings:
    """How a head is trained.

    `greedy_share` of the texts are greedy, as many as were written where None.
    `steps` of `batch` rows of `length` tokens; the learning rate warms up over a share of them and falls by a cosine to
    2% of `lr`. `mlp` is the width of the head's MLP, the target's where None; `norms` are EAGLE-3.1's; `loss` is
    cross-entropy or lk_hybrid (see `step_losses`). `optimizer` "muon" steers the matrices of
    the layer by Muon, the rest by AdamW. `validation` is the share of texts that is only looked at, 256 at most. Every
    `start` is the folder of a head to go on from, which had learned from `start_tokens` answer tokens before.
    `check_every` steps the head is judged and the state written, and every `save_every` steps the state alone.
    """

    steps: Count = 2000
    ttt_steps: Count = 7
    batch: Count = 24
    length: Annotated[int, Field(ge=16)] = 448
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    clip: Annotated[float, Field(gt=0)] = 0.5
    draft_vocab: Count = 8192
    mlp: Count | None = None
    norms: bool = False
    loss: Loss = "cross_entropy"
    greedy_share: Share | None = None
    start: str | None = None
    start_tokens: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    warm_start: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.02
    save_every: Count = 200
    check_every: Count = 1000


class Step(Part):
    """A training step: its learning rate, the loss, the share of drafts that are the target's token by draft step, the
    drafts of the first step that counted, and the seconds of training so far (compiling left out)."""

    step: int
    lr: float
    loss: float
    accuracy: list[float]
    tokens: int
    seconds: float


class Check(Part):
    """A look at the head along the run: accuracy by draft step and `chain`, the mean tokens a cycle of a tree of one
    branch, on texts set aside (None without such texts); `tau`, what the judge said (None without a judge)."""

    step: int
    accuracy: list[float] | None
    chain: float | None
    tau: float | None


@dataclass
class TrainResult:
    """The folder of the chosen head, in half precision; what the run did; the step of the choice; the steps to go."""

    draft: Path
    history: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    chosen: int = 0
    left: int = 0


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def row_order(count: int, step: int, s: TrainSettings) -> list[int]:
    """The numbers of the rows of a step: each epoch is its own permutation of all rows."""
    found = []
    for place in range(step * s.batch, (step + 1) * s.batch):
        epoch, at = divmod(place, count)
        found.append(_permutation(count, s.seed * 1_000_003 + epoch)[at])
    return found


def make_optimizers(head: DraftHead, s: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layer's matrices and AdamW for the rest."""
    trained = list(head.named_parameters())
    matrices = [p for name, p in trained if s.optimizer == "muon" and p.dim() == 2 and "midlayer" in name]
    rest = [p for _, p in trained if not any(p is m for m in matrices)]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda)
    ]
    if matrices:
        # its update has the size of AdamW's, so that one learning rate serves both
        made.append(torch.optim.Muon(matrices, lr=s.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


def train(
    target: nn.Module,
    texts: Texts,
    out: str | Path,
    settings: TrainSettings,
    judge: Callable[[DraftHead], float] | None = None,
    until: float = float("inf"),
    processes: Processes = ALONE,
    on_save: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a head for the target on texts that it wrote.

    Args: target: a loaded model in eval mode, on the device and in the dtype to use (bfloat16 on CUDA, float32 on the
    CPU); out: a folder for `state.pt`, `training.json` and the chosen head in `draft/`; judge: a number of a head, larger
    is better, by which the checkpoint is chosen (without one it is the last); until: the time of `time.monotonic` at
    which to stop and write the state; on_save: called with the step whenever the state was written.
    Raises: ValueError where the folder holds another run, where the target has too few layers, where the texts hold no
    answers, or where a batch can't be shared among the processes. A folder that holds the same run is taken up where it
    stopped.
    """
    s, out = settings, Path(out)
    if not (texts.answers > 2).any():
        raise ValueError("there are no texts with answers to train on; let the target write some first.")
    if s.batch % processes.count:
        raise ValueError(f"batch is {s.batch}; it must be a multiple of the {processes.count} processes.")
    taps = default_taps(target.config.get_text_config().num_hidden_layers)
    if out.is_dir() and any(out.iterdir()) and not (out / "training.json").exists():
        raise ValueError(f"{out} is not empty and holds no training run; name another output folder.")
    mine = asdict(s) | {"texts": zlib.crc32(texts.ids.data), "processes": processes.count}
    claim(out, "training", mine, processes)
    if s.greedy_share is not None:
        texts = texts.mixed(s.greedy_share)
    shuffled = np.random.default_rng(s.seed).permutation(len(texts))
    aside = min(len(texts) - 1, ASIDE, round(s.validation * len(texts)))
    seen, unseen = texts.take(shuffled[aside:]), texts.take(shuffled[:aside])
    started = None if s.start is None else _started(target, s)
    vocabulary = choose_vocabulary(seen, target.config.get_text_config().vocab_size, s.draft_vocab)
    if started is not None:
        vocabulary = started.target_ids(torch.arange(s.draft_vocab))
    reader = Reader(target, taps, pack(seen, s.length, s.seed))
    # whole batches: a compiled step serves one shape
    held = Reader(target, taps, pack(unseen, s.length, s.seed, s.batch)) if aside else None
    tap_size = 1.0
    if s.norms:
        some = [n % len(reader.asked) for n in range(s.batch // processes.count)]
        tap_size = _rms(reader.read(some).taps[..., -target.config.get_text_config().hidden_size :])
    head = new_head(target, vocabulary, s.warm_start, s.seed, s.mlp, norms=s.norms, tap_size=tap_size)
    if started is not None:
        head = started.float().to(reader.device)
    output = target.get_output_embeddings().weight[vocabulary.to(reader.device)].float()
    run = _Run(_Objective(head, s, output), make_optimizers(head, s), s, reader, held, judge, processes)
    if (out / "state.pt").exists():
        run.restore(torch.load(out / "state.pt", map_location=reader.device, weights_only=True))
    run.go(out, until, on_save)
    return TrainResult(out / "draft", run.history, run.checks, run.chosen, s.steps - run.step)


def _started(target: nn.Module, s: TrainSettings) -> DraftHead:
    """The head to go on from, on the CPU. Raises ValueError where the settings ask for another one."""
    c = target.config.get_text_config()
    head = load_draft(str(s.start), c.num_hidden_layers, target.get_input_embeddings())
    found = head.config
    theirs = (found.draft_vocab_size, found.intermediate_size, found.fc_norm and found.norm_output)
    mine = (s.draft_vocab, s.mlp or c.intermediate_size, s.norms)
    if mine != theirs:
        raise ValueError(
            f"the head in {s.start} has draft_vocab, mlp, norms {theirs}, and the settings ask for {mine}; they must agree."
        )
    return head


def _rms(states: Tensor) -> float:
    """The usual size of states [..., H]: a median, as the first token's are far larger."""
    return float(states.float().square().mean(-1).sqrt().median())


class _Objective(nn.Module):
    """What is differentiated, as one module, so that DDP can join the processes' gradients."""

    output: Tensor

    def __init__(self, head: DraftHead, s: TrainSettings, output: Tensor) -> None:
        super().__init__()
        self.head, self.steps, self.loss = head, s.ttt_steps, s.loss
        object.__setattr__(self, "output", output)  # the target's, neither trained nor saved

    def forward(self, batch: Batch, places: Tensor) -> Losses:
        return step_losses(self.head, batch, places, self.steps, self.output, self.loss)


def _entry(step: int, lr: float, numbers: list[float], seconds: float) -> Step:
    loss, hits, counted = numbers[0], numbers[1::2], numbers[2::2]
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss isn't finite at step {step}; lower the learning rate, or clip gradients harder. The last state "
            "that was written is kept."
        )
    accuracy = [round(h / max(1, n), 4) for h, n in zip(hits, counted, strict=True)]
    return Step(
        step=step, lr=lr, loss=round(loss, 4), accuracy=accuracy, tokens=int(counted[0]), seconds=round(seconds, 3)
    )  # fmt: skip


class _Run:
    """The state of a run and its steps."""

    def __init__(
        self,
        objective: _Objective,
        optimizers: list[torch.optim.Optimizer],
        s: TrainSettings,
        reader: Reader,
        held: Reader | None,
        judge: Callable[[DraftHead], float] | None,
        processes: Processes,
    ) -> None:
        self.head, self.output, self.settings, self.processes = objective.head, objective.output, s, processes
        self.optimizers, self.reader, self.held, self.judge = optimizers, reader, held, judge
        self.schedules = [
            get_cosine_with_min_lr_schedule_with_warmup(
                o, round(s.warmup * s.steps), s.steps, min_lr_rate=LOWEST
            )
            for o in optimizers
        ]
        self.objective: nn.Module = objective
        if processes.count > 1:
            self.objective = DistributedDataParallel(objective)
        self.step, self.seconds = 0, 0.0
        self.history: list[Step] = []
        self.checks: list[Check] = []
        self.chosen, self.best = 0, float("-inf")
        self.most = self._most_places()
        cuda = reader.device.type == "cuda"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def _most_places(self) -> int:
        """The most places from which a draft can start in any batch of the run, rounded up so that runs share what is
        compiled."""
        s, count = self.settings, self.processes.count
        asked = self.reader.asked.numpy()
        most = 1
        for step in range(s.steps):
            each = asked[row_order(len(asked), step, s)]
            most = max(most, *(int(each[rank::count].sum()) for rank in range(count)))
        if self.held is not None:
            each = self.held.asked.numpy().reshape(-1, s.batch)
            most = max(most, int(each.sum(1).max()))
        return min(-(-most // 1024) * 1024, s.batch * s.length)

    def go(self, out: Path, until: float, on_save: Callable[[int], None] | None) -> None:
        """Steps until the last one or the clock; the state is on disk at the end."""
        s = self.settings
        pending: list[tuple[int, float, Tensor]] = []
        began: float | None = None  # the first step compiles for a minute, which is no training
        with progress(s.steps, "step", "training the head", self.step, self.processes.rank == 0) as bar:
            while self.step < s.steps:
                pending.append(self.train_step())
                bar.update()
                check = self.step % s.check_every == 0 or self.step == s.steps
                save = check or self.step % s.save_every == 0
                if not save and self.step % READ_EVERY:
                    continue
                late = bool(self.processes.agree(time.monotonic() > until))
                # one copy for many steps: a wait for the device at each would keep it idle between them
                read = torch.stack([numbers for *_, numbers in pending]).tolist()
                self.seconds += time.monotonic() - began if began is not None else 0.0
                steps = zip(pending, read, strict=True)
                self.history += [_entry(step, lr, numbers, self.seconds) for (step, lr, _), numbers in steps]
                pending.clear()
                bar.set_postfix(loss=self.history[-1].loss, first=self.history[-1].accuracy[0], refresh=False)
                if check:
                    self.check(out)
                if save or late:
                    self.save(out)
                    if on_save:
                        on_save(self.step)
                if late:
                    return
                began = time.monotonic()

    def train_step(self) -> tuple[int, float, Tensor]:
        """One step: its number, its learning rate, and loss, hits and counts by draft step, still on the device."""
        s, processes = self.settings, self.processes
        order = row_order(len(self.reader.asked), self.step, s)
        batch = self.reader.read(order[processes.rank :: processes.count])
        with self.autocast:
            losses = self.objective(batch, start_places(batch, self.most))
        counted = self.processes.total(losses.counted)
        loss = total_loss(losses.total, counted)
        # DDP takes the mean of the processes' gradients, and the loss is their sum
        (loss * self.processes.count).backward()
        clip_grad_norm_(self.head.parameters(), s.clip)
        rate = self.schedules[0].get_last_lr()[0]
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        counts = torch.stack((self.processes.total(losses.hits), counted), 1).flatten()
        return self.step, rate, torch.cat((self.processes.total(loss.detach()[None]), counts))

    def on_held_out(self) -> tuple[list[float], float] | None:
        """Accuracy by draft step and the mean length of a chain of drafts on the texts set aside."""
        s = self.settings
        if self.held is None:
            return None
        right = started = 0.0
        hits, inside = torch.zeros(s.ttt_steps), torch.zeros(s.ttt_steps)
        for at in range(0, len(self.held.asked), s.batch):
            batch = self.held.read(range(at, at + s.batch))
            # with gradients on, as in training: on CUDA the same compiled function then serves both
            with self.autocast:
                places = start_places(batch, self.most)
                losses = step_losses(self.head, batch, places, s.ttt_steps, self.output, s.loss)
            long, number = chain_length(losses)
            right, started = right + long, started + number
            hits += losses.correct.sum(1).cpu()
            inside += losses.inside.sum(1).cpu()
        rates = (hits / inside.clamp(min=1)).tolist()
        return [round(x, 4) for x in rates], round(1 + right / max(1, started), 4)

    def check(self, out: Path) -> None:
        """Judge the head; where it is the best so far, or nobody judges, it becomes the chosen one."""
        if self.processes.rank == 0:
            seen = self.on_held_out()
            tau = None if self.judge is None else self.judge(self.head)
            accuracy, chain = seen or (None, None)
            self.checks.append(Check(step=self.step, accuracy=accuracy, chain=chain, tau=tau))
            if tau is None or tau > self.best:
                self.chosen, self.best = self.step, self.best if tau is None else tau
                save_head(halved(self.head), out / "draft")
        self.processes.wait()

    def save(self, out: Path) -> None:
        """Write the whole state in one step."""
        if self.processes.rank == 0:
            state = {
                "head": self.head.state_dict(),
                "optimizers": [x.state_dict() for x in self.optimizers],
                "schedules": [x.state_dict() for x in self.schedules],
                "run": {"step": self.step, "seconds": self.seconds, "chosen": self.chosen, "best": self.best},
                "history": [x.model_dump() for x in self.history],
                "checks": [x.model_dump() for x in self.checks],
            }
            torch.save(state, out / "state.partial")
            os.replace(out / "state.partial", out / "state.pt")
        self.processes.wait()

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that `save` wrote."""
        self.head.load_state_dict(state["head"])
        for name in ("optimizers", "schedules"):
            for mine, kept in zip(getattr(self, name), state[name], strict=True):
                mine.load_state_dict(kept)
        vars(self).update(state["run"])
        self.history = [Step(**x) for x in state["history"]]
        self.checks = [Check(**x) for x in state["checks"]]


def halved(head: DraftHead) -> DraftHead:
    """A copy of the head in half precision, over the same embedding."""
    return copy.deepcopy(head, {id(head.embedding): head.embedding}).half()


def save_head(head: DraftHead, folder: Path) -> None:
    """Write a head in the plainest dialect that can say what it is."""
    save_draft(head, folder, "specforge" if head.config.norm_output else "official")
