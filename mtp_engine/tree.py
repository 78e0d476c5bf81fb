"""The two values of a step: the tree a drafter proposes, and the path a verifier keeps."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor


def ancestor_mask(parents: Tensor, size: Tensor, max_depth: int) -> Tensor:
    """mask[b, i, j] is True where node j is node i or an ancestor of it; padding nodes see only themselves.

    parents: [B, N] int64, parents[:, 0] = -1; size: [B] int64. Returns [B, N, N] bool.
    """
    batch, nodes = parents.shape
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    real = torch.arange(nodes, device=parents.device) < size[:, None]
    ancestor = torch.where(real, parents, -1)
    for _ in range(max_depth):
        mask.scatter_(
            2,
            ancestor.clamp(min=0)[..., None],
            (ancestor >= 0)[..., None] | mask.gather(2, ancestor.clamp(min=0)[..., None]),
        )
        ancestor = torch.where(ancestor > 0, parents.gather(1, ancestor.clamp(min=0)), -1)
    return mask


@final
@dataclass(frozen=True)
class DraftTree:
    """Candidate continuations of every request in the batch.

    Node 0 is the request's last committed token, whose KV is not written yet. A parent's index is smaller than its
    children's, and siblings hold different tokens. Requests with fewer than N nodes are padded at the end.
    """

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, -1 for node 0
    depths: Tensor  # [B, N] int64, 0 for node 0
    size: Tensor  # [B] int64, nodes in use
    max_depth: int  # no node lies deeper; known on the host
    scores: Tensor | None = None  # [B, N] fp32, log of the joint draft probability; rises towards the root
    draft: Tensor | None = None  # [B, N, V] fp32, q: the distribution each node's children were drawn from without
    # replacement, in index order; zero where they were not drawn but given; None = zero everywhere

    straight: bool = False  # a chain in every request: each real node's parent is the node before it

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.parents.shape == self.depths.shape, "tokens, parents and depths must agree"
        assert self.size.shape == self.tokens.shape[:1], "one size per request"

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def real(self) -> Tensor:
        """[B, N] bool: False for padding."""
        return torch.arange(self.nodes, device=self.size.device) < self.size[:, None]

    @cached_property
    def ancestors(self) -> Tensor:
        """[B, N, N] bool, see `ancestor_mask`."""
        return ancestor_mask(self.parents, self.size, self.max_depth)

    def forced(self, chains: Tensor) -> "DraftTree":
        """With a chain in place of a request's tree where there is one. chains: [B, 1 + K] int64, the number of tokens, at most
        N - 1 and max_depth, and the tokens. 0: the tree stays."""
        count, node = chains[:, :1], torch.arange(self.nodes, device=chains.device)
        on = count > 0
        place = (1 + node.sub(1).clamp(min=0)).clamp(max=chains.shape[1] - 1).expand_as(self.tokens)
        tokens = torch.where(on & (node > 0) & (node <= count), chains.gather(1, place), self.tokens)
        parents = torch.where(on, node - 1, self.parents)
        depths = torch.where(on, node.clamp(max=self.max_depth), self.depths)
        size = torch.where(on[:, 0], count[:, 0] + 1, self.size)
        return replace(self, tokens=tokens, parents=parents, depths=depths, size=size)

    @classmethod
    def root(cls, tokens: Tensor) -> "DraftTree":
        """The one-node tree of plain decoding. tokens: [B] int64."""
        zeros = torch.zeros_like(tokens)[:, None]
        return cls(tokens[:, None], zeros - 1, zeros, torch.ones_like(tokens), 0, straight=True)

    @classmethod
    def chain(cls, tokens: Tensor, size: Tensor) -> "DraftTree":
        """A path per request. tokens: [B, N] int64 with the last committed token first; size: [B] int64."""
        depths = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)  # kernels want it whole
        return cls(tokens, depths - 1, depths, size, tokens.shape[1] - 1, straight=True)


@final
@dataclass(frozen=True)
class VerifyResult:
    """What one step keeps: `counts` nodes of `path`, and as many tokens to emit.

    The kept nodes are the root and the accepted drafts; the tokens are the accepted drafts and one from the main
    model. So path[b, i] is the node whose hidden state led to tokens[b, i].
    """

    path: Tensor  # [B, D+1] int64 node indices, path[:, 0] = 0; entries from counts on repeat the last kept node
    tokens: Tensor  # [B, D+1] int64; entries from counts on are meaningless
    counts: Tensor  # [B] int64, at least 1

    def gather(self, values: Tensor) -> Tensor:
        """values: [B, N, H] per node -> [B, D+1, H] along the path."""
        return values.gather(1, self.path[..., None].expand(-1, -1, values.shape[2]))
