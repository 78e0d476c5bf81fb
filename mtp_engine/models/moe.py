"""The FFN of a mixture-of-experts layer."""

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from mtp_engine.config import MoEConfig
from mtp_engine.kernels.experts import ExpertStack, mix_experts, route
from mtp_engine.parallel.group import Group


@final
@dataclass(frozen=True)
class MoE:
    """Each token goes through `per_token` gated FFNs out of `experts`, chosen by a router that is fp32 throughout:
    in bf16 it would choose other experts."""

    config: MoEConfig
    router: Tensor  # [E, H] fp32
    bias: Tensor  # [E] fp32, added to the scores for the choice only
    gate_up: ExpertStack  # [E, 2I, H]
    down: ExpertStack  # [E, H, I]
    group: Group = field(default_factory=Group)  # each rank has its part of I in every expert

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        c, flat = self.config, x.flatten(0, -2)
        weights, chosen = route(flat, self.router, self.bias, c.per_token, c.normalise, c.scale)
        mixed = mix_experts(flat, weights, chosen, self.gate_up, self.down)
        return self.group.sum(mixed, x.dtype).view(x.shape)
