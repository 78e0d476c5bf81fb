"""The smallest logit that min-p, top-k and top-p leave, per node: one launch, without sorting.

Twin: sampling.sampler.floors. A program looks for one row's floor by halving: what a value leaves above itself, tokens for
top-k and probability for top-p, falls as the value rises. Every look at the row also tells the nearest logits on both
sides, so that a few looks find the very logit. One multiprocessor looks at a whole row, so what counts is how few
instructions a logit takes. Sums are split at absolute indices and added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous
from mtp_engine.kernels.launch import pdl

_TILE, _WARPS = 8192, 32
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _look(row, vocab, at, top, scale, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The weight of the logits above `at`, the nearest above it and the nearest not above it. scale: of exponents of 2."""
    weight = tl.zeros([TILE], tl.float32)
    above, below = tl.full([TILE], float("inf"), tl.float32), tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, vocab, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
        over = x > at
        if COUNT:
            weight += tl.where(over, 1.0, 0.0)
        else:
            weight += tl.where(over, tl.exp2((x - top) * scale), 0.0)
        above = tl.minimum(above, tl.where(over, x, float("inf")))
        below = tl.maximum(below, tl.where(over, -float("inf"), x))
    return tl.sum(weight, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _left(row, vocab, floor, top, scale, TILE: tl.constexpr):
    """The weight of the logits from `floor` on, and the smallest of these."""
    weight, least = tl.zeros([TILE], tl.float32), tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, vocab, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
        left = x >= floor
        weight += tl.where(left, tl.exp2((x - top) * scale), 0.0)
        least = tl.minimum(least, tl.where(left, x, float("inf")))
    return tl.sum(weight, 0), tl.min(least, 0)


@triton.jit
def _search(row, vocab, base, low, top, scale, limit, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The smallest logit from `base` on that has less weight than `limit` above it. base, top: logits of the row. low: `base`, or
    above it any value that has at least the limit above itself."""
    high = top
    at = tl.where(low > base, low + (high - low) / 2, base)
    looking = low < high
    while looking:
        weight, above, below = _look(row, vocab, at, top, scale, COUNT, TILE)
        kept = weight < limit
        alone = (below <= low) & (at != base)  # no logit lies between what is known to go and here
        # kept: all above, and the nearest below, which has as much above it; else all below goes
        high = tl.where(kept, tl.where(alone, above, below), high)
        looking = tl.where(kept, (at != base) & (alone == 0), above < high)
        low = tl.where(kept, low, at)
        middle = low + (high - low) / 2
        at = tl.where(middle < high, middle, low)
    return high


@triton.jit
def _floors_kernel(
    logits, temperature, top_k, top_p, min_p, out, vocab, stride_b, stride_n, N, TILE: tl.constexpr, PDL: tl.constexpr
):
    """Program (node, request)."""
    n, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat, k, p, m = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b)
    floor = heat * 0.0 - float("inf")
    if (heat > 0) & ((k > 0) | (p < 1) | (m > 0)):
        row = logits + b * stride_b + n.to(tl.int64) * stride_n
        highest, lowest = tl.full([TILE], -float("inf"), tl.float32), tl.full([TILE], float("inf"), tl.float32)
        for start in range(0, vocab, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
            highest = tl.maximum(highest, x)
            lowest = tl.where(x > -float("inf"), tl.minimum(lowest, x), lowest)
        top, least = tl.max(highest, 0), tl.min(lowest, 0)
        if top > -float("inf"):
            scale = _LOG2E / heat
            if m > 0:
                floor = top + heat * tl.log(m)
            if k > 0:
                floor = tl.maximum(floor, _search(row, vocab, least, least, top, scale, k.to(tl.float32), True, TILE))
            if p < 1:
                total, base = _left(row, vocab, tl.maximum(floor, least), top, scale, TILE)
                # all below this have less than 1 - p of what the best one has
                low = top - heat * (tl.log(vocab / (1 - p)) + 1)
                floor = tl.maximum(
                    floor, _search(row, vocab, base, tl.maximum(base, low), top, scale, p * total, False, TILE)
                )
    tl.store(out + b * N + n, floor)


def floors(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[B, N] fp32; -inf where nothing is cut off: at temperature 0, and where all three are off.

    logits: [B, N, V] fp32, last dimension contiguous; temperature, top_p, min_p: [B] fp32; top_k: [B] int64.
    """
    batch, nodes, vocab = logits.shape
    assert logits.stride(2) == 1
    check_contiguous(temperature, top_k, top_p, min_p)
    out = torch.empty(batch, nodes, dtype=torch.float32, device=logits.device)
    _floors_kernel[(nodes, batch)](
        logits, temperature, top_k, top_p, min_p, out, vocab, logits.stride(0), logits.stride(1), nodes, TILE=_TILE,
        PDL=pdl(), launch_pdl=pdl(), num_warps=_WARPS,
    )  # fmt: skip
    return out
