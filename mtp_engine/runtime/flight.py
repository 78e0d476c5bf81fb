"""Steps that run on a device while the host goes on, and the moments by which their halves are timed."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor

from mtp_engine.runtime.request import Landed
from mtp_engine.sampling.logprobs import Notes

T = TypeVar("T")


class Mark(Protocol):
    """A moment on the device's time line: a torch.cuda.Event, or HostMark."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # ms


@final
class HostMark:
    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "HostMark") -> float:
        return (end.at - self.at) * 1e3


@final
class HostRoom:
    """Room on the host for a copy of a tensor, which stands until the next one: taking pinned memory anew for every copy, and
    giving it back, asks the driver each time."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._views: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """Complete once what is queued on the device by now is done."""
        kind = tensor.shape, tensor.dtype
        if kind not in self._views:
            self._views[kind] = self._view(tensor)
        return self._views[kind].copy_(tensor, non_blocking=True)

    @torch.inference_mode(False)  # a flight may land outside of it
    def _view(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size > len(self._bytes):
            self._bytes = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._pinned)
            self._views.clear()
        return self._bytes[:size].view(tensor.dtype).view(tensor.shape)


@final
class Berth:
    """What a step in flight needs on the host. Once that has landed, and is handed out, another one takes it."""

    def __init__(self, mark: Callable[[], Mark], *, pinned: bool) -> None:
        self.began, self._halfway, self.landed = mark(), mark(), mark()
        self.drafted = self.began  # where nothing is drafted; a mark less to record
        self.rows, self.notes = HostRoom(pinned=pinned), HostRoom(pinned=pinned)

    def draft(self, nodes: int) -> None:
        """Trees of so many nodes, roots included, were drafted."""
        self.drafted = self._halfway if nodes > 1 else self.began
        if nodes > 1:
            self.drafted.record()


@final
class Flight:
    """A step in flight (a Launched). marks: when it began, had drafted, and was on the host."""

    def __init__(
        self,
        table: Tensor,
        notes: Tensor | None,
        failed: Mapping[tuple[int, tuple[int, ...]], str],
        marks: Sequence[Mark],
    ) -> None:
        self._table, self._notes, self._failed, self._marks = table, notes, failed, marks
        self._landed: Landed | None = None

    def wait(self) -> Landed:
        if self._landed is None:
            began, drafted, landed = self._marks
            landed.synchronize()
            draft_s = 0.0 if drafted is began else began.elapsed_time(drafted) / 1e3
            verify_s = drafted.elapsed_time(landed) / 1e3
            notes = None if self._notes is None else Notes(self._notes)
            self._landed = Landed(self._table.tolist(), draft_s, verify_s, notes, self._failed)
        return self._landed


@final
class Opened(Generic[T]):
    """A step that the host launches part by part (a Launched): its drafts, then its model, then what is chosen."""

    def __init__(self, model: Callable[[], T], rest: Callable[[T], Flight]) -> None:
        """rest: is given what `model` returns. Both know the steps before this one, and are forgotten once they were called:
        else each step would hold all before it, back to the last one without structures."""
        self._model: Callable[[], T] | None = model
        self._rest: Callable[[T], Flight] | None = rest
        self._passed: list[T] = []
        self._flight: Flight | None = None

    def proceed(self) -> None:
        """Launch its model, unless it was."""
        if self._model:
            self._passed.append(self._model())
            self._model = None

    def finish(self) -> Flight:
        if self._flight is None:
            self.proceed()
            assert self._rest
            self._flight = self._rest(self._passed[0])
            self._rest = None
            self._passed.clear()
        return self._flight

    def wait(self) -> Landed:
        return self.finish().wait()


@final
class Reading:
    """A prompt's chunk in flight (a Launched)."""

    def __init__(self, start: Mark, end: Mark) -> None:
        self._start, self._end = start, end

    def wait(self) -> Landed:
        self._end.synchronize()
        return Landed([], 0.0, self._start.elapsed_time(self._end) / 1e3)
