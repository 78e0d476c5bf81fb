"""What requests want done to their logits, at every node of a tree, and what they have said by then: a launch each.

Twin: sampling.processors.Processors without kernels. What a request does not want costs it a copy of its logits; which
kinds it wants is a number per slot, so that one launch, and one CUDA graph, serves any batch.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.accept import Tree
from mtp_engine.kernels.arrival import check_contiguous
from mtp_engine.kernels.launch import pdl

_BIAS, _PENALTIES, _EARLY, _WORDS = (tl.constexpr(1 << bit) for bit in range(4))  # as in sampling.batch
_FORBIDDEN = tl.constexpr(-1e4)  # as in drafters.candidates
_TILE = 1024  # tokens of a program


@triton.jit
def _process_kernel(
    logits, out, slots, lengths, tokens, parents, depths, mask, masked, wanted, prompt_length, min_tokens, penalties,
    bias, counts, prompt, early, words, recent, vocab, N, mask_b, mask_n, W: tl.constexpr, L: tl.constexpr,
    WP: tl.constexpr, LP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, node, request)."""
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, depth = tl.load(slots + b), tl.load(depths + b * N + n)
    kinds, here, row = tl.load(wanted + slot), slot * vocab + token, (b * N + n) * vocab
    x = tl.load(logits + row + token, mask=inside, other=-float("inf"))
    if kinds & _BIAS:
        x += tl.load(bias + here, mask=inside, other=0.0)
    if kinds & _PENALTIES:
        count, node = tl.load(counts + here, mask=inside, other=0.0), n.to(tl.int64)
        for _ in range(depth):
            count += (token == tl.load(tokens + b * N + node)).to(tl.float32)
            node = tl.maximum(tl.load(parents + b * N + node), 0)
        occurs = count > 0
        known = occurs | (tl.load(prompt + here, mask=inside, other=0) != 0)
        factor = tl.where(known, tl.load(penalties + slot * 3), 1.0)
        x = tl.where(x > 0, x / factor, x * factor)
        x -= tl.load(penalties + slot * 3 + 1) * count + tl.load(penalties + slot * 3 + 2) * occurs.to(tl.float32)
    if kinds & _EARLY:
        answered = tl.load(lengths + b) + 1 - tl.load(prompt_length + slot) + depth
        if answered < tl.load(min_tokens + slot):
            x = tl.where(tl.load(early + here, mask=inside, other=0) != 0, -float("inf"), x)
    if mask is not None:  # noqa: SIM102  decided when it is compiled
        if tl.load(masked + b) != 0:
            bits = tl.load(mask + b * mask_b + n * mask_n + token // 32, mask=inside, other=0)
            x = tl.where(((bits >> (token % 32)) & 1) != 0, x, -float("inf"))
    tl.store(out + row + token, x, mask=inside)
    if L > 1:  # noqa: SIM102
        if kinds & _WORDS:
            j, word = tl.arange(0, LP), tl.arange(0, WP)
            before = tl.load(recent + slot * (L - 1) + j + depth, mask=j + depth < L - 1, other=-1)
            node = n.to(tl.int64)
            for back in range(tl.minimum(depth, L - 1)):
                before = tl.where(j == L - 2 - back, tl.load(tokens + b * N + node), before)
                node = tl.maximum(tl.load(parents + b * N + node), 0)
            cell = words + (slot * W + word[:, None]) * L + j[None, :]
            known = tl.load(cell, mask=(word < W)[:, None] & (j < L - 1)[None, :], other=-1)
            matches = tl.min(((known == before[None, :]) | (known < 0)).to(tl.int32), 1) > 0
            last = tl.load(words + (slot * W + word) * L + L - 1, mask=word < W, other=-1)
            first = tl.program_id(0) * TILE
            tl.debug_barrier()  # what was stored above must not come later
            tl.store(out + row + last, -float("inf"), mask=matches & (last >= first) & (last < first + TILE))


@triton.jit
def _observe_kernel(
    slots, tokens, emitted, wanted, counts, recent, vocab, D, L: tl.constexpr, LP: tl.constexpr, PDL: tl.constexpr
):
    """Program: request."""
    b = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, count = tl.load(slots + b), tl.load(emitted + b)
    kinds = tl.load(wanted + slot)
    if kinds & _PENALTIES:
        for d in range(count):
            tl.atomic_add(counts + slot * vocab + tl.load(tokens + b * D + d), 1.0)
    if L > 1:  # noqa: SIM102
        if kinds & _WORDS:
            j = tl.arange(0, LP) + count  # of the recent tokens and the new ones behind them
            old = tl.load(recent + slot * (L - 1) + j, mask=j < L - 1, other=-1)
            new = tl.load(tokens + b * D + j - (L - 1), mask=(j >= L - 1) & (j < L - 1 + count), other=-1)
            tl.debug_barrier()
            tl.store(recent + slot * (L - 1) + j - count, tl.where(j < L - 1, old, new), mask=j - count < L - 1)


@triton.jit
def _favour_kernel(
    logits, out, ids, slots, wanted, bias, n, vocab, stride_b, stride_f, F, TILE: tl.constexpr, PDL: tl.constexpr
):
    """Program (tile of ids, node, request)."""
    f, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < n
    token = tl.load(ids + index, mask=inside, other=0)  # constant, so it need not wait
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + b)
    x = tl.load(logits + b * stride_b + f.to(tl.int64) * stride_f + index, mask=inside, other=0.0).to(tl.float32)
    if tl.load(wanted + slot) & _BIAS:
        x += tl.maximum(tl.load(bias + slot * vocab + token, mask=inside, other=0.0), _FORBIDDEN)
    tl.store(out + (b * F + f) * n + index, x, mask=inside)


class Tables(Protocol):
    """What is read of sampling.processors.Tables, and written by `observe`."""

    wanted: Tensor
    prompt_length: Tensor
    min_tokens: Tensor
    penalties: Tensor
    bias: Tensor
    counts: Tensor
    prompt: Tensor
    early: Tensor
    words: Tensor
    recent: Tensor


def process(
    logits: Tensor, tree: Tree, slots: Tensor, lengths: Tensor, tables: Tables, mask: Tensor | None, masked: Tensor
) -> Tensor:
    """logits: [B, N, V] fp32 -> the same shape, processed. slots, lengths: [B] int64. mask: [B, N, W] int32, a bit per token
    that may follow, with the last dimension contiguous; masked: [B] int64, 0 for requests that it does not concern."""
    batch, nodes, vocab = logits.shape
    check_contiguous(
        logits, slots, lengths, tree.tokens, tree.parents, tree.depths, masked, tables.words, tables.recent
    )
    out = torch.empty_like(logits)
    number, longest = tables.words.shape[1:]
    strides = (0, 0) if mask is None else mask.stride()[:2]
    _process_kernel[(triton.cdiv(vocab, _TILE), nodes, batch)](
        logits, out, slots, lengths, tree.tokens, tree.parents, tree.depths, mask, masked, tables.wanted,
        tables.prompt_length, tables.min_tokens, tables.penalties, tables.bias, tables.counts, tables.prompt, tables.early,
        tables.words, tables.recent, vocab, nodes, *strides, W=number, L=longest, WP=triton.next_power_of_2(max(1, number)),
        LP=triton.next_power_of_2(max(1, longest)), TILE=_TILE, PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
    return out


def favour(logits: Tensor, ids: Tensor, slots: Tensor, wanted: Tensor, bias: Tensor) -> Tensor:
    """A drafter's scores with what requests add to them. Twin: drafters.candidates.biases_of, added.

    logits: [B, F, n] fp32 or bf16, last dimension contiguous, of the tokens ids [n] int64; slots: [B] int64; wanted, bias: see
    Tables. Returns [B, F, n] fp32."""
    batch, frontier, n = logits.shape
    assert logits.stride(2) == 1
    check_contiguous(ids, slots, wanted, bias)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _favour_kernel[(triton.cdiv(n, _TILE), frontier, batch)](
        logits, out, ids, slots, wanted, bias, n, bias.shape[1], logits.stride(0), logits.stride(1), frontier, TILE=_TILE,
        PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
    return out


def observe(slots: Tensor, tokens: Tensor, counts: Tensor, tables: Tables) -> None:
    """The first counts[b] of tokens[b] are part of the answers now. slots, counts: [B] int64; tokens: [B, D+1] int64."""
    check_contiguous(slots, tokens, counts, tables.recent)
    longest = tables.words.shape[2]
    _observe_kernel[(len(slots),)](
        slots, tokens, counts, tables.wanted, tables.counts, tables.recent, tables.counts.shape[1], tokens.shape[1],
        L=longest, LP=triton.next_power_of_2(max(1, longest)), PDL=pdl(), launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
