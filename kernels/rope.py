"""Rotation tables of a step in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.launch import pdl


@triton.jit
def _tables(positions, frequencies, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < HALF
    frequency = tl.load(frequencies + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angle = tl.load(positions + row).to(tl.float32) * frequency
    c, s = tl.cos(angle), tl.sin(angle)
    at = row * 2 * HALF + column
    tl.store(cos + at, c, mask=inside)
    tl.store(cos + at + HALF, c, mask=inside)
    tl.store(sin + at, -s, mask=inside)
    tl.store(sin + at + HALF, s, mask=inside)


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin of models.layers.RotaryEmbedding, its twin.

    positions: [B, N] int64; frequencies: [dim / 2] fp32 -> two [B, N, 1, dim] fp32.
    """
    half = len(frequencies)
    cos = torch.empty(*positions.shape, 1, 2 * half, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    _tables[(positions.numel(),)](
        positions, frequencies, cos, sin, HALF=half, BLOCK=triton.next_power_of_2(half), PDL=pdl(),
        num_warps=1, launch_pdl=pdl(),
    )  # fmt: skip
    return cos, sin
