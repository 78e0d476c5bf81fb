"""Muon for matrices, AdamW for the rest (or for all), over the fp32 masters; warm-up, then a cosine to zero."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.training.muon import Muon
from mtp_engine.training.trainable import Parameter, TrainableWeights

_BY_ADAM = ("norm", "embed_tokens", "lm_head", "mlp.gate.weight", "bias")  # what is in a name that Muon does not suit


@final
@dataclass(frozen=True)
class Rates:
    """Muon's rate is scaled to AdamW's size of steps ("match_rms_adamw", Liu et al. 2025, "Muon is scalable"). matrices:
    whose they are; AdamW moves them at its own rate."""

    muon: float = 2e-3
    adam: float = 1e-3
    warmup: int = 100  # steps
    decay: float = 0.0  # of the weights, decoupled
    last: float = 0.0  # share of the rate that the cosine ends in
    matrices: Literal["muon", "adamw"] = "muon"

    def __post_init__(self) -> None:
        for name in ("muon", "adam"):
            rate = getattr(self, name)
            if not 0 < rate < math.inf:
                raise EngineError(f"the learning rate of {name} is {rate}; it must be above 0 and finite")

    def share(self, step: int, steps: int) -> float:
        """Of the full rate, at `step` (from 0) of `steps`."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        return rise * (self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))))


@final
class Optimiser:
    """Steps the masters by the leaves' gradients, then refreshes the leaves."""

    def __init__(self, weights: TrainableWeights, rates: Rates) -> None:
        self._weights, self._rates = weights, rates
        masters = weights.named()
        suited = {name for name, m in masters.items() if m.dim() == 2 and not any(part in name for part in _BY_ADAM)}
        adam = [name for name in masters if rates.matrices == "adamw" or name not in suited]
        by_adam = set(adam)
        muon = [name for name in masters if name not in by_adam]
        self._adam = torch.optim.AdamW(
            [masters[n] for n in adam], lr=rates.adam, betas=(0.9, 0.95), weight_decay=rates.decay
        )
        self._muon = Muon([masters[n] for n in muon], rates.muon, rates.decay)
        self._named = {name: masters[name] for name in [*adam, *muon]}

    def step(self, step: int, steps: int) -> None:
        """One update from the leaves' gradients, which are cleared."""
        share = self._rates.share(step, steps)
        for optimiser, rate in ((self._adam, self._rates.adam), (self._muon, self._rates.muon)):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
        for parameter in self._weights.parameters:
            for _, master, grad in parameter.gradients():
                master.grad = grad
        self._adam.step()
        self._muon.step()
        for parameter in self._weights.parameters:
            parameter.leaf.grad = None
        self._weights.refresh()

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on besides the masters, by `name/key`."""
        found = {}
        for name, master in self._named.items():
            for optimiser in (self._adam, self._muon):
                for key, value in optimiser.state.get(master, {}).items():
                    found[f"{name}/{key}"] = torch.as_tensor(value)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        by_adam = {id(p) for group in self._adam.param_groups for p in group["params"]}
        for name, value in state.items():
            master = self._named[name.rsplit("/", 1)[0]]
            optimiser = self._adam if id(master) in by_adam else self._muon
            key = name.rsplit("/", 1)[1]
            kept = value if key == "step" else value.to(master.device)
            optimiser.state.setdefault(master, {})[key] = kept


def average_gradients(parameters: Sequence[Parameter], mean: Callable[[Tensor], Tensor]) -> None:
    """The mean over all processes, which `mean` gives of a tensor, in one exchange per dtype."""
    grads = [p.leaf.grad for p in parameters if p.leaf.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):  # the same order everywhere
        same = [grad for grad in grads if grad.dtype == dtype]
        flat = mean(torch.cat([grad.flatten() for grad in same]))
        for grad, part in zip(same, torch.split(flat, [g.numel() for g in same]), strict=True):
            grad.copy_(part.view(grad.shape))
