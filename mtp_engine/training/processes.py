"""This process among those that train together, each on rows of its own: those of torchrun, or ranks that share the main
model."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_engine.parallel.group import Group

_PIECE = 1 << 24  # values that ranks exchange at once: each gets all of every other's


@final
@dataclass(frozen=True)
class Process:
    """The rank-th of `world`. group: those who share the main model, all or this one alone. check: raises RankLost where one of
    them has ended, so that what was exchanged means nothing."""

    rank: int = 0
    world: int = 1
    group: Group = Group()  # noqa: RUF009  frozen
    check: Callable[[], None] = lambda: None

    @property
    def decodes(self) -> bool:
        """Whether it measures how long drafts are: one process does, or all that share the main model together."""
        return not self.rank or self.group.size > 1

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes, with the same bits on each of a group; perhaps in place."""
        if self.group.size == 1:
            return mean_over_processes(values)
        pieces = torch.split(values.flatten(), _PIECE)
        return torch.cat([self.group.sum(each.float(), values.dtype) for each in pieces]).view_as(values) / self.world

    def wait(self, device: torch.device) -> None:
        """Until all have come so far. device: the main model's."""
        if self.group.size > 1:
            self.group.join(torch.zeros(1, device=device)).tolist()
        elif dist.is_initialized():
            dist.barrier()


def own_device(device: str) -> str:
    """For a main model that is whole on every GPU: of several GPUs the one that torchrun means for this process."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    return device


def join_processes(device: str) -> Process:
    """Join the others, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Process()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Process(dist.get_rank(), dist.get_world_size())


def mean_over_processes(values: Tensor) -> Tensor:
    """In place; the values themselves where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
