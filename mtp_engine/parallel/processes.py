"""Ranks as processes: tensors over gloo on CPUs, over NCCL or by kernels (device.py) on GPUs, messages always over gloo."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.distributed.rendezvous import rendezvous

from mtp_engine.parallel.group import Group, RankLost, joined, ordered_sum, weighted
from mtp_engine.parallel.shard import Shard

if TYPE_CHECKING:
    from mtp_engine.parallel.device import DeviceExchange

_MEETING = timedelta(seconds=120)  # in which all processes must have come
_NEVER = timedelta(
    days=365
)  # a server may wait so long for a request; a rank that ends is noticed at once all the same
_TOLD = 2.0  # seconds after a broken exchange in which it turns out who has ended
_USUAL = 1024  # bytes of a message that goes in one piece
Lost = Callable[[float], str]
"""Says within so many seconds which process has ended, if one has."""


def new_store(size: int) -> TCPStore:
    """Where the processes of this host find each other, at a free port."""
    return TCPStore("127.0.0.1", 0, size, is_master=True, timeout=_MEETING, wait_for_workers=False)


def join_store(port: int, size: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, size, is_master=False, timeout=_MEETING)


def torchrun_store() -> tuple[Store, int, int]:
    """That of a process which torchrun started, its rank, and how many there are."""
    store, rank, size = next(iter(rendezvous("env://", timeout=_MEETING)))
    return store, rank, size


@final
class Processes:
    """This process among those that share a model (an Exchange). Groups of its own, beside torch's default one: an
    application may have that, and several engines."""

    fast = False

    def __init__(
        self, store: Store, shard: Shard, device: torch.device, lost: Lost = lambda patience: "", *, kernels: bool = False
    ) -> None:  # fmt: skip
        """Returns when all have come. kernels: of GPUs of one host. Raises RankLost, and EngineError where GPUs do not suit."""
        self.shard, self._lost = shard, lost
        rank, size = shard.rank, shard.size
        _meet(store, shard, lost)
        try:
            self._messages: Any = ProcessGroupGloo(PrefixStore("messages", store), rank, size, _NEVER)
            self._tensors: Any = self._messages
            self._device = _exchange(PrefixStore("device", store), shard, device) if kernels else None
            if device.type == "cuda" and not kernels:
                from torch.distributed import ProcessGroupNCCL  # absent from torch's builds for CPUs

                # who has ended is noticed by others; torch's own watch would end this process with a core dump
                os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
                options = ProcessGroupNCCL.Options()
                self._tensors = ProcessGroupNCCL(PrefixStore("tensors", store), rank, size, options)
        except RuntimeError as error:
            raise RankLost(
                lost(_TOLD) or f"the processes of tensor_parallel did not all come: {_first(error)}"
            ) from None
        self._store: Store | None = store  # who holds it must outlive the others' use of it
        self._buffer = torch.empty(_USUAL, dtype=torch.uint8)

    @property
    def group(self) -> Group:
        return Group(self.shard, self._device or self)

    def check(self) -> None:
        """Raises RankLost where a kernel has given another rank up."""
        if self._device:
            self._device.check()

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        """See Exchange. Raises RankLost."""
        out = x.new_empty(self.shard.size * x.numel())
        self._wait(lambda: self._tensors._allgather_base(out, x.view(-1)))
        parts = out.view(self.shard.size, *x.shape)
        return joined(parts) if join else parts

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        """See Exchange. Raises RankLost."""
        return ordered_sum(self.gather(weighted(partial, weights)), dtype, residual)

    def tell(self, data: bytes) -> None:
        """Rank 0: to all others, who `hear` it. Raises RankLost."""
        first, rest = data[: _USUAL - 8], data[_USUAL - 8 :]
        head = len(data).to_bytes(8, "little") + first
        self._buffer[: len(head)] = _bytes(head)
        self._wait(lambda: self._messages.broadcast(self._buffer, 0))
        if rest:
            self._wait(lambda: self._messages.broadcast(_bytes(rest), 0))

    def hear(self) -> bytes:
        """The other ranks: what rank 0 tells. Waits for it. Raises RankLost."""
        self._wait(lambda: self._messages.broadcast(self._buffer, 0))
        data = self._buffer.numpy().tobytes()
        length, first = int.from_bytes(data[:8], "little"), data[8:]
        if length <= len(first):
            return first[:length]
        rest = torch.empty(length - len(first), dtype=torch.uint8)
        self._wait(lambda: self._messages.broadcast(rest, 0))
        return first + rest.numpy().tobytes()

    def _wait(self, start: Callable[[], Any]) -> None:
        if self._messages is None:
            raise RankLost(self._lost(_TOLD) or "the other ranks have ended: load the engine anew")
        try:
            start().wait()
        except RuntimeError as error:
            raise RankLost(
                self._lost(_TOLD) or f"another rank has ended: load the engine anew ({_first(error)})"
            ) from None

    def abort(self) -> None:
        """Free this process from what waits on a GPU for a rank that has ended. From any thread."""
        if self._device:
            self._device.abort()
        elif self._tensors is not self._messages and self._tensors is not None:
            self._tensors.abort()

    def close(self) -> None:
        """Let go of the others. Closing twice does no harm."""
        if self._device:
            self._device.close()
            self._device = None
        elif self._tensors is not self._messages and self._tensors is not None:
            self._tensors.abort()  # with nothing under way; NCCL warns of groups that merely go
        self._tensors = self._messages = self._store = None


def _exchange(store: Store, shard: Shard, device: torch.device) -> "DeviceExchange":
    from mtp_engine.parallel.device import DeviceExchange  # Triton is only where there are GPUs

    return DeviceExchange(store, shard, device)


def _meet(store: Store, shard: Shard, lost: Lost) -> None:
    """Wait for all, but not for one that has ended on its way."""
    store.set(f"here {shard.rank}", "")
    names, end = [f"here {rank}" for rank in range(shard.size)], time.monotonic() + _MEETING.total_seconds()
    while not store.check(names):
        if (said := lost(0.0)) or time.monotonic() > end:
            raise RankLost(said or "the processes that share the model did not all come: load the engine anew")
        time.sleep(0.01)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
