"""Rounding weights so that the errors of a row cancel over the inputs it will see (GPTQ, Frantar et al. 2022,
arXiv 2210.17323): each column is rounded in turn, and what was lost is made up for by those that follow."""

import torch
from torch import Tensor

_BLOCK = 64  # columns whose corrections are added to the rest at once
_DAMPING = 0.01  # of the mean second moment


def compensated(weight: Tensor, scale: Tensor, most: int, second: Tensor) -> Tensor:
    """weight: [out, in] fp32; scale: [out]; second: [in, in], sum of x x^T over inputs -> integers [out, in] int8 such that
    integers * scale[:, None] acts on those inputs as the weight does."""
    second = second.double()
    second = second + torch.eye(len(second)) * (_DAMPING * second.diagonal().mean().clamp(min=1e-30))
    root = torch.linalg.cholesky(second.flip(0, 1)).flip(0, 1)  # upper: root root^T is the matrix
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=torch.float64), upper=True).float()
    rest, scale = weight.T.contiguous(), scale.float()  # a column of the weight is a row here
    out = torch.empty(rest.shape, dtype=torch.int8)
    for start in range(0, len(rest), _BLOCK):
        stop = min(start + _BLOCK, len(rest))
        lost = torch.empty(stop - start, rest.shape[1])
        for i in range(start, stop):
            rounded = (rest[i] / scale).round_().clamp_(-most, most)
            out[i] = rounded
            error = (rest[i] - rounded * scale) / inverse[i, i]
            rest[i + 1 : stop].addr_(inverse[i, i + 1 : stop], error, alpha=-1.0)
            lost[i - start] = error
        rest[stop:].addmm_(inverse[start:stop, stop:].T, lost, alpha=-1.0)
    return out.T
