"""The processes that train together: one, or those that `torchrun` started on one host, each with its own GPU."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from eagle_lab.measure.records import write_json
from eagle_lab.models.parallel import own_device


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; all read and write the same folders."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def total(self, x: Tensor) -> Tensor:
        """The sum of x [...] over all processes; x itself for one."""
        if self.count > 1:
            x = x.clone()
            distributed.all_reduce(x)
        return x

    def agree(self, x: float) -> float:
        """The first process's number, for all."""
        if self.count > 1:
            told = [x]
            distributed.broadcast_object_list(told)
            return float(told[0])
        return x


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes of `torchrun`, joined by NCCL on GPUs and by gloo elsewhere, and this one's device.

    Without `torchrun` one process alone, on the device given.
    """
    if "RANK" not in os.environ:
        return ALONE, device
    device = own_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size()), device


def claim(folder: Path, what: str, settings: dict[str, Any], processes: Processes) -> None:
    """Make a folder the place of `what` with these settings; they stand in `what`.json.

    Raises ValueError where it holds the same with other settings, and names those.
    """
    note, mine = folder / f"{what}.json", json.loads(json.dumps(settings))
    found = json.loads(note.read_text()) if note.exists() else mine
    if differing := sorted(name for name in {*found, *mine} if found.get(name) != mine.get(name)):
        raise ValueError(
            f"{folder} holds {what} of other settings ({', '.join(differing)}); name another folder."
        )
    processes.wait()
    if processes.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a file stands there, or nobody may write
            raise ValueError(f"{folder} can't be made ({error.strerror}); name another folder.") from None
        write_json(mine, note)
    processes.wait()
