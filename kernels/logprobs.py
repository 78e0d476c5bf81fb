"""Log-probabilities of what a step emits, and of the best tokens beside it: two launches, the first over pieces of the rows.

Twin: sampling.logprobs.emitted_logprobs. A row looks for as many best tokens as its own request wants.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous, pack, rank_of, value_of
from mtp_engine.kernels.launch import pdl

_LONG = 65536  # vocabularies above this are split more coarsely
_SPLIT, _LONG_SPLIT = 1024, 4096  # tokens of a program; they decide how sums round, so only the vocabulary may choose


@triton.jit
def _note(value, number):
    """A log-probability and what it belongs to, as one int64."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | number.to(tl.int64)


@triton.jit
def _pieces_kernel(
    logits, path, tokens, wanted, best, stats, above, vocab, N, D, splits, K, SPLIT: tl.constexpr, PDL: tl.constexpr
):
    """Program (piece of the vocabulary, token emitted, request)."""
    s, d, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    most = tl.load(wanted + b)
    if most >= 0:
        row = logits + (b * N + tl.load(path + b * D + d)) * vocab
        chosen = tl.load(row + tl.load(tokens + b * D + d))
        token = s * SPLIT + tl.arange(0, SPLIT)
        x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
        top, here = tl.max(x, 0), (b * D + d) * splits + s
        tl.store(stats + 2 * here, top)
        tl.store(stats + 2 * here + 1, tl.sum(tl.where(x > -float("inf"), tl.exp(x - top), 0.0), 0))
        tl.store(above + here, tl.sum((x > chosen).to(tl.int32), 0))
        keys = tl.where(token < vocab, pack(rank_of(x), token), -(1 << 63))
        for k in range(most):
            key = tl.max(keys, 0)
            tl.store(best + here * K + k, key)
            keys = tl.where(keys == key, -(1 << 63), keys)


@triton.jit
def _merge_kernel(
    logits, path, tokens, wanted, best, stats, above, out, vocab, N, D, splits, K, SP: tl.constexpr, KP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token emitted, request)."""
    d, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    most = tl.load(wanted + b)
    if most >= 0:
        row = logits + (b * N + tl.load(path + b * D + d)) * vocab
        chosen = tl.load(row + tl.load(tokens + b * D + d))
        piece = tl.arange(0, SP)
        here, there = (b * D + d) * splits + piece, piece < splits
        tops = tl.load(stats + 2 * here, mask=there, other=-float("inf"))
        sums, top = tl.load(stats + 2 * here + 1, mask=there, other=0.0), tl.max(tops, 0)
        total = top + tl.log(tl.sum(tl.where(tops > -float("inf"), sums * tl.exp(tops - top), 0.0), 0))
        rank = 1 + tl.sum(tl.load(above + here, mask=there, other=0), 0)
        out += (b * D + d) * (1 + K)
        tl.store(out, _note(chosen - total, rank))
        k = tl.arange(0, KP)
        mask = there[:, None] & (k < most)[None, :]
        keys = tl.load(best + here[:, None] * K + k[None, :], mask=mask, other=-(1 << 63))
        for place in range(most):
            key = tl.max(tl.max(keys, 1), 0)
            token = 0x7FFFFFFF - (key & 0xFFFFFFFF)  # see arrival.pack
            tl.store(out + 1 + place, _note(value_of((key >> 32).to(tl.int32)) - total, token))
            keys = tl.where(keys == key, -(1 << 63), keys)


def emitted_logprobs(logits: Tensor, path: Tensor, tokens: Tensor, wanted: Tensor, most: int) -> Tensor:
    """[B, D+1, 1 + most] int64 as the twin gives; of a request the first 1 + wanted[b] columns are set, none if it wants -1.

    logits: [B, N, V] fp32, raw, contiguous; path, tokens: [B, D+1] int64; wanted: [B] int64, at most `most` and V.
    """
    batch, nodes, vocab = logits.shape
    depth = path.shape[1]
    check_contiguous(logits, path, tokens, wanted)
    split = _SPLIT if vocab <= _LONG else _LONG_SPLIT
    splits, device = triton.cdiv(vocab, split), logits.device
    best = torch.empty(batch * depth * splits * most, dtype=torch.int64, device=device)
    stats = torch.empty(batch * depth * splits * 2, dtype=torch.float32, device=device)
    above = torch.empty(batch * depth * splits, dtype=torch.int32, device=device)
    out = torch.empty(batch, depth, 1 + most, dtype=torch.int64, device=device)
    given = (logits, path, tokens, wanted, best, stats, above)
    _pieces_kernel[(splits, depth, batch)](
        *given, vocab, nodes, depth, splits, most, SPLIT=split, PDL=pdl(), launch_pdl=pdl(), num_warps=4
    )
    _merge_kernel[(depth, batch)](
        *given, out, vocab, nodes, depth, splits, most, SP=triton.next_power_of_2(splits),
        KP=triton.next_power_of_2(max(1, most)), PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
    return out
