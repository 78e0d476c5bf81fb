"""A step recorded over fixed tensors: as CUDA graphs, or as the operations themselves.

Where structures may have a say, what the model computes and what is chosen of it are apart: masks are made in between,
while the model runs.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from mtp_engine.runtime.request import Members, TreeLimits
from mtp_engine.runtime.step import ModelStep
from mtp_engine.sampling.batch import SamplingBatch
from mtp_engine.tree import DraftTree


@final
class Uncaptured:
    """A step that runs operation by operation (a Recorded): on a CPU, and where a GPU cannot capture it."""

    def __init__(self, step: ModelStep, members: Members, bound: int, mask: Tensor | None) -> None:
        self._step, self._members, self._bound, self._mask = step, members, bound, mask

    def draft(self) -> DraftTree:
        self._drafted = self._step.draft(self._members, self._bound)
        return self._drafted[1]

    def forward(self) -> None:
        self._passed = self._step.forward(*self._drafted)

    def choose(self) -> tuple[Tensor, Tensor | None]:
        return self._step.choose(self._members, *self._drafted, *self._passed, self._mask)


@final
class Lane:
    """Where steps are captured: graphs share their memory, as only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@final
class Captured:
    """A step as CUDA graphs (a Recorded). Operations run once before they are captured, so that kernels are compiled.

    Without a mask, what the model computes and what is chosen of it are one graph.
    """

    def __init__(
        self,
        step: ModelStep,
        members: Members,
        bound: int,
        mask: Tensor | None,
        lane: "Lane",
        refresh: Callable[[], None],
    ) -> None:
        self._draft, self._forward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._choose = None if mask is None else torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(members.slots.device)
        lane.stream.wait_stream(before)
        with torch.cuda.stream(lane.stream), no_collection():
            step.verify(members, *step.draft(members, bound), mask)
            refresh()  # plans exist from now on; the first ones were made for nothing
            lane.stream.synchronize()
            with torch.cuda.graph(self._draft, pool=lane.pool, stream=lane.stream):
                drafted = step.draft(members, bound)
            with torch.cuda.graph(self._forward, pool=lane.pool, stream=lane.stream):
                passed = step.forward(*drafted)
                if not self._choose:
                    self._result = step.choose(members, *drafted, *passed, None)
            if self._choose:
                with torch.cuda.graph(self._choose, pool=lane.pool, stream=lane.stream):
                    self._result = step.choose(members, *drafted, *passed, mask)
        # other steps' graphs may have the memory of all else
        self._tree = replace(drafted[1], scores=None, draft=None)
        before.wait_stream(lane.stream)

    def draft(self) -> DraftTree:
        self._draft.replay()
        return self._tree

    def forward(self) -> None:
        self._forward.replay()

    def choose(self) -> tuple[Tensor, Tensor | None]:
        if self._choose:
            self._choose.replay()
        return self._result


class Recorded(Protocol):
    """The parts of a step over fixed tensors, in this order. What they return is overwritten when they run again."""

    def draft(self) -> DraftTree: ...

    def forward(self) -> None: ...

    def choose(self) -> tuple[Tensor, Tensor | None]:
        """See ModelStep.choose."""


@final
@dataclass
class Prepared:
    """A recorded step and the tensors that it reads: those of its members, and [B, N, W] int32 that structures allow."""

    members: Members
    mask: Tensor | None
    parts: Recorded
    loaded: Members | None = None  # whose slots and parameters are in there

    def load(self, members: Members, scratch: int) -> None:
        if self.loaded is members:
            return
        count, held, self.loaded = len(members.slots), self.members, members
        held.slots.fill_(scratch)
        held.slots[:count].copy_(members.slots)
        for ours, theirs in zip(_tensors(held.sampling), _tensors(members.sampling), strict=True):
            ours[:count].copy_(theirs)
        if held.limits:
            limits = members.limits or TreeLimits.none(count, members.slots.device)
            held.limits.widths[:count].copy_(limits.widths)
            held.limits.nodes[:count].copy_(limits.nodes)


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage may hold graphs of other loops, and freeing one spoils a capture."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tensors(sampling: SamplingBatch) -> list[Tensor]:
    values = (getattr(sampling, field.name) for field in fields(sampling))
    return [value for value in values if isinstance(value, Tensor)]
