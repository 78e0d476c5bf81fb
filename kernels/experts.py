"""A mixture of experts over stacked weights: every token's chosen experts, weighted and summed."""

from dataclasses import dataclass
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertStack(Protocol):
    """The same matrix of every expert, in one tensor."""

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """Expert `index`'s: [out, in] in `dtype`."""


@final
@dataclass(frozen=True)
class PlainStack:
    """weight: [E, out, in]."""

    weight: Tensor

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        return self.weight[index]


def route(
    x: Tensor, router: Tensor, bias: Tensor, per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Sigmoid routing with a bias that counts for the choice only (DeepSeek-V3 report, section 2.1.2), in fp32.

    x: [T, H]; router: [E, H] fp32; bias: [E] fp32 -> weights [T, k] fp32 and experts [T, k] int64.
    """
    scores = F.linear(x.float(), router).sigmoid()
    chosen = (scores + bias).topk(per_token, dim=-1).indices
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, chosen


def mix_experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: ExpertStack, down: ExpertStack) -> Tensor:
    """sum over k of weights[t, k] * down(silu(gate(x)) * up(x)) of expert chosen[t, k].

    x: [T, H]; weights, chosen: [T, k]; gate_up: [E, 2I, H]; down: [E, H, I] -> [T, H] fp32. Tokens are grouped by expert,
    so each chosen expert is read once; a token's experts are added in ascending order, whatever its neighbours chose.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    tokens, shares = order // chosen.shape[1], weights.flatten()[order]
    start = 0
    for expert, count in enumerate(flat.bincount().tolist()):
        if count == 0:
            continue
        mine = tokens[start : start + count]
        gate, up = F.linear(x[mine], gate_up.matrix(expert, x.dtype)).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down.matrix(expert, x.dtype))
        out.index_add_(0, mine, y.float() * shares[start : start + count, None])
        start += count
    return out
