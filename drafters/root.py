"""No drafting: a tree of one node, which is plain decoding."""

from typing import final

from torch import Tensor

from mtp_engine.cache import NO_LIMIT
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class RootDrafter:
    max_nodes = 1
    room = NO_LIMIT

    def reserve(self, slot: int, tokens: int) -> bool:
        return True

    def release(self, slot: int) -> None:
        pass

    def draft(self, batch: Batch) -> DraftTree:
        return DraftTree.root(batch.tokens)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        pass
