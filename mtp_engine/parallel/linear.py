"""A product whose columns are divided among ranks."""

from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.kernels.fp8 import BlockLinear
from mtp_engine.kernels.linear import Linear
from mtp_engine.parallel.group import Group


@final
class SummedLinear:
    """Each rank multiplies its part of the input by its columns of the weight, and the products are summed."""

    def __init__(self, linear: Callable[[Tensor], Tensor], group: Group, own: range | None = None) -> None:
        """linear: this rank's, [part of in] -> [out], without bias. own: which part of an input that is whole on every rank
        it takes; None where each rank is given its part."""
        self.linear, self.group, self.own = linear, group, own

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in], or this rank's part of it -> [..., out] in x's dtype."""
        part = x if self.own is None else x[..., self.own.start : self.own.stop]
        return self.group.sum(unrounded(self.linear, part), x.dtype)


def unrounded(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """linear(x) in fp32, as the sums were before they are rounded to x's dtype."""
    if isinstance(linear, BlockLinear):
        return linear(x.float())
    if not isinstance(linear, Linear) or linear.weight is None or x.dtype == torch.float32:
        return linear(x).float()
    if x.is_cuda:
        y = torch.mm(x.flatten(0, -2), linear.weight.T, out_dtype=torch.float32)
        return y.view(*x.shape[:-1], -1)
    return F.linear(x.float(), linear.weight.float())
