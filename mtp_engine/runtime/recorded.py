"""A step recorded over fixed tensors: as CUDA graphs, or as the operations themselves.

Where structures may have a say, what the model computes and what is chosen of it are apart. In between masks are made, for
those whose choice turns out not to be allowed. And drafts are then what the host leaves of them.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from mtp_engine.runtime.request import Members, TreeLimits
from mtp_engine.runtime.step import ModelStep, says_full
from mtp_engine.runtime.structures import Given
from mtp_engine.tree import DraftTree

SMALLEST_BOUND, BOUND_STEP = 512, 4  # tokens


@final
class Uncaptured:
    """A step that runs operation by operation (a Recorded): on a CPU, and where a GPU cannot capture it."""

    def __init__(self, step: ModelStep, members: Members, bound: int, given: Given | None) -> None:
        self._step, self._members, self._bound, self._given = step, members, bound, given

    def draft(self) -> DraftTree:
        self._batch, self._tree = self._step.draft(self._members, self._bound)
        return self._tree

    def outline(self) -> Tensor:
        return _outline(self._tree)

    def forward(self) -> None:
        self._tree = forced(self._step, self._tree, self._given)
        self._passed = self._step.forward(self._batch, self._tree)

    def peek(self) -> Tensor:
        return self._step.peek(self._batch, self._tree, self._passed[1])

    def choose(self) -> tuple[Tensor, Tensor | None]:
        mask = self._given.mask if self._given else None
        return self._step.choose(self._members, self._batch, self._tree, *self._passed, mask)


@final
class Lane:
    """Where steps are captured: graphs share their memory, as only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@final
class Captured:
    """A step as CUDA graphs (a Recorded). Operations run before they are captured, so that kernels are compiled.

    Where nothing is given, what the model computes and what is chosen of it are one graph.
    """

    def __init__(
        self,
        step: ModelStep,
        members: Members,
        bound: int,
        given: Given | None,
        lane: "Lane",
        refresh: Callable[[], None],
    ) -> None:
        self._draft, self._forward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._choose = torch.cuda.CUDAGraph() if given else None
        self._peek = torch.cuda.CUDAGraph() if given and step.verifier.picks else None
        before = torch.cuda.current_stream(members.slots.device)
        lane.stream.wait_stream(before)
        with torch.cuda.stream(lane.stream), no_collection():
            whole(step, members, bound, given)
            refresh()  # plans exist from now on; the first ones were made for nothing
            lane.stream.synchronize()
            with torch.cuda.graph(self._draft, pool=lane.pool, stream=lane.stream):
                batch, drafted = step.draft(members, bound)
                self._outline = _outline(drafted) if given else None
            with torch.cuda.graph(self._forward, pool=lane.pool, stream=lane.stream):
                tree = forced(step, drafted, given)
                passed = step.forward(batch, tree)
                if not given:
                    self._result = step.choose(members, batch, tree, *passed, None)
            if self._peek:
                with torch.cuda.graph(self._peek, pool=lane.pool, stream=lane.stream):
                    self._peeked = step.peek(batch, tree, passed[1])
            if given and self._choose:
                with torch.cuda.graph(self._choose, pool=lane.pool, stream=lane.stream):
                    self._result = step.choose(members, batch, tree, *passed, given.mask)
        # other steps' graphs may have the memory of all else
        self._tree = replace(drafted, scores=None, draft=None)
        before.wait_stream(lane.stream)

    def once(self) -> None:
        """Run all of it, for nobody: the driver takes a graph to the GPU when it runs for the first time."""
        for graph in (self._draft, self._forward, self._peek, self._choose):
            if graph:
                graph.replay()

    def draft(self) -> DraftTree:
        self._draft.replay()
        return self._tree

    def outline(self) -> Tensor:
        assert self._outline is not None
        return self._outline

    def forward(self) -> None:
        self._forward.replay()

    def peek(self) -> Tensor:
        assert self._peek
        self._peek.replay()
        return self._peeked

    def choose(self) -> tuple[Tensor, Tensor | None]:
        if self._choose:
            self._choose.replay()
        return self._result


def forced(step: ModelStep, tree: DraftTree, given: Given | None) -> DraftTree:
    """The tree with what is forced of it."""
    return tree if given is None or given.forced is None else step.force(tree, given.forced)


def _outline(tree: DraftTree) -> Tensor:
    return torch.cat([tree.tokens, tree.parents, tree.size[:, None]], 1)


def whole(step: ModelStep, members: Members, bound: int, given: Given | None) -> None:
    """All of a step."""
    batch, drafted = step.draft(members, bound)
    if given:
        _outline(drafted)
    tree = forced(step, drafted, given)
    passed = step.forward(batch, tree)
    if given and step.verifier.picks:
        step.peek(batch, tree, passed[1])
    step.choose(members, batch, tree, *passed, given.mask if given else None)


class Recorded(Protocol):
    """The parts of a step over fixed tensors, in this order. What they return is overwritten when they run again."""

    def draft(self) -> DraftTree: ...

    def outline(self) -> Tensor:
        """What was drafted, [B, 2 N + 1] int64: tokens, parents and size of each tree. Only of steps that may have structures."""

    def forward(self) -> None: ...

    def peek(self) -> Tensor:
        """See ModelStep.peek. Only of steps that may have structures."""

    def choose(self) -> tuple[Tensor, Tensor | None]:
        """See ModelStep.choose."""


@final
@dataclass
class Prepared:
    """A recorded step and the tensors that it reads: those of its members, and what the host gives."""

    members: Members
    given: Given | None
    parts: Recorded
    loaded: Members | None = None  # whose slots and parameters are in there

    def load(self, members: Members, scratch: int) -> None:
        if self.loaded is members:
            return
        count, held, self.loaded = len(members.slots), self.members, members
        held.slots.fill_(scratch)
        held.slots[:count].copy_(members.slots)
        held.sampling.rates[:, :count].copy_(members.sampling.rates)
        held.sampling.numbers[:, :count].copy_(members.sampling.numbers)
        if held.limits:
            limits = members.limits or TreeLimits.none(count, members.slots.device)
            held.limits.widths[:count].copy_(limits.widths)
            held.limits.nodes[:count].copy_(limits.nodes)


def bound_bucket(bound: int) -> int:
    """The context bound to capture for: kernels launch for the bound and leave at once what lies past the length."""
    wanted = SMALLEST_BOUND
    while wanted < bound:
        wanted *= BOUND_STEP
    return wanted


@contextmanager
def memory_errors() -> Iterator[None]:
    """A full memory raises torch.OutOfMemoryError, also where the driver says so, or a capture that broke off because of it."""
    try:
        yield
    except RuntimeError as error:
        full = next((each for each in (error, error.__context__) if says_full(each)), None)
        if full is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(str(full)) from error


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage may hold graphs of other loops, and freeing one spoils a capture."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
