"""A step as two CUDA graphs, drafting and verifying, captured once per batch size and context bound and then replayed.

Between two steps the host only queues the next graphs: lengths, last tokens and caches are on the device. Results come
back through pinned memory, and the host waits for the oldest step in flight alone. Steps that are not plain run eagerly
(see runtime.request.plain).
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.config import MAX_TREE_NODES
from mtp_engine.protocols import Launched
from mtp_engine.runtime.request import Members, PromptChunk
from mtp_engine.runtime.slots import SCRATCH_LENGTH
from mtp_engine.runtime.step import EagerRunner, ModelStep
from mtp_engine.sampling.batch import SamplingBatch

_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # a batch is padded up to one of these
_SMALLEST_BOUND = 512
SCRATCH_TOKENS = SCRATCH_LENGTH + 128  # room the scratch slot needs in the caches


def bucket(size: int) -> int:
    """The batch size to capture for `size` requests."""
    return next((each for each in _BATCHES if each >= size), size)


def bound_bucket(bound: int) -> int:
    """The context bound to capture for: kernels launch for the bound and leave at once what lies past the length."""
    wanted = _SMALLEST_BOUND
    while wanted < bound:
        wanted *= 2
    return wanted


@final
@dataclass
class _Captured:
    """The graphs of one batch size, and the tensors that they read and write."""

    slots: Tensor
    sampling: SamplingBatch
    draft: torch.cuda.CUDAGraph
    verify: torch.cuda.CUDAGraph
    table: Tensor  # [B, 3 + D+1] int64
    members: Members | None = None  # whose slots and parameters are loaded

    def load(self, members: Members, scratch: int) -> None:
        if self.members is members:
            return
        count, self.members = len(members.slots), members
        self.slots.fill_(scratch)
        self.slots[:count].copy_(members.slots)
        for held, given in zip(_tensors(self.sampling), _tensors(members.sampling), strict=True):
            held[:count].copy_(given)


@final
class Flight:
    """A step in flight (a Launched)."""

    def __init__(self, rows: Tensor, marks: tuple[torch.cuda.Event, ...]) -> None:
        self._rows, self._marks = rows, marks
        self.draft_s = self.verify_s = 0.0

    def wait(self) -> list[list[int]]:
        start, drafted, end, landed = self._marks
        landed.synchronize()
        self.draft_s, self.verify_s = start.elapsed_time(drafted) / 1e3, drafted.elapsed_time(end) / 1e3
        rows: list[list[int]] = self._rows.tolist()
        return rows


@final
class Reading:
    """Chunks of prompts in flight (a Launched)."""

    def __init__(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._start, self._end = start, end
        self.draft_s = self.verify_s = 0.0

    def wait(self) -> list[list[int]]:
        self._end.synchronize()
        self.verify_s = self._start.elapsed_time(self._end) / 1e3
        return []


@final
class GraphRunner:
    """Replays plain steps, and runs others at once (a Runner). in_flight: plain steps queued before the host waits for
    the first of them."""

    def __init__(
        self, step: ModelStep, *, in_flight: int, scratch: int, device: torch.device,
        refresh: Callable[[list[int], list[int]], None] | None = None, captures: bool = True,
    ) -> None:  # fmt: skip
        """scratch: the slot that pads batches. refresh: called before each step with the slots and the most tokens that
        each may have. captures: False for steps of operations that graphs cannot hold; in_flight is 1 then."""
        self.in_flight = in_flight
        self._step, self._scratch, self._device = step, scratch, device
        self._refresh, self._captures = refresh, captures
        self._eager = EagerRunner(step)
        self._ready: set[tuple[int, int, int]] = set()  # batch sizes, bounds and largest trees that ran eagerly
        self._captured: dict[tuple[int, int, bool, bool, bool], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._pinned: deque[Tensor] = deque(maxlen=in_flight + 1)

    def prepare(self, members: Members, bound: int) -> None:
        if not self._replays(members):
            self._make_ready(members, bound)
        elif (key := _key(members, bound)) not in self._captured:
            self._captured[key] = self._capture(members, key[0], key[1])

    def launch(self, members: Members, bound: int) -> Launched:
        if not self._replays(members):
            if self._refresh:
                self._refresh(*self._bounds(members, bound, 0))
            return self._eager.launch(members, bound_bucket(bound))
        step, count = self._captured[_key(members, bound)], len(members.slots)
        step.load(members, self._scratch)
        if self._refresh:
            self._refresh(*self._bounds(members, bound, len(step.slots) - count))
        marks = tuple(
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(4)
        )
        marks[0].record()
        step.draft.replay()
        marks[1].record()
        step.verify.replay()
        marks[2].record()
        host = self._host(step.table)
        host.copy_(step.table, non_blocking=True)
        marks[3].record()
        return Flight(host[:count], marks)

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        self._step.read(chunks)
        end.record()
        return Reading(start, end)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def _replays(self, members: Members) -> bool:
        return self._captures and members.plain

    def _make_ready(self, members: Members, bound: int) -> None:
        """An eager step on the scratch slot, at first: kernels are compiled, and plans for `refresh` exist."""
        count, bound, limits = len(members.slots), bound_bucket(bound), members.limits
        key = (count, bound, limits.most if limits else MAX_TREE_NODES)
        if key in self._ready:
            return
        self._ready.add(key)
        scratch = replace(self._scratched(members, count), limits=limits)  # as many nodes as the step will have
        if self._refresh:
            self._refresh([self._scratch] * count, [SCRATCH_TOKENS] * count)
        self._step.verify(scratch, *self._step.draft(scratch, bound))

    def _scratched(self, members: Members, batch: int) -> Members:
        """Plain members that all sit in the scratch slot, with the first one's sampling parameters."""
        slots = torch.full((batch,), self._scratch, device=self._device)
        return Members((), (), slots, _enlarged(members.sampling, batch), speculates=members.speculates)

    def _bounds(self, members: Members, bound: int, padding: int) -> tuple[list[int], list[int]]:
        """Slots and the most tokens each may have, padding included; the longest request has `bound` at most."""
        requests = members.requests
        margin = bound - max(r.length for r in requests)
        slots = [r.slot for r in requests] + [self._scratch] * padding
        return slots, [r.length + margin for r in requests] + [SCRATCH_TOKENS] * padding

    def _host(self, table: Tensor) -> Tensor:
        """Pinned memory that no step in flight still writes to."""
        if len(self._pinned) == self._pinned.maxlen and self._pinned[0].numel() >= table.numel():
            buffer = self._pinned.popleft()
        else:
            buffer = torch.empty(table.numel(), dtype=table.dtype, pin_memory=True)
        self._pinned.append(buffer)
        return buffer[: table.numel()].view(table.shape)

    def _capture(self, members: Members, batch: int, bound: int) -> _Captured:
        """Run the step once, on the scratch slot, so that kernels are compiled, and record it."""
        scratch = self._scratched(members, batch)
        draft, verify = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side), _no_collection():
            self._step.verify(scratch, *self._step.draft(scratch, bound))
            if self._refresh:  # plans exist from now on; the first ones were made for nothing
                self._refresh([self._scratch] * batch, [SCRATCH_TOKENS] * batch)
            side.synchronize()
            with torch.cuda.graph(draft, pool=self._pool, stream=side):
                drafted = self._step.draft(scratch, bound)
            with torch.cuda.graph(verify, pool=self._pool, stream=side):
                table = self._step.verify(scratch, *drafted)
        torch.cuda.current_stream(self._device).wait_stream(side)
        return _Captured(scratch.slots, scratch.sampling, draft, verify, table)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold graphs of other loops, and freeing one spoils a capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _key(members: Members, bound: int) -> tuple[int, int, bool, bool, bool]:
    sampling = members.sampling
    return bucket(len(members.slots)), bound_bucket(bound), sampling.greedy, sampling.truncated, members.speculates


def _tensors(sampling: SamplingBatch) -> list[Tensor]:
    values = (getattr(sampling, field.name) for field in fields(sampling))
    return [value for value in values if isinstance(value, Tensor)]


def _enlarged(sampling: SamplingBatch, batch: int) -> SamplingBatch:
    """A copy with room for `batch` requests, all with the first one's parameters."""
    values: dict[str, Any] = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    larger: dict[str, Any] = {n: v[:1].repeat(batch) for n, v in values.items() if isinstance(v, Tensor)}
    return replace(sampling, **larger)
