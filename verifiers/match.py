"""The default rule: sample the main model at every node, keep what the drafter guessed.

The choices are those of plain decoding with the same seed (see `mtp_engine.sampling.sampler`), so the emitted tokens are too,
whatever the tree. A greedy tree check is the case temperature = 0.
"""

from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.cpu.calls import CVerify, Team
from mtp_engine.parallel.group import Group
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.sampler import choose, choose_scores, truncate
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers.distributions import deepest, path_to


@final
class MatchVerifier:
    picks = True

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. Keeps the path on which every draft equals the choice at its parent."""
        choices = choose(logits, tree.depths, tree.max_depth, batch.lengths, batch.sampling)
        return longest_match(tree, choices)


@final
class DeviceMatchVerifier:
    """MatchVerifier in one launch; the noise is never stored."""

    picks = True

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self.arrivals = torch.zeros(max_batch, dtype=torch.int32, device=device)

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        from mtp_engine.kernels.accept import verify
        from mtp_engine.kernels.floors import floors

        given = batch.sampling
        least = floors(logits, given.temperature, given.top_k, given.top_p, given.min_p) if given.truncated else None
        return VerifyResult(
            *verify(
                logits, batch.lengths, given.seed, given.temperature, self.arrivals, tree, ahead=1, floors=least
            )
        )  # fmt: skip


@final
class NativeMatchVerifier:
    """MatchVerifier in one call of the CPU's library; the noise is never stored."""

    picks = True

    def __init__(self, team: Team) -> None:
        self._team = team

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        sampling, shape = batch.sampling, (len(logits), tree.max_depth + 1)
        path, emitted = torch.empty(2, *shape, dtype=torch.int64).unbind(0)
        counts = torch.empty_like(tree.size)
        given = [
            table.contiguous()
            for table in (
                truncate(logits, sampling), batch.lengths, sampling.seed, sampling.temperature, tree.tokens, tree.parents,
                tree.depths, tree.size,
            )
        ]  # fmt: skip
        addresses = (table.data_ptr() for table in (*given, path, emitted, counts))
        self._team.verify(CVerify(*addresses, len(logits), tree.nodes, logits.shape[-1], tree.max_depth))
        return VerifyResult(path, emitted, counts)


@final
class ShardedMatchVerifier:
    """MatchVerifier where ranks share the vocabulary: they exchange one number per node. What is truncated, or has been
    processed, must be whole (see SamplingBatch.bare)."""

    picks = True

    def __init__(self, group: Group) -> None:
        self._group, self._whole = group, MatchVerifier()

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V / ranks] fp32 of this rank's tokens in a bare batch, else [B, N, V]."""
        if not batch.sampling.bare:
            return self._whole.verify(tree, logits, batch)
        first = self._group.shard.rank * logits.shape[-1]
        scores = choose_scores(logits, tree.depths, tree.max_depth, batch.lengths, batch.sampling, first)
        own = scores.argmax(-1, keepdim=True)
        _, tokens = self._group.best(scores.gather(-1, own), own + first)
        return longest_match(tree, tokens[..., 0])


@final
class DeviceShardedMatchVerifier:
    """ShardedMatchVerifier in three launches."""

    picks = True

    def __init__(self, group: Group, max_batch: int, device: torch.device) -> None:
        self._group, self._whole = group, DeviceMatchVerifier(max_batch, device)

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """See ShardedMatchVerifier."""
        from mtp_engine.kernels.accept import accept_best, best

        sampling = batch.sampling
        if not sampling.bare:
            return self._whole.verify(tree, logits, batch)
        own = self._group.shard.rank * logits.shape[-1]
        found = best(logits, batch.lengths, sampling.seed, sampling.temperature, self._whole.arrivals, tree, own)
        return VerifyResult(*accept_best(tree, self._group.gather(found)))


def longest_match(tree: DraftTree, choices: Tensor) -> VerifyResult:
    """Follow `choices` [B, N] down from the root. Siblings hold different tokens, so at most one child matches."""
    guessed = choices.gather(1, tree.parents.clamp(min=0)) == tree.tokens
    path = path_to(tree, deepest(tree, guessed))
    return VerifyResult(path, choices.gather(1, path), tree.depths.gather(1, path[:, -1:])[:, 0] + 1)
