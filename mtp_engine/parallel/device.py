"""Ranks on GPUs of one host: kernels write into each other's memory, and the host has no part in it."""

from typing import final

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from mtp_engine.kernels import exchange
from mtp_engine.parallel.group import RankLost
from mtp_engine.parallel.memory import SharedMemory
from mtp_engine.parallel.shard import Shard


@final
class DeviceExchange:
    """An Exchange whose calls CUDA graphs can hold. A rank that has ended does not hold the others up for ever: what waits on the
    GPU looks at a word of the host's memory now and then, and leaves when that says so, or after some minutes."""

    fast = True

    def __init__(self, store: Store, shard: Shard, device: torch.device) -> None:
        """All ranks come here at about the same time. Raises EngineError where their GPUs cannot reach each other."""
        names = [f"memory {rank}" for rank in range(shard.size)]
        size = exchange.bytes_needed(shard.size)
        self._memory = SharedMemory(size, device, lambda handle: store.set(names[shard.rank], handle.hex()))
        addresses = [
            self._memory.address if rank == shard.rank else self._memory.open(bytes.fromhex(store.get(name).decode()))
            for rank, name in enumerate(names)
        ]
        stop = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.boxes = exchange.Boxes.over(shard.rank, addresses, stop, device)

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        """See Exchange. What is narrower than 32 bits travels as what holds it."""
        if x.element_size() < 4:
            wide = x.float() if x.is_floating_point() else x.int()
            return self.gather(wide, join=join).to(x.dtype)
        return exchange.gather(x, self.boxes, join=join)

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        return exchange.reduce(partial, self.boxes, dtype, residual, weights)

    def check(self) -> None:
        """Raises RankLost where somebody did not wait to the end."""
        if int(self.boxes.stop):
            raise RankLost("another rank does not answer: load the engine anew")

    def abort(self) -> None:
        """Let nothing wait any longer. From any thread."""
        self.boxes.stop.fill_(1)

    def close(self) -> None:
        self._memory.close()
