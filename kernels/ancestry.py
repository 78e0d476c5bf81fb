"""Which row of a step is above which."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.launch import pdl

MAX_NODES = 64  # rows of a request in one step: a row's mask has 64 bits


@triton.jit
def _ancestry(parents, offsets, paths, bits, nodes, NODES: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = tl.program_id(0) * nodes
    row = tl.arange(0, NODES)
    at = tl.where(row < nodes, row, -1)  # every row climbs to its root
    path = tl.full([NODES, NODES], -1, tl.int32)
    mask = tl.zeros([NODES], tl.int64)
    while tl.max(at, 0) >= 0:
        offset = tl.load(offsets + start + at, mask=at >= 0, other=-1).to(tl.int32)
        path = tl.where(row == offset[:, None], at[:, None], path)
        mask |= tl.where(at >= 0, tl.full([NODES], 1, tl.int64) << at, 0)
        at = tl.load(parents + start + at, mask=at >= 0, other=-1).to(tl.int32)
    inside = (row < nodes)[:, None] & (row < nodes)
    tl.store(paths + start * nodes + row[:, None] * nodes + row, path, mask=inside)
    tl.store(bits + start + row, mask, mask=row < nodes)


def ancestry(parents: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Who is above whom in a forest. parents: [B, N] int64, smaller than the row's own index or -1, N <= 64;
    offsets: [B, N] int64, a row's position minus the committed length, one more than its parent's.

    Returns paths [B, N, N] int32, the row above row i or itself at offset e, or -1 where there is none, and bits
    [B, N] int64: bit j of bits[b, i] is set where row j is row i or above it.
    """
    batch, nodes = parents.shape
    assert nodes <= MAX_NODES, "a row's mask has 64 bits"
    paths = torch.empty(batch, nodes, nodes, dtype=torch.int32, device=parents.device)
    bits = torch.empty(batch, nodes, dtype=torch.int64, device=parents.device)
    _ancestry[(batch,)](
        parents.contiguous(), offsets.contiguous(), paths, bits, nodes, NODES=triton.next_power_of_2(nodes), PDL=pdl(),
        launch_pdl=pdl(),
    )  # fmt: skip
    return paths, bits


def ancestry_twin(parents: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`ancestry` in torch."""
    batch, nodes = parents.shape
    index = torch.arange(nodes, device=parents.device)
    paths = torch.full((batch, nodes, nodes), -1, dtype=torch.int32, device=parents.device)
    bits = torch.zeros_like(parents)
    at = index.expand(batch, -1)
    for _ in range(nodes):
        real, row = at >= 0, at.clamp(min=0)
        spot = real[..., None] & (index == offsets.gather(1, row)[..., None])
        paths = torch.where(spot, row.int()[..., None], paths)
        bits |= torch.where(real, torch.ones_like(row) << row, 0)
        at = torch.where(real, parents.gather(1, row), -1)
    return paths, bits
