"""The distillation loss and its gradient over the whole vocabulary, one program per row, nothing of that size stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous

_BLOCK = 4096


@triton.jit
def _merge(most, total, where, x, offset):
    """One more block into a running maximum, the sum of exponentials below it, and the maximum's place."""
    top, place = tl.max(x, 0, return_indices=True)
    where = tl.where(top > most, offset + place, where)
    new = tl.maximum(most, top)
    return new, total * tl.exp(most - new) + tl.sum(tl.exp(x - new), 0), where


@triton.jit
def _distill(
    draft, target, weights, loss, accept, match, shift, sharpness, acceptance, V, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    d, t = draft + row * V, target + (row + shift) * V
    lanes = tl.arange(0, BLOCK)
    if weight == 0.0:
        for start in range(0, V, BLOCK):
            tl.store(d + start + lanes, tl.zeros([BLOCK], draft.dtype.element_ty), start + lanes < V)
        tl.store(loss + row, 0.0)
        tl.store(accept + row, 0.0)
        tl.store(match + row, 0.0)
    else:
        q_most, q_total, q_best = -float("inf"), 0.0, 0
        p_most, p_total, p_best = -float("inf"), 0.0, 0
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            q = tl.load(d + start + lanes, inside, -float("inf")).to(tl.float32)
            p = tl.load(t + start + lanes, inside, -float("inf")).to(tl.float32) * sharpness
            q_most, q_total, q_best = _merge(q_most, q_total, q_best, q, start)
            p_most, p_total, p_best = _merge(p_most, p_total, p_best, p, start)
        q_log, p_log = q_most + tl.log(q_total), p_most + tl.log(p_total)
        divergence, common, below = 0.0, 0.0, 0.0
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            q = tl.load(d + start + lanes, inside, -1e30).to(tl.float32) - q_log
            p = tl.load(t + start + lanes, inside, -1e30).to(tl.float32) * sharpness - p_log
            divergence += tl.sum(tl.exp(p) * tl.where(inside, p - q, 0.0), 0)
            common += tl.sum(tl.exp(tl.minimum(p, q)), 0)
            below += tl.sum(tl.where(q < p, tl.exp(q), 0.0), 0)
        pull = acceptance / common
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            q = tl.load(d + start + lanes, inside, -1e30).to(tl.float32) - q_log
            p = tl.load(t + start + lanes, inside, -1e30).to(tl.float32) * sharpness - p_log
            share = tl.exp(q)
            slope = share - tl.exp(p) - pull * share * (tl.where(q < p, 1.0, 0.0) - below)
            tl.store(d + start + lanes, (weight * slope).to(draft.dtype.element_ty), inside)
        tl.store(loss + row, divergence - acceptance * tl.log(common))
        tl.store(accept + row, common)
        tl.store(match + row, tl.where(q_best == p_best, 1.0, 0.0))


def distill(
    draft: Tensor, target: Tensor, weights: Tensor, shift: int, *, temperature: float = 1.0, acceptance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels.distill_reference.distill; draft and target contiguous. Reads each row three times, mostly from L2."""
    check_contiguous(draft, target, weights)
    assert weights.dtype == torch.float32
    rows, vocab = draft.shape
    loss, accept, match = torch.empty(3, rows, device=draft.device)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    _distill[(rows,)](
        draft, target, weights, loss, accept, match, shift, 1 / temperature, acceptance, vocab, BLOCK=block, num_warps=8
    )
    return loss, accept, match
