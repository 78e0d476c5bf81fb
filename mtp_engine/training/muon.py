"""Muon, all matrices of one shape at a time: torch's takes some 40 launches for each matrix, and ours has hundreds."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's Newton-Schulz iteration
_ITERATIONS = 5


@final
class Muon:
    """What torch.optim.Muon computes with adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, "Muon is scalable"), up to
    rounding: Nesterov momentum, orthogonalised, with AdamW's size of steps and decoupled weight decay."""

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": lr}]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._decay, self._momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(param.shape, []).append(param)
            for params in shapes.values():
                self._move(params, group["lr"])

    def _move(self, params: list[Tensor], lr: float) -> None:
        """params: matrices of one shape."""
        grads = [param.grad for param in params if param.grad is not None]  # all have one
        states = [self.state.setdefault(param, {}) for param in params]
        for param, state in zip(params, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
        kept = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(kept, grads, 1 - self._momentum)
        ahead = torch._foreach_lerp(grads, kept, self._momentum)
        moves = orthogonal(torch.stack(list(ahead))).to(params[0].dtype)
        torch._foreach_mul_(params, 1 - lr * self._decay)
        torch._foreach_add_(params, list(moves.unbind()), alpha=-lr * 0.2 * math.sqrt(max(params[0].shape)))


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values come out between about 0.7 and 1.2. [N, R, C] -> [N, R, C],
    computed in bf16 where products of that are fast."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    y: Tensor = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    y = y.mT if tall else y
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
