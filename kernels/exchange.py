"""Sums over GPUs and gatherings, each in one launch: what kernels write straight into each other's memory.

Sums are in fp32 and in the order of ranks, and are rounded once: a value has the same bits on every rank, and whatever
else is in the call. Twins: `ordered_sum` of what is gathered, and torch's own gathering. Of few values every rank sends all
to all (half the bytes are the message's number, which saves a second trip); of many each rank sums a part.
Nothing here waits for the host, and all of it can be in CUDA graphs.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.exchange_kernels import few_kernel, many_kernel
from mtp_engine.kernels.launch import cdiv, next_power_of_2, pdl

_BLOCK, _PROGRAMS = 128, 1024  # of `few_kernel`: one warp, four words a thread
_ROOM, _MANY_PROGRAMS = 4096, 528  # of `many_kernel`: words of all ranks that a program takes at a time
_LEAST = 256  # words of a block there
_LOOKS = 1 << 15  # at what has come, before one at `stop`: 10 ms
_PATIENCE = 1 << 29  # of these looks before a rank gives the others up: minutes
FEW = 1 << 18  # values times other ranks up to which every rank sends all of them to all


@final
@dataclass(frozen=True)
class Boxes:
    """Memory of each rank that all ranks may write to, and how far their talks have come.

    few, many: [ranks] int64, where each rank's part for `few_kernel` and for `many_kernel` begins, as this process sees it.
    few_turns, many_turns: int32 zeros, a counter for each of their programs. stop: [1] int32, memory of the host that the
    device sees; where it is not 0 nobody waits any longer, and what they then give means nothing. halted: [1] int32 zero, where
    kernels that found that tell later ones.
    """

    rank: int
    few: Tensor
    many: Tensor
    few_turns: Tensor
    many_turns: Tensor
    stop: Tensor
    halted: Tensor
    patience: int = _PATIENCE

    @property
    def size(self) -> int:
        return len(self.few)

    @classmethod
    def over(
        cls, rank: int, addresses: list[int], stop: Tensor, device: torch.device, patience: int = _PATIENCE
    ) -> "Boxes":
        """addresses: of each rank's memory, `bytes_needed` of zeros at a multiple of 16."""
        few = torch.tensor(addresses, dtype=torch.int64)
        turns = torch.zeros(_PROGRAMS + _MANY_PROGRAMS + 1, dtype=torch.int32, device=device)
        many = (few + _few_bytes(len(addresses))).to(device)
        few_turns, many_turns, halted = turns.split([_PROGRAMS, _MANY_PROGRAMS, 1])
        return cls(rank, few.to(device), many, few_turns, many_turns, stop, halted, patience)


def bytes_needed(ranks: int) -> int:
    """That each rank gives."""
    return _few_bytes(ranks) + 4 * _MANY_PROGRAMS * 2 * ranks * (1 + 2 * _room(ranks))


def _few_bytes(ranks: int) -> int:
    return _PROGRAMS * 2 * ranks * _BLOCK * 8


def _room(ranks: int) -> int:
    """A power of two."""
    return 1 << (_ROOM // ranks).bit_length() - 1


def gather(x: Tensor, boxes: Boxes, *, join: bool = False) -> Tensor:
    """x of every rank, contiguous, of 32 or 64 bits a value -> [ranks, *shape]; join: [*shape[:-1], ranks * shape[-1]]."""
    assert x.is_contiguous()
    assert x.element_size() in (4, 8), x.dtype
    words, last = x.view(-1).view(torch.int32), x.shape[-1] if x.dim() else 1
    shape = (*x.shape[:-1], boxes.size * last) if join else (boxes.size, *x.shape)
    out = x.new_empty(shape)
    width = last * x.element_size() // 4 if join else len(words)
    _few(words, None, out.view(-1).view(torch.int32), boxes, width)
    return out


def reduce(
    partial: Tensor, boxes: Boxes, dtype: torch.dtype, residual: Tensor | None = None, weights: Tensor | None = None,
    *, few: int = FEW,
) -> Tensor:  # fmt: skip
    """The sum over ranks of fp32 partial sums, plus residual (the same on all ranks), rounded once to dtype.

    partial: contiguous; residual: of the result's shape, contiguous. weights: [M, k] of partial [M * k, N], whose weighted
    sums of k rows at a time are summed then, [M, N]. few: see FEW."""
    assert partial.is_contiguous()
    assert partial.dtype == torch.float32
    assert weights is None or (weights.is_contiguous() and weights.numel() == len(partial))
    out = torch.empty_like(partial if weights is None else partial[: len(weights)], dtype=dtype)
    assert residual is None or (residual.is_contiguous() and residual.shape == out.shape)
    count, width, terms = out.numel(), partial.shape[-1], 0 if weights is None else weights.shape[1]
    if count * (boxes.size - 1) <= few:
        _few(partial, residual, out, boxes, width, weights, terms)
        return out
    room = block = _room(boxes.size)
    while block > _LEAST and cdiv(count, boxes.size * block) < _MANY_PROGRAMS // 2:
        block //= 2
    many_kernel[(min(_MANY_PROGRAMS, cdiv(count, boxes.size * block)),)](
        partial, weights, residual, out, boxes.many, boxes.many_turns, boxes.stop, boxes.halted, count, width, TERMS=terms,
        EVEN=width % block == 0, RANK=boxes.rank, SIZE=boxes.size, PADDED=next_power_of_2(boxes.size),
        PROGRAMS=_MANY_PROGRAMS, BLOCK=block, ROOM=room,
        LOOKS=min(_LOOKS, boxes.patience), PATIENCE=boxes.patience,
        PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
    return out


def _few(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    boxes: Boxes,
    width: int,
    weights: Tensor | None = None,
    terms: int = 0,
) -> None:
    """Sums of fp32; gathers int32."""
    sums = x.dtype == torch.float32
    count = out.numel() if sums else x.numel()
    if not count:
        return
    few_kernel[(min(_PROGRAMS, cdiv(count, _BLOCK)),)](
        x, weights, residual, out, boxes.few, boxes.few_turns, boxes.stop, boxes.halted, count, width, TERMS=terms,
        EVEN=width % _BLOCK == 0, RANK=boxes.rank, SIZE=boxes.size, BLOCK=_BLOCK, SUM=sums, LOOKS=min(_LOOKS, boxes.patience),
        PATIENCE=boxes.patience, PDL=pdl(), launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
