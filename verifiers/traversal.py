"""Traversal verification: from the leaves to the root, each node is judged with the whole path that leads to it.

Weng et al., "Traversal verification for speculative tree decoding", 2505.12398, algorithm 1. On a chain it is block
verification.
"""

from typing import final

import torch
from torch import Tensor

from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers.distributions import (
    Noise,
    candidate_distribution,
    draft_distribution,
    keep,
    row,
    target_distribution,
)


@final
class TraversalVerifier:
    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. Nodes are tried children first; a rejected one leaves a residual at its parent."""
        p, noise = target_distribution(logits, batch.sampling).clone(), Noise.of(tree, batch)
        q = draft_distribution(tree, p).clone()
        each = torch.arange(len(tree.size), device=p.device)
        trust = _descend(tree, p, q, torch.ones_like(noise.accept), torch.zeros_like(tree.size))
        node, done = _leaf(tree, torch.zeros_like(tree.size)), torch.zeros_like(tree.size, dtype=torch.bool)
        for _ in range(tree.nodes):
            done = done | (noise.accept[each, node] < trust[each, node]) | (node == 0)
            parent, token = tree.parents[each, node].clamp(min=0), tree.tokens[each, node]
            drawn = candidate_distribution(q[each, parent], token)
            over = (trust[each, parent, None] * p[each, parent] - drawn).clamp(min=0)
            mass = over.sum(-1)
            chance = mass / (mass + 1 - trust[each, parent]).clamp(min=1e-30)
            chance = torch.where(parent == 0, 1.0, chance)  # the root is committed
            residual = torch.where(mass[:, None] > 0, over / mass[:, None].clamp(min=1e-30), p[each, parent])
            p[each, parent] = torch.where(done[:, None], p[each, parent], residual)
            q[each, parent, token] = torch.where(done, q[each, parent, token], 0.0)
            trust[each, parent] = torch.where(done, trust[each, parent], chance)
            trust = _descend(tree, p, q, trust, parent)
            node = torch.where(done, node, _next(tree, node, parent))
        return keep(tree, node, noise.draw(row(p, node)))


def _descend(tree: DraftTree, p: Tensor, q: Tensor, trust: Tensor, top: Tensor) -> Tensor:
    """Trust [B, N] of all nodes below `top` [B] from that of `top`: times p / q along the path, never above 1."""
    each = torch.arange(len(top), device=top.device)
    parents = tree.parents.clamp(min=0)
    drawn, mass = q[each[:, None], parents, tree.tokens], q.sum(-1).gather(1, parents)
    drawn = torch.where(mass > 0, drawn / mass.clamp(min=1e-30), 1.0)  # a given candidate was certain
    ratio = p[each[:, None], parents, tree.tokens] / drawn.clamp(min=1e-30)
    below = tree.ancestors[each, :, top].scatter(1, top[:, None], False)
    for _ in range(tree.max_depth):
        trust = torch.where(below, (trust.gather(1, parents) * ratio).clamp(max=1), trust)
    return trust


def _leaf(tree: DraftTree, node: Tensor) -> Tensor:
    """From `node` [B] to its first child, and so on down to a leaf."""
    index = torch.arange(tree.nodes, device=node.device)
    for _ in range(tree.max_depth):
        child = torch.where((tree.parents == node[:, None]) & tree.real, index, tree.nodes).amin(1)
        node = torch.where(child < tree.nodes, child, node)
    return node


def _next(tree: DraftTree, node: Tensor, parent: Tensor) -> Tensor:
    """The node to try after `node` was rejected: the first leaf below its next sibling, or else its parent."""
    index = torch.arange(tree.nodes, device=node.device)
    after = (tree.parents == parent[:, None]) & tree.real & (index > node[:, None])
    sibling = torch.where(after, index, tree.nodes).amin(1)
    return torch.where(sibling < tree.nodes, _leaf(tree, sibling.clamp(max=tree.nodes - 1)), parent)
