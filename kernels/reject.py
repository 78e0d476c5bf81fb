"""Recursive rejection over a tree in one launch: a program walks down one request's tree (see kernels/arrival.py).

Twins: verifiers.rrs.RRSVerifier, and on chains verifiers.rejection.RejectionVerifier. What is left of the main model's
distribution after some rejections is never stored: it is worked out again, token by token, from the logits, what the
candidates were drawn from, and three numbers for every candidate that was rejected here (`taken`, `masses`, `sums`).
`drawn_rows` stores that distribution when candidates are drawn; twin: drafters.candidates.Candidates.distribution.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.accept import Tree
from mtp_engine.kernels.arrival import (
    LARGEST,
    check_contiguous,
    gumbel_of,
    noise_bits,
    noise_key,
    step_key,
    unit_of,
)
from mtp_engine.kernels.launch import pdl

_TILE, _WARPS = 8192, 32  # tokens that a program looks at together
_ACCEPT, _DRAW = tl.constexpr(101), tl.constexpr(102)  # as in verifiers.distributions


@triton.jit
def _logits(row, token, vocab, floor):
    x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
    return tl.where(x < floor, -float("inf"), x)


@triton.jit
def _drawn_from(rows, token, vocab):
    """Without a distribution everything was given."""
    if rows is None:
        q = token * 0.0
    else:
        q = tl.load(rows + token, mask=token < vocab, other=0.0)
    return q


@triton.jit
def _draw(q, token, chosen, mass):
    """distributions.candidate_distribution at `token`, of the candidate `chosen`."""
    return tl.where(mass > 0, q / tl.maximum(mass, 1e-30), (token == chosen).to(tl.float32))


@triton.jit
def _left(x, q, token, heat, top, total, best, tries, taken, masses, sums):
    """What is left of the main model's probability of `token` after so many rejections, and of what the next is drawn from."""
    p = tl.where(heat > 0, tl.exp(x / tl.maximum(heat, 1e-6) - top) / total, (token == best).to(tl.float32))
    for i in range(tries):
        chosen, scale = tl.load(taken + i), tl.load(sums + i)
        over = tl.maximum(p - _draw(q, token, chosen, tl.load(masses + i)), 0.0)
        p = tl.where(scale > 0, over / tl.where(scale > 0, scale, 1.0), p)
        q = tl.where(token == chosen, 0.0, q)
    return p, q


@triton.jit
def _enter(row, rows, vocab, floor, heat, TILE: tl.constexpr):
    """Of a node: the largest logit over the temperature, the sum of exponentials over it, the best token, and the mass of
    what its children were drawn from."""
    lane, cold = tl.arange(0, TILE), tl.maximum(heat, 1e-6)
    high, at = tl.full([TILE], -float("inf"), tl.float32), tl.arange(0, TILE)
    total, mass = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        token = start + lane
        x = _logits(row, token, vocab, floor)
        new = tl.maximum(high, x)
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp((high - base) / cold) + tl.exp((x - base) / cold)
        at = tl.where(x > high, token, at)
        high = new
        mass += _drawn_from(rows, token, vocab)
    top = tl.max(high, 0)
    best = tl.min(tl.where(high == top, at, LARGEST), 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(total * tl.exp((high - top) / cold), 0)
    return top / cold, tl.where(total > 0, total, 1.0), best, tl.sum(mass, 0)  # nothing may follow: probabilities are 0


@triton.jit
def _refuse(
    row, rows, vocab, floor, heat, top, total, best, tries, taken, masses, sums, chosen, mass, TILE: tl.constexpr
):
    """A candidate is rejected: what is left has this sum before it is scaled, and the next one is drawn from that mass."""
    scale, rest = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        token = start + tl.arange(0, TILE)
        x, q = _logits(row, token, vocab, floor), _drawn_from(rows, token, vocab)
        p, q = _left(x, q, token, heat, top, total, best, tries, taken, masses, sums)
        scale += tl.maximum(p - _draw(q, token, chosen, mass), 0.0)
        rest += tl.where(token == chosen, 0.0, q)
    return tl.sum(scale, 0), tl.sum(rest, 0)


@triton.jit
def _final(row, rows, vocab, floor, heat, top, total, best, tries, taken, masses, sums, low, high, TILE: tl.constexpr):
    """A token by what is left, with the noise of a key: distributions.Noise.draw."""
    lane = tl.arange(0, TILE)
    most, at = tl.full([TILE], -float("inf"), tl.float32), lane
    for start in range(0, vocab, TILE):
        token = start + lane
        x, q = _logits(row, token, vocab, floor), _drawn_from(rows, token, vocab)
        p, _ = _left(x, q, token, heat, top, total, best, tries, taken, masses, sums)
        score = tl.log(tl.where(p > 0, p, 1.0)) + gumbel_of(low, high, token.to(tl.uint32))
        score = tl.where(p > 0, score, -float("inf"))
        at = tl.where(score > most, token, at)
        most = tl.maximum(score, most)
    return tl.min(tl.where(most == tl.max(most, 0), at, LARGEST), 0)


@triton.jit
def _keep(b, last, token, tokens, parents, depths, path, out, counts, N, DEPTH: tl.constexpr, DP: tl.constexpr):
    """distributions.keep."""
    depth = tl.load(depths + b * N + last)
    rest = tl.arange(0, DP)
    past = (rest >= depth) & (rest <= DEPTH)
    path, out = path + b * (DEPTH + 1), out + b * (DEPTH + 1)
    tl.store(path + rest, last + tl.zeros_like(rest), mask=past)
    tl.store(out + rest, tl.where(rest == depth, token, tl.load(tokens + b * N + last)), mask=past)
    tl.store(counts + b, depth + 1)
    node = last
    for back in range(depth):
        tl.store(out + depth - 1 - back, tl.load(tokens + b * N + node))
        node = tl.load(parents + b * N + node)
        tl.store(path + depth - 1 - back, node)


@triton.jit
def _recursive_kernel(
    logits, draft, floors, lengths, seed, temperature, tokens, parents, depths, size, taken, masses, sums, path, out,
    counts, vocab, stride_b, stride_n, N, DEPTH: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: request."""
    b = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat, real, length = tl.load(temperature + b), tl.load(size + b), tl.load(lengths + b)
    taken, masses, sums = taken + b * N, masses + b * N, sums + b * N
    low, high = noise_key(step_key(tl.load(seed + b), length, _ACCEPT), length * 0)
    row, rows, floor = logits + b * stride_b, draft, heat * 0.0 - float("inf")
    if draft is not None:
        rows = draft + b * N * vocab
    if floors is not None:
        floor = tl.load(floors + b * N)
    top, total, best, mass = _enter(row, rows, vocab, floor, heat, TILE)
    last, tries = b * 0, 0
    for node in range(1, N):
        if (tl.load(parents + b * N + node) == last) & (node < real):
            token = tl.load(tokens + b * N + node)
            x, q = _logits(row, token, vocab, floor), _drawn_from(rows, token, vocab)
            p, q = _left(x, q, token, heat, top, total, best, tries, taken, masses, sums)
            low, high = noise_key(step_key(tl.load(seed + b), length, _ACCEPT), length * 0 + node)
            if unit_of(noise_bits(low, high, (length * 0).to(tl.uint32))) * _draw(q, token, token, mass) < p:
                last, tries = b * 0 + node, 0
                row = logits + b * stride_b + last * stride_n
                if draft is not None:
                    rows = draft + (b * N + last) * vocab
                if floors is not None:
                    floor = tl.load(floors + b * N + last)
                top, total, best, mass = _enter(row, rows, vocab, floor, heat, TILE)
            else:
                scale, rest = _refuse(
                    row, rows, vocab, floor, heat, top, total, best, tries, taken, masses, sums, token, mass, TILE
                )
                tl.store(taken + tries, token)
                tl.store(masses + tries, mass)
                tl.store(sums + tries, scale)
                tl.debug_barrier()  # all threads read them from now on
                mass, tries = rest, tries + 1
    low, high = noise_key(step_key(tl.load(seed + b), length, _DRAW), length * 0)
    token = _final(
        row, rows, vocab, floor, heat, top, total, best, tries, taken, masses, sums, low, high, TILE
    )  # fmt: skip
    _keep(b, last, token, tokens, parents, depths, path, out, counts, N, DEPTH, DP)


@triton.jit
def _drawn_kernel(
    logits, ids, temperature, out, n, stride_b, stride_f, F, out_b, out_n, first, TILE: tl.constexpr, PDL: tl.constexpr
):
    """Program: node of the frontier, of all requests."""
    b, f = (tl.program_id(0) // F).to(tl.int64), (tl.program_id(0) % F).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat = tl.load(temperature + b)
    row, out = logits + b * stride_b + f * stride_f, out + b * out_b + (first + f) * out_n
    if heat > 0:
        top, total, _, _ = _enter(row, None, n, -float("inf"), heat, TILE)
        for start in range(0, n, TILE):
            index = start + tl.arange(0, TILE)
            x = tl.load(row + index, mask=index < n, other=0.0)
            token = tl.load(ids + index, mask=index < n, other=0)
            tl.store(out + token, tl.exp(x / tl.maximum(heat, 1e-6) - top) / total, mask=index < n)


def recursive(
    logits: Tensor, lengths: Tensor, seed: Tensor, temperature: Tensor, tree: Tree, draft: Tensor | None,
    floors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The path [B, D+1], tokens [B, D+1] and counts [B] that recursive rejection keeps; one launch.

    logits: [B, N, V] fp32, last dimension contiguous; lengths, seed: [B] int64; temperature: [B] fp32; draft: DraftTree.draft;
    floors: [B, N] fp32, logits below which no token may be chosen.
    """
    batch, nodes, vocab = logits.shape
    assert logits.stride(2) == 1
    check_contiguous(lengths, seed, temperature, tree.tokens, tree.parents, tree.depths, tree.size)
    assert draft is None or (draft.is_contiguous() and draft.shape == logits.shape)
    path = tree.tokens.new_empty(batch, tree.max_depth + 1)
    out, counts = torch.empty_like(path), torch.empty_like(tree.size)
    taken = torch.empty_like(tree.tokens)
    masses, sums = torch.empty(2, batch, nodes, dtype=torch.float32, device=logits.device).unbind(0)
    _recursive_kernel[(batch,)](
        logits, draft, floors, lengths, seed, temperature, tree.tokens, tree.parents, tree.depths, tree.size, taken, masses,
        sums, path, out, counts, vocab, logits.stride(0), logits.stride(1), nodes, DEPTH=tree.max_depth,
        DP=triton.next_power_of_2(tree.max_depth + 1), TILE=_TILE, PDL=pdl(), launch_pdl=pdl(), num_warps=_WARPS,
    )  # fmt: skip
    return path, out, counts


def drawn_rows(logits: Tensor, ids: Tensor, temperature: Tensor, out: Tensor, first: int) -> None:
    """The softmax of logits [B, F, n] fp32 over the temperature [B] into out[:, first : first + F], [B, N, V] fp32, at the
    tokens ids [n] int64; the rest, and the rows of requests at temperature 0, stay as they are. One launch."""
    batch, frontier, n = logits.shape
    assert logits.stride(2) == out.stride(2) == 1
    assert first + frontier <= out.shape[1]
    check_contiguous(ids, temperature)
    _drawn_kernel[(batch * frontier,)](
        logits, ids, temperature, out, n, logits.stride(0), logits.stride(1), frontier, out.stride(0), out.stride(1), first,
        TILE=_TILE, PDL=pdl(), launch_pdl=pdl(), num_warps=_WARPS,
    )  # fmt: skip
