"""Bringing the ranks of an engine together: processes that this one starts, or those of torchrun."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import torch

from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.models import loader
from mtp_engine.parallel.codec import Codec
from mtp_engine.parallel.launch import Children
from mtp_engine.parallel.shard import Shard
from mtp_engine.runtime.lead import Follower, Leader, Solo, Team
from mtp_engine.runtime.threads import pool_size

if TYPE_CHECKING:
    from mtp_engine.parallel.processes import Processes

_LOG = logging.getLogger("mtp_engine")
Work = Callable[[Shard, int, EngineConfig], bytes]
"""What a rank is to do, as its process is handed it: which it is, the port where all meet, and its configuration."""


@final
@dataclass(frozen=True)
class RankWork:
    """What a process that we start is to do. config: settled. port: of the store where the ranks meet."""

    shard: Shard
    port: int
    files: ModelFiles
    config: EngineConfig


WORK = Codec(RankWork, Shard, ModelFiles, EngineConfig, TreeShape)


def form_team(config: EngineConfig, files: ModelFiles) -> tuple[Team, EngineConfig]:
    """The ranks that share the model, and this one's configuration. config: settled.

    Raises EngineError where there are too few GPUs, or other ones, or torchrun started another number of processes.
    """
    if config.tensor_parallel == 1:
        return Solo(), config

    def work(shard: Shard, port: int, own: EngineConfig) -> bytes:
        return WORK.write(RankWork(shard, port, files, own))

    processes, children, config = meet(config, files, "mtp_engine.rank", work)
    return (Follower(processes) if processes.shard.rank else Leader(processes, children)), config


def meet(
    config: EngineConfig, files: ModelFiles, command: str, work: Work, *remedy: str
) -> tuple["Processes", Children | None, EngineConfig]:
    """The ranks that share the model, those that this process started, and this one's configuration. config: settled.

    The others run `python -m command`, unless torchrun started them. remedy: see Children. Raises EngineError as `form_team`.
    """
    size = config.tensor_parallel
    if not torch.distributed.is_available():
        raise EngineError("this torch is built without torch.distributed, which tensor_parallel needs: install another")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join_torchrun(config, files)
    from mtp_engine.parallel.processes import Processes, new_store

    _check_devices(config, size)
    _check_memory(config, files, range(size))
    store = new_store(size)
    each = [replace(config, device=_device(config, rank), threads=_threads(config, size)) for rank in range(size)]
    works = [work(Shard(rank, size), store.port, each[rank]) for rank in range(1, size)]
    children = Children(command, works, *remedy)
    torch.set_num_threads(each[0].threads)
    try:
        device, kernels = torch.device(each[0].device), by_kernels(each[0])
        return Processes(store, Shard(0, size), device, children.lost, kernels=kernels), children, each[0]
    except BaseException:
        children.close()
        raise


def _join_torchrun(config: EngineConfig, files: ModelFiles) -> tuple["Processes", None, EngineConfig]:
    size, local = config.tensor_parallel, int(os.environ["LOCAL_RANK"])
    if (world := int(os.environ["WORLD_SIZE"])) != size:
        raise EngineError(
            f"torchrun started {world} processes and tensor_parallel is {size}: give both the same number"
        )
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    _check_devices(config, here)
    _check_memory(config, files, [local])
    from mtp_engine.parallel.processes import Processes, torchrun_store

    config = replace(config, device=_device(config, local), threads=_threads(config, here))
    if here < size and by_kernels(config):
        _LOG.warning("ranks on several hosts exchange tensors through NCCL, without CUDA graphs, which is slower")
        config = replace(config, attention="torch")
    torch.set_num_threads(config.threads)
    if config.device != "cpu":
        torch.cuda.set_device(config.device)  # where what names no index goes
    store, rank, _ = torchrun_store()
    kernels = by_kernels(config)
    return Processes(store, Shard(rank, size), torch.device(config.device), kernels=kernels), None, config


def by_kernels(config: EngineConfig) -> bool:
    """Whether ranks exchange tensors by kernels. config: settled."""
    return torch.device(config.device).type == "cuda" and config.attention != "torch"


def _device(config: EngineConfig, rank: int) -> str:
    return config.device if config.device == "cpu" else f"cuda:{rank}"


def _threads(config: EngineConfig, ranks: int) -> int:
    """Of each of so many ranks that share this host's cores: threads that wait for each other's cores are slow."""
    return max(1, pool_size(config.threads) // ranks)


def _check_devices(config: EngineConfig, count: int) -> None:
    """Raises EngineError for GPUs on which `count` ranks cannot run alike."""
    if torch.device(config.device).type != "cuda":
        return
    if config.device not in ("cuda", "cuda:0"):
        raise EngineError(
            f"--device {config.device} is one GPU, and {count} ranks take cuda:0 to cuda:{count - 1}: use cuda"
        )
    if (found := torch.cuda.device_count()) < count:
        raise EngineError(
            f"tensor_parallel needs {count} GPUs here, and there are {found}: lower it, or use --device cpu"
        )
    kinds = {torch.cuda.get_device_name(index) for index in range(count)}
    if len(kinds) > 1:
        raise EngineError(f"the GPUs are not alike ({', '.join(sorted(kinds))}): choose with CUDA_VISIBLE_DEVICES")


def _check_memory(config: EngineConfig, files: ModelFiles, gpus: Iterable[int]) -> None:
    """Raises EngineError where a rank's part of the weights, as they are published, is more than a GPU has free."""
    if torch.device(config.device).type != "cuda":
        return
    model, folder = loader.read_config(files.folder, config.window_keys, config.experts), files.mtp_folder
    mtp = loader.read_mtp_config(folder, config.window_keys) if folder else None
    needed = sum(loader.share(files.folder, model, mtp, config.tensor_parallel).weights.values())
    for index in gpus:
        if (free := torch.cuda.mem_get_info(index)[0]) < needed:
            raise EngineError(
                f"each of {config.tensor_parallel} ranks holds {needed / 1e9:.1f} GB of weights, and cuda:{index} has "
                f"{free / 1e9:.1f} GB free: raise tensor_parallel, or see what else runs there"
            )
