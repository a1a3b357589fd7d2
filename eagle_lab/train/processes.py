"""The processes that train together: one, or those that `torchrun` started on one host, each with its own GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


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
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size()), device
