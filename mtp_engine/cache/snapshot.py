"""Copies of tensors that lie out of the way: on a GPU in pinned host memory, filled by a stream of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Snapshot:
    """tensors: in host memory, full once `ready` has happened (None: at once)."""

    tensors: tuple[Tensor, ...]
    ready: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def open(self) -> tuple[Tensor, ...]:
        """The tensors, for the present stream: what it does from now on waits for them, the host does not."""
        if self.ready:
            torch.cuda.current_stream().wait_event(self.ready)
        return self.tensors

    def settled(self) -> tuple[Tensor, ...]:
        """The tensors, for the host."""
        if self.ready:
            self.ready.synchronize()
        return self.tensors


@final
class Snapshots:
    """Takes them. The tensors given must be fresh: on a CPU they are kept as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def take(self, tensors: Sequence[Tensor]) -> Snapshot:
        """On a GPU the present stream goes on at once; only the copying to the host takes time, beside it."""
        if self._side is None:
            return Snapshot(tuple(tensors))
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            for tensor in tensors:
                tensor.record_stream(self._side)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._side)
        return Snapshot(tuple(host), ready)
