"""Growing a tree: the best candidates of a level and the nodes they become, in one launch (see kernels/arrival.py).

Twins: drafters.portable.TorchDraftOps.grow and finish, which are grow and finish of drafters.expand.
"""

from dataclasses import dataclass
from typing import final

import torch
import triton
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous
from mtp_engine.kernels.grow_kernels import candidates_kernel, shared_level_kernel
from mtp_engine.kernels.launch import pdl

_LONG = 65536  # draft vocabularies above this are split more coarsely
_SPLIT, _LONG_SPLIT = 512, 2048  # tokens per program of `candidates`; they decide how sums round, so only n may choose
_NOT_GROWING = {"cap": 0, "first": 0, "KEEP": 0, "GP": 1, "PRUNE": 0, "QP": 1, "DRAWN": False}  # sizes of no level
_WARPS, _LONG_WARPS = 1, 4  # of `candidates`; one warp needs no barriers between the rounds of a top-k


@final
@dataclass(frozen=True)
class Nodes:
    """A tree under construction in arrays of fixed size, of which expand.Growth shows the used part."""

    tokens: Tensor  # [B, cap] int64
    parents: Tensor  # [B, cap] int64
    depths: Tensor  # [B, cap] int64
    scores: Tensor  # [B, cap] fp32, log of the joint draft probability

    @classmethod
    def empty(cls, batch: int, cap: int, device: torch.device) -> "Nodes":
        tokens, parents, depths = torch.empty(3, batch, cap, dtype=torch.int64, device=device).unbind(0)
        return cls(tokens, parents, depths, torch.empty(batch, cap, dtype=torch.float32, device=device))


@final
@dataclass(frozen=True)
class Roots:
    """Where the first level finds its roots: request b's last committed token is last[slots[b]]."""

    slots: Tensor  # [B] int64
    last: Tensor  # [S] int64


@final
@dataclass(frozen=True)
class Finish:
    """What the last level does: prune to the `best` drafted nodes (0: keep all), say which requests have drafts."""

    best: int
    ready: Tensor  # [B] int64; requests where it is 0 cannot be drafted for and get their root only


@final
@dataclass(frozen=True)
class Finished:
    """The tree to verify: what expand.finish gives."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64
    depths: Tensor  # [B, N] int64
    scores: Tensor  # [B, N] fp32, log of the joint draft probability
    size: Tensor  # [B] int64


def candidates(
    logits: Tensor,
    positions: Tensor,
    ids: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    width: int,
    *,
    ahead: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, F, width] fp32 and tokens [B, F, width] int64 of the best candidates, best first; one launch.

    logits: [B, F, n] fp32 or bf16, last dimension contiguous; positions: [B] int64, with `ahead` those of the tokens;
    ids: [n] int64, the tokens scored; seed: [B] int64; temperature: [B] fp32; arrivals: [>= B * (F + 1)] int32 zeros;
    width: 1..min(16, n).
    The probabilities are softmax(logits / temperature + noise), at temperature 0 softmax(logits).
    """
    logp = torch.empty(*logits.shape[:2], width, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(logp.shape, dtype=torch.int64, device=logits.device)
    _launch_candidates(
        logits, positions, ids, seed, temperature, arrivals, ahead, logp, chosen, (None,) * 12, dict(_NOT_GROWING)
    )
    return logp, chosen


def draft_level(
    logits: Tensor,
    positions: Tensor,
    ids: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    nodes: Nodes,
    first: int,
    width: int,
    keep: int,
    *,
    ahead: int = 0,
    roots: Roots | None = None,
    finish: Finish | None = None,
    drawn: bool = False,
) -> Finished | None:
    """Add a level to `nodes`, and finish the tree where `finish` is given; one launch.

    drawn: candidates are ranked by noise of their own, see Candidates; positions are then the roots', without `ahead`. The
    inputs up to `width` are those of `candidates`, for the frontier: nodes first..first+F-1. Of its F * width <= 1024
    candidates the `keep` best by joint score become nodes first + F, ..., in index order, as in expand.grow. With
    `roots`, at first = 0, node 0 is written too. With `finish` the tree to verify comes back, as from expand.finish; no
    more than 256 drafted nodes can be pruned. Among equal scores the lower index comes first.
    """
    batch, frontier, _ = logits.shape
    logp = torch.empty(batch, frontier, width, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(logp.shape, dtype=torch.int64, device=logits.device)
    grow, rest, out = _growing(nodes, first, frontier, width, keep, roots, finish)
    grow["DRAWN"] = drawn
    _launch_candidates(logits, positions, ids, seed, temperature, arrivals, ahead, logp, chosen, rest, grow)
    return out


def own_best(
    logits: Tensor,
    positions: Tensor,
    ids: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    width: int,
    *,
    ahead: int = 0,
) -> Tensor:
    """What ranks that share the tokens tell each other of `candidates`, whose inputs these are: [B, F, width + 1] int64.
    The first half of `draft_level`; `shared_level` is the other."""
    chosen = torch.empty(*logits.shape[:2], width + 1, dtype=torch.int64, device=logits.device)
    _launch_candidates(
        logits, positions, ids, seed, temperature, arrivals, ahead, None, chosen, (None,) * 12, dict(_NOT_GROWING)
    )
    return chosen


def shared_level(
    shared: Tensor, arrivals: Tensor, nodes: Nodes, first: int, keep: int, *,
    roots: Roots | None = None, finish: Finish | None = None,
) -> Finished | None:  # fmt: skip
    """Add a level to `nodes` as `draft_level` does, of what all ranks found; among equal scores the lower token comes first.

    shared: [ranks, B, F, width + 1] int64, what `own_best` gave on each. arrivals: [>= B] int32 zeros."""
    (ranks, batch, frontier, width), device = shared.shape, shared.device
    width -= 1
    logp = torch.empty(batch, frontier, width, dtype=torch.float32, device=device)
    chosen = torch.empty(logp.shape, dtype=torch.int64, device=device)
    grow, rest, out = _growing(nodes, first, frontier, width, keep, roots, finish)
    check_contiguous(shared, arrivals)
    shared_level_kernel[(batch * frontier,)](
        shared, arrivals, logp, chosen, *rest, **grow, RANKS=ranks, RP=triton.next_power_of_2(ranks), F=frontier,
        WIDTH=width, WP=triton.next_power_of_2(width), CP=triton.next_power_of_2(ranks * width), PDL=pdl(),
        launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
    return out


def _growing(
    nodes: Nodes, first: int, frontier: int, width: int, keep: int, roots: Roots | None, finish: Finish | None
) -> tuple[dict[str, int], tuple[Tensor | None, ...], Finished | None]:
    """Of a level: sizes, where its nodes and the finished tree go, and that tree."""
    grow = {"cap": nodes.tokens.shape[1], "first": first, **_grow_sizes(nodes, first, frontier, width, keep)}
    grow |= {"PRUNE": 0, "QP": 1}
    count, out = first + frontier + grow["KEEP"] - 1, None
    ends: tuple[Tensor | None, ...] = (None,) * 6
    if finish is not None:
        grow |= _prune_sizes(count, finish)
        out = _finished(nodes, count, finish)
        ends = (out.tokens, out.parents, out.depths, out.scores, finish.ready, out.size)
    return grow, (*_arrays(nodes), *_roots(roots), *ends), out


def _launch_candidates(
    logits: Tensor,
    positions: Tensor,
    ids: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    ahead: int,
    logp: Tensor | None,
    chosen: Tensor,
    rest: tuple[Tensor | None, ...],
    grow: dict[str, int],
) -> None:
    batch, frontier, n = logits.shape
    width = chosen.shape[2] - (logp is None)
    assert 0 < width <= min(16, n)
    assert logits.stride(2) == 1
    assert arrivals.numel() >= batch * (frontier + 1)
    check_contiguous(positions, ids, seed, temperature, arrivals)
    split, warps = (_SPLIT, _WARPS) if n <= _LONG else (_LONG_SPLIT, _LONG_WARPS)
    splits = -(-n // split)
    partial = torch.empty(batch * frontier * splits * width, dtype=torch.int64, device=logits.device)
    sums = torch.empty(batch * frontier * splits * 2, dtype=torch.float32, device=logits.device)
    candidates_kernel[(splits, batch * frontier)](
        logits, positions, ids, seed, temperature, arrivals, partial, sums, logp, chosen, *rest, n, ahead,
        logits.stride(0), logits.stride(1), splits, **grow, F=frontier, WIDTH=width, WP=triton.next_power_of_2(width),
        SPLIT=split, SP=triton.next_power_of_2(splits), CP=triton.next_power_of_2(splits * width), PDL=pdl(),
        launch_pdl=pdl(), num_warps=warps,
    )  # fmt: skip


def _grow_sizes(nodes: Nodes, first: int, frontier: int, width: int, keep: int) -> dict[str, int]:
    assert frontier * width <= 1024
    keep = min(keep, frontier * width)
    assert first + frontier + keep <= nodes.tokens.shape[1]
    return {"KEEP": keep, "GP": triton.next_power_of_2(frontier * width)}


def _prune_sizes(count: int, finish: Finish) -> dict[str, int]:
    assert count <= 256
    return {"PRUNE": min(finish.best, count), "QP": max(16, triton.next_power_of_2(count))}


def _finished(nodes: Nodes, count: int, finish: Finish) -> Finished:
    size = torch.empty_like(finish.ready)
    if finish.best == 0:
        tokens, parents, depths, scores = (value[:, : count + 1] for value in _arrays(nodes))
        return Finished(tokens, parents, depths, scores, size)
    shape = (len(size), min(finish.best, count) + 1)
    tokens, parents, depths = (nodes.tokens.new_empty(shape) for _ in range(3))
    return Finished(tokens, parents, depths, nodes.scores.new_empty(shape), size)


def _arrays(nodes: Nodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return nodes.tokens, nodes.parents, nodes.depths, nodes.scores


def _roots(roots: Roots | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if roots is None else (roots.last, roots.slots)
