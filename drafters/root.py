"""No drafting: a tree of one node, which is plain decoding."""

from typing import final

from torch import Tensor

from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class RootDrafter:
    max_nodes = 1
    history = 0

    def reserve(self, slot: int, tokens: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def prefill(self, slot: int, tokens: Tensor, hidden: Tensor) -> None:
        pass

    def draft(self, batch: Batch) -> DraftTree:
        return DraftTree.root(batch.tokens)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        pass
