"""No drafting: a tree of one node, which is plain decoding."""

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from mtp_engine.cache import Pages
from mtp_engine.sampling.batch import Batch, Chunk, Extent
from mtp_engine.tree import DraftTree, VerifyResult


@final
class RootDrafter:
    max_nodes = 1
    depth = scratch_rows = history = reread = 0
    cache = None
    loads = ()

    @property
    def prompts(self) -> "RootDrafter":
        """A PromptReader that reads nothing."""
        return self

    def keep(self, slots: Tensor, positions: Tensor, stops: Tensor, hidden: Tensor) -> Tensor:
        return hidden[0, :, :0]

    def outline(self, chunks: Sequence[Chunk]) -> list[tuple[int, ...]]:
        return []

    def nothing(self, slot: int, position: int) -> tuple[int, ...]:
        return ()

    def read(self, outline: Tensor, extent: Extent, tokens: Tensor, states: Tensor) -> None:
        pass

    def reload(self, extent: tuple[int, int]) -> None:
        pass

    def record(self, run: Callable[[int, int], None], slot: int) -> None:
        pass

    def attach(self, pages: Pages, behind: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def draft(self, batch: Batch) -> DraftTree:
        return DraftTree.root(batch.tokens)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        pass

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        return []

    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None:
        pass
