"""How the two halves of a step are run: here at once, in cuda_graph.py as CUDA graphs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from mtp_engine.protocols import Launched
from mtp_engine.runtime.request import Members
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree

Draft = Callable[[Members, int], tuple[Batch, DraftTree]]
Verify = Callable[[Members, Batch, DraftTree], Tensor]


class Runner(Protocol):
    """Runs the two halves of a step for the present members."""

    @property
    def in_flight(self) -> int: ...  # plain steps launched before the first is waited for

    def prepare(self, members: Members, bound: int) -> None:
        """What a first use needs, such as compiling; not counted in any statistics."""

    def launch(self, members: Members, bound: int) -> Launched:
        """If members are not plain, no step is in flight when this is called."""

    def settle(self) -> None:
        """Wait until all that was queued is done."""


@final
@dataclass(frozen=True)
class Done:
    """A step that ran at once (a Launched)."""

    rows: list[list[int]]
    draft_s: float
    verify_s: float

    def wait(self) -> list[list[int]]:
        return self.rows


@final
class EagerRunner:
    """Runs each step at once, operation by operation."""

    in_flight = 1

    def __init__(self, draft: Draft, verify: Verify) -> None:
        self._draft, self._verify = draft, verify

    def prepare(self, members: Members, bound: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def launch(self, members: Members, bound: int) -> Launched:
        begin = time.perf_counter()
        batch, tree = self._draft(members, bound)
        drafted = time.perf_counter()
        rows = self._verify(members, batch, tree).tolist()
        return Done(rows, drafted - begin, time.perf_counter() - drafted)
