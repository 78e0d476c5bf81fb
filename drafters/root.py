"""No drafting: a tree of one node, which is plain decoding."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from mtp_engine.cache import Pages
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class RootDrafter:
    max_nodes = 1
    depth = scratch_rows = history = reread = 0
    cache = None

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
