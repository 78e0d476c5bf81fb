"""The distillation loss and its gradient over the whole vocabulary, nothing of that size stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous

_BLOCK = 8192
_WARPS = 16
_ROWS_AT_ONCE = 2  # per multiprocessor: so few that what the first pass has read is in L2 for the others
_NONE = tl.constexpr(-1e30)  # the logit of no token: an exponential of 0, and no NaN among differences


@triton.jit
def _logits(row, at, size, EVEN: tl.constexpr):
    """Of the tokens `at`. EVEN: none is beyond `size`."""
    return (tl.load(row + at) if EVEN else tl.load(row + at, at < size, _NONE)).to(tl.float32)


@triton.jit
def _summary(row, size, sharpness, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """A row's largest logit, times sharpness, its place, and the log of the sum of exponentials. Lanes go their own ways and
    meet at the end: one exponential a logit. What a caller does not use is not computed."""
    lanes = tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], _NONE, tl.float32), tl.zeros([BLOCK], tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        x = _logits(row, start + lanes, size, EVEN) * sharpness
        apart = tl.exp(-tl.abs(x - most))
        rises = x > most
        total = tl.where(rises, total * apart + 1.0, total + apart)
        where = tl.where(rises, start + lanes, where)
        most = tl.maximum(most, x)
    top = tl.max(most, 0)
    place = tl.min(tl.where(most == top, where, size), 0)
    return top, place, top + tl.log(tl.sum(total * tl.exp(most - top), 0))


@triton.jit
def _survey(target, totals, best, sharpness, V, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, place, total = _summary(target + row * V, V, sharpness, BLOCK, EVEN)
    tl.store(totals + row, total)
    tl.store(best + row, place)


@triton.jit
def _distill(
    draft, target, totals, best, weights, loss, accept, match, rows, shift, sharpness, acceptance, breadth, n, V,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        weight = tl.load(weights + row)
        d, t = draft + row * n, target + (row + shift) * V
        if weight == 0.0:
            for start in range(0, n, BLOCK):
                tl.store(d + start + lanes, tl.zeros([BLOCK], draft.dtype.element_ty), start + lanes < n)
            tl.store(loss + row, 0.0)
            tl.store(accept + row, 0.0)
            tl.store(match + row, 0.0)
        else:
            q_most, _, q_log = _summary(d, n, 1.0, BLOCK, EVEN)
            p_log, place = tl.load(totals + row + shift), tl.load(best + row + shift)
            preferred = tl.load(d + place, place < n, _NONE).to(tl.float32)
            divergence, common = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            below, covered = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                q = _logits(d, start + lanes, n, EVEN) - q_log
                p = _logits(t, start + lanes, n, EVEN) * sharpness - p_log
                own, wanted = tl.exp(q), tl.exp(p)
                divergence += wanted * (p - q)
                common += tl.minimum(wanted, breadth * own)
                below += tl.where(breadth * own < wanted, own, 0.0)
                covered += wanted
            shared, under, whole = tl.sum(common, 0), tl.sum(below, 0), tl.sum(covered, 0)
            pull = acceptance * breadth / shared
            for start in range(0, n, BLOCK):
                q = _logits(d, start + lanes, n, EVEN) - q_log
                p = _logits(t, start + lanes, n, EVEN) * sharpness - p_log
                own, wanted = tl.exp(q), tl.exp(p)
                slope = whole * own - wanted - pull * own * (tl.where(breadth * own < wanted, 1.0, 0.0) - under)
                tl.store(d + start + lanes, (weight * slope).to(draft.dtype.element_ty), start + lanes < n)
            tl.store(loss + row, tl.sum(divergence, 0) - acceptance * tl.log(shared))
            tl.store(accept + row, shared)
            tl.store(match + row, tl.where(preferred == q_most, 1.0, 0.0))


def survey(target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As kernels.distill_reference.survey; target contiguous."""
    check_contiguous(target)
    rows, vocab = target.shape
    totals = torch.empty(rows, device=target.device)
    best = torch.empty(rows, dtype=torch.int32, device=target.device)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    _survey[(rows,)](
        target, totals, best, 1 / temperature, vocab, BLOCK=block, EVEN=vocab % block == 0, num_warps=_WARPS
    )
    return totals, best


def distill(
    draft: Tensor, target: Tensor, known: tuple[Tensor, Tensor], weights: Tensor, shift: int, *, temperature: float = 1.0,
    acceptance: float = 0.0, breadth: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As kernels.distill_reference.distill; draft and target contiguous. Reads each row of draft three times and of target
    twice, all but the first time from L2."""
    totals, best = known
    check_contiguous(draft, target, totals, best, weights)
    assert weights.dtype == torch.float32
    (rows, n), vocab = draft.shape, target.shape[1]
    assert n <= vocab
    loss, accept, match = torch.empty(3, rows, device=draft.device)
    block = min(_BLOCK, triton.next_power_of_2(n))
    _distill[(_programs(draft.device, rows),)](
        draft, target, totals, best, weights, loss, accept, match, rows, shift, 1 / temperature, acceptance, breadth, n, vocab,
        BLOCK=block, EVEN=n % block == 0, num_warps=_WARPS,
    )  # fmt: skip
    return loss, accept, match


def _programs(device: torch.device, rows: int) -> int:
    """Rows that are worked on at once; in the interpreter a few, so that each program has several."""
    if device.type != "cuda":
        return min(rows, 2)
    return min(rows, _ROWS_AT_ONCE * torch.cuda.get_device_properties(device).multi_processor_count)
