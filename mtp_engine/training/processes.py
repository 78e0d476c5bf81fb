"""Data-parallel training: this process among those of torchrun."""

import os
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor


@final
@dataclass(frozen=True)
class Process:
    """The rank-th of `world`."""

    rank: int = 0
    world: int = 1


def own_device(device: str) -> str:
    """Of several GPUs the one that torchrun means for this process."""
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
