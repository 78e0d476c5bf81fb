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
def _softmax(row, size, sharpness, BLOCK: tl.constexpr):
    """The log of the sum of exponentials of a row, and the place of its largest. Lanes go their own ways and meet at the end."""
    lanes = tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], _NONE, tl.float32), tl.zeros([BLOCK], tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        x = tl.load(row + start + lanes, start + lanes < size, _NONE).to(tl.float32) * sharpness
        apart = tl.exp(-tl.abs(x - most))
        rises = x > most
        total = tl.where(rises, total * apart + 1.0, total + apart)
        where = tl.where(rises, start + lanes, where)
        most = tl.maximum(most, x)
    top = tl.max(most, 0)
    place = tl.min(tl.where(most == top, where, size), 0)
    return top + tl.log(tl.sum(total * tl.exp(most - top), 0)), place


@triton.jit
def _distill(
    draft, target, weights, loss, accept, match, rows, shift, sharpness, acceptance, breadth, n, V, BLOCK: tl.constexpr,
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
            q_log, q_best = _softmax(d, n, 1.0, BLOCK)
            p_log, p_best = _softmax(t, V, sharpness, BLOCK)
            divergence, common = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            below, covered = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                inside = start + lanes < n
                q = tl.load(d + start + lanes, inside, _NONE).to(tl.float32) - q_log
                p = tl.load(t + start + lanes, inside, _NONE).to(tl.float32) * sharpness - p_log
                own, wanted = tl.exp(q), tl.exp(p)
                divergence += wanted * tl.where(inside, p - q, 0.0)
                common += tl.minimum(wanted, breadth * own)
                below += tl.where(breadth * own < wanted, own, 0.0)
                covered += wanted
            shared, under, whole = tl.sum(common, 0), tl.sum(below, 0), tl.sum(covered, 0)
            pull = acceptance * breadth / shared
            for start in range(0, n, BLOCK):
                inside = start + lanes < n
                q = tl.load(d + start + lanes, inside, _NONE).to(tl.float32) - q_log
                p = tl.load(t + start + lanes, inside, _NONE).to(tl.float32) * sharpness - p_log
                own, wanted = tl.exp(q), tl.exp(p)
                slope = whole * own - wanted - pull * own * (tl.where(breadth * own < wanted, 1.0, 0.0) - under)
                tl.store(d + start + lanes, (weight * slope).to(draft.dtype.element_ty), inside)
            tl.store(loss + row, tl.sum(divergence, 0) - acceptance * tl.log(shared))
            tl.store(accept + row, shared)
            tl.store(match + row, tl.where(q_best == p_best, 1.0, 0.0))


def distill(
    draft: Tensor, target: Tensor, weights: Tensor, shift: int, *, temperature: float = 1.0, acceptance: float = 0.0,
    breadth: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As kernels.distill_reference.distill; draft and target contiguous. Reads each row three times, the last two times
    from L2."""
    check_contiguous(draft, target, weights)
    assert weights.dtype == torch.float32
    (rows, n), vocab = draft.shape, target.shape[1]
    assert n <= vocab
    loss, accept, match = torch.empty(3, rows, device=draft.device)
    block = min(_BLOCK, triton.next_power_of_2(n))
    _distill[(programs(draft.device, rows),)](
        draft, target, weights, loss, accept, match, rows, shift, 1 / temperature, acceptance, breadth, n, vocab,
        BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    return loss, accept, match


def programs(device: torch.device, rows: int) -> int:
    """Rows that are worked on at once."""
    if device.type != "cuda":
        return rows
    return min(rows, _ROWS_AT_ONCE * torch.cuda.get_device_properties(device).multi_processor_count)
