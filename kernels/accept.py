"""Choosing a token at every node with keyed noise and walking down the tree, in one launch (see kernels/arrival.py).

Twins: sampler.choose and verifiers.match.longest_match.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import (
    LARGEST,
    arrives_last,
    check_contiguous,
    gumbel_of,
    noise_key,
    pack,
    rank_of,
    unpack_index,
)
from mtp_engine.kernels.launch import pdl

_TILE, _TILE_WARPS = 1024, 4  # tokens that a program of `choose` looks at together, and its warps
_PROGRAMS = 528  # what `choose` aims at: four per multiprocessor of an H100
_PARTIALS = 4096  # partial results that one program can take in


@triton.jit
def _read_tree(b, node, tokens, parents, depths, size, N: tl.constexpr):
    """Which nodes are real, their tokens, parents and depths: [NP] each, 0 at padding, and at the root's parent."""
    mask, here = node < N, b * N + node
    token = tl.load(tokens + here, mask=mask, other=0).to(tl.int32)
    parent = tl.load(parents + here, mask=mask, other=0).to(tl.int32)
    depth = tl.load(depths + here, mask=mask, other=0).to(tl.int32)
    real = node < tl.load(size + b)
    return real, token, tl.where(real, tl.maximum(parent, 0), 0), tl.where(real, depth, 0)


@triton.jit
def _walk(
    b, chosen, node, real, token, up, depth, path, out, counts,
    NP: tl.constexpr, DEPTH: tl.constexpr, DP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """verifiers.match.longest_match for request b. chosen, node, ..., depth: [NP], from `_read_tree`."""
    alive = (real & ((node == 0) | (tl.gather(chosen, up, 0) == token))).to(tl.int32)
    for _ in tl.static_range(STEPS):  # each round looks twice as far up
        alive = alive & tl.gather(alive, up, 0)
        up = tl.gather(up, up, 0)
    tip = tl.max(alive * (depth * NP + node), 0)  # siblings differ, so there is one node per depth
    accepted, tip = tip // NP, tip % NP
    final_token = tl.sum(tl.where(node == tip, chosen, 0), 0)
    path, out = path + b * (DEPTH + 1), out + b * (DEPTH + 1)
    tl.store(path + depth, node, mask=alive > 0)
    tl.store(out + depth, chosen, mask=alive > 0)
    rest = tl.arange(0, DP)
    past = (rest > accepted) & (rest <= DEPTH)
    tl.store(path + rest, tip + tl.zeros_like(rest), mask=past)
    tl.store(out + rest, final_token + tl.zeros_like(rest), mask=past)
    tl.store(counts + b, accepted + 1)


@triton.jit
def _choose_kernel(
    logits, positions, seed, temperature, floors, partial, arrivals, choices,
    tokens, parents, depths, size, path, out, counts, vocab, own, ahead, stride_b, stride_n, splits,
    BY_DEPTH: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SPAN: tl.constexpr,
    SP: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, DP: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, node, request): the best token of SPAN; the last of a request: its choices, or its walk. own: the
    logits' first token. PACKED: choices are stored with their scores."""
    split, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat = tl.load(temperature + b)
    if BY_DEPTH:
        position = tl.load(positions + b) + tl.load(depths + b * N + n)
    else:
        position = tl.load(positions + b * N + n)
    first, second = noise_key(tl.load(seed + b), position + ahead)
    row = logits + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
    lane = tl.arange(0, BLOCK)
    if floors is not None:
        floor = tl.load(floors + b * N + n)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = split * SPAN + lane
    for start in range(0, SPAN, BLOCK):
        token = split * SPAN + start + lane
        x = tl.load(row + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        if floors is not None:
            x = tl.where(x < floor, -float("inf"), x)
        if heat > 0:
            x = tl.fma(gumbel_of(first, second, (own + token).to(tl.uint32)), heat, x)
        at = tl.where(x > best, token, at)
        best = tl.maximum(x, best)
    rank = rank_of(best)
    top = tl.max(rank, 0)
    tl.store(
        partial + (b * N + n) * splits + split, pack(top, own + tl.min(tl.where(rank == top, at, LARGEST - own), 0))
    )
    node, part = tl.arange(0, NP), tl.arange(0, SP)
    if tokens is not None:  # read now, while nothing depends on it
        real, token, up, depth = _read_tree(b, node, tokens, parents, depths, size, N)
    if arrives_last(arrivals + b, N * splits):
        where = partial + (b * N + node)[:, None] * splits + part[None, :]
        mask = (node < N)[:, None] & (part < splits)[None, :]
        best_of = tl.max(tl.load(where, mask=mask, other=-(1 << 63), cache_modifier=".cg"), 1)
        chosen = unpack_index(best_of)
        if tokens is None:
            tl.store(choices + b * N + node, best_of if PACKED else chosen, mask=node < N)
        else:
            _walk(b, chosen, node, real, token, up, depth, path, out, counts, NP, DEPTH, DP, STEPS)


@triton.jit
def _accept_kernel(
    choices, tokens, parents, depths, size, path, out, counts, B,
    RANKS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DEPTH: tl.constexpr, DP: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, node = tl.program_id(0), tl.arange(0, NP)
    real, token, up, depth = _read_tree(b, node, tokens, parents, depths, size, N)
    if RANKS:
        best = tl.load(choices + b * N + node, mask=node < N, other=0)
        for r in tl.static_range(1, RANKS):
            best = tl.maximum(best, tl.load(choices + (r * B + b) * N + node, mask=node < N, other=0))
        chosen = unpack_index(best)
    else:
        chosen = tl.load(choices + b * N + node, mask=node < N, other=0).to(tl.int32)
    _walk(b, chosen, node, real, token, up, depth, path, out, counts, NP, DEPTH, DP, STEPS)


class Tree(Protocol):
    """What is read of a tree.DraftTree."""

    @property
    def tokens(self) -> Tensor: ...  # [B, N] int64
    @property
    def parents(self) -> Tensor: ...  # [B, N] int64
    @property
    def depths(self) -> Tensor: ...  # [B, N] int64
    @property
    def size(self) -> Tensor: ...  # [B] int64
    @property
    def max_depth(self) -> int: ...


def choose(
    logits: Tensor, positions: Tensor, seed: Tensor, temperature: Tensor, arrivals: Tensor, *, ahead: int = 0
) -> Tensor:
    """argmax(logits + temperature * gumbel(seed, positions + ahead, token)) over the tokens, [B, N] int64; one launch.

    logits: [B, N, V] fp32 or bf16, last dimension contiguous; positions: [B, N] int64, with `ahead` those of the tokens
    being chosen; seed: [B] int64; temperature: [B] fp32; arrivals: [>= B] int32 zeros. The noise is never stored.
    """
    choices = torch.empty_like(positions)
    _launch_choose(logits, positions, seed, temperature, arrivals, ahead, None, choices, None)
    return choices


def best(
    logits: Tensor, lengths: Tensor, seed: Tensor, temperature: Tensor, arrivals: Tensor, tree: Tree, own: int
) -> Tensor:
    """Of every node the best of some tokens and its score as one number, [B, N] int64, larger for a better score and for the
    lower of equal tokens: what ranks that share the tokens exchange. The first half of `verify`; `accept_best` is the other.

    logits: [B, N, v] of the tokens own..own + v - 1; lengths: [B] int64, positions of the roots.
    """
    choices = torch.empty_like(tree.depths)
    _launch_choose(logits, lengths, seed, temperature, arrivals, 1, None, choices, None, own=own, depths=tree.depths)
    return choices


def verify(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    tree: Tree,
    *,
    ahead: int = 0,
    floors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose`, then `accept`, in one launch.

    positions: as for `choose`, or those of the roots, [B]; the nodes' are then their depths further on. floors: [B, N] fp32,
    logits below which no token may be chosen.
    """
    kept = _outputs(tree)
    _launch_choose(logits, positions, seed, temperature, arrivals, ahead, floors, None, (tree, kept))
    return kept


def accept(tree: Tree, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The path [B, D+1], tokens [B, D+1] and counts [B] of verifiers.match.longest_match; one launch.

    choices: [B, N] int64.
    """
    return _accept(tree, choices, 0)


def accept_best(tree: Tree, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`accept` of the best of what all ranks found. choices: [ranks, B, N] int64, from `best`."""
    return _accept(tree, choices, len(choices))


def _accept(tree: Tree, choices: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, nodes = tree.tokens.shape
    kept = _outputs(tree)
    check_contiguous(choices, tree.tokens, tree.parents, tree.depths, tree.size)
    _accept_kernel[(batch,)](
        choices, tree.tokens, tree.parents, tree.depths, tree.size, *kept, batch, RANKS=ranks, **_walk_sizes(tree), N=nodes,
        NP=_padded(nodes), PDL=pdl(), launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
    return kept


def _launch_choose(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    arrivals: Tensor,
    ahead: int,
    floors: Tensor | None,
    choices: Tensor | None,
    walk: tuple[Tree, tuple[Tensor, Tensor, Tensor]] | None,
    own: int = 0,
    depths: Tensor | None = None,
) -> None:
    """depths: of nodes whose choices are packed, see `best`."""
    batch, nodes, vocab = logits.shape
    by_depth = positions.dim() == 1
    assert positions.shape == ((batch,) if by_depth else (batch, nodes))
    assert logits.stride(2) == 1
    check_contiguous(positions, seed, temperature, arrivals)
    padded = _padded(nodes)
    # a maximum does not depend on where the vocabulary is split, so this may depend on anything
    splits = min(_PARTIALS // padded, -(-_PROGRAMS // (batch * nodes)))
    span = _TILE * -(-vocab // (_TILE * splits))
    splits = -(-vocab // span)
    partial = torch.empty(batch * nodes * splits, dtype=torch.int64, device=logits.device)
    tree: tuple[Tensor | None, ...] = (None, None, depths, None, None, None, None)
    sizes = {"DEPTH": 0, "DP": 1, "STEPS": 0}
    if walk is not None:
        tree = (walk[0].tokens, walk[0].parents, walk[0].depths, walk[0].size, *walk[1])
        sizes = _walk_sizes(walk[0])
    _choose_kernel[(splits, nodes, batch)](
        logits, positions, seed, temperature, floors, partial, arrivals, choices, *tree, vocab, own, ahead,
        logits.stride(0), logits.stride(1), splits, **sizes, BY_DEPTH=by_depth, PACKED=depths is not None,
        N=nodes, NP=padded, SPAN=span,
        SP=triton.next_power_of_2(splits), BLOCK=_TILE, PDL=pdl(), launch_pdl=pdl(), num_warps=_TILE_WARPS,
    )  # fmt: skip


def _padded(nodes: int) -> int:
    return max(16, triton.next_power_of_2(nodes))


def _walk_sizes(tree: Tree) -> dict[str, int]:
    depth = tree.max_depth
    return {"DEPTH": depth, "DP": triton.next_power_of_2(depth + 1), "STEPS": depth.bit_length()}


def _outputs(tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
    path = tree.tokens.new_empty(tree.tokens.shape[0], tree.max_depth + 1)
    return path, torch.empty_like(path), torch.empty_like(tree.size)
