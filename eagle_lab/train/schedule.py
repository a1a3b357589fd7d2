"""How a head is trained: the settings, the learning rate along the run, and the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi

import torch


@dataclass(frozen=True)
class TrainSettings:
    """How a head is trained. `batch` rows of `length` tokens a step; `steps` in all, or fewer where `minutes` end
    first (the learning rate then falls by the clock, and the run is no longer a function of its seed alone).
    `store` keeps the target's hidden states between epochs, 8 · H bytes a token: right for little text and a slow
    target. `optimizer` "muon" steers the matrices of the layer by Muon, the rest by AdamW. `train_output` False keeps
    the target's own output rows. `validation` is the share of texts
    that is only looked at, 256 at most."""

    steps: int = 2000
    ttt_steps: int = 7
    batch: int = 24
    length: int = 448
    lr: float = 1e-3
    warmup: float = 0.03
    clip: float = 0.5
    draft_vocab: int = 8192
    seed: int = 0
    minutes: float | None = None
    warm_start: bool = True
    train_output: bool = True
    optimizer: str = "adamw"
    validation: float = 0.02
    store: bool = False
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "ttt_steps", "batch", "draft_vocab", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1."
                )
        if self.length < 16:
            raise ValueError(f"length is {self.length}; rows of fewer than 16 tokens hold no text.")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr is {self.lr}; a learning rate is between 0 and 1, such as 0.001.")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer {self.optimizer!r} is unknown; use 'adamw' or 'muon'.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; it is a share, at least 0 and below 1.")


def learning_rate(progress: float, s: TrainSettings) -> float:
    """The learning rate at a share of the run: linear warm-up, then a cosine down to 2% of the top."""
    if progress < s.warmup:
        return s.lr * (progress / s.warmup + 1e-3)
    return s.lr * (0.02 + 0.98 * 0.5 * (1 + cos(pi * min(1.0, (progress - s.warmup) / (1 - s.warmup)))))


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
