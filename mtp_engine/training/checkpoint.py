"""What a run keeps while it lasts: a checkpoint in one file, whole or not at all, and a log."""

import json
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.hub.files import atomically
from mtp_engine.training.optimiser import Optimiser
from mtp_engine.training.trainable import TrainableWeights

_OPTIMISER, _PLACE, _RUN = "optimiser/", "place", "run"


@final
class RunState:
    """Weights and optimiser of a run, and the file that keeps them."""

    def __init__(self, path: Path, weights: TrainableWeights, optimiser: Optimiser) -> None:
        self.path, self._weights, self._optimiser = path, weights, optimiser

    def save(self, place: list[float], run: dict[str, Any]) -> None:
        """Write the checkpoint. place: where the run is; run: what must be the same for it to be gone on with."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        moments = {f"{_OPTIMISER}{name}": value for name, value in self._optimiser.state().items()}
        flat = {name: x.to("cpu").contiguous() for name, x in {**self._weights.named(), **moments}.items()}
        flat[_PLACE] = torch.tensor(place, dtype=torch.float64)
        atomically(self.path, lambda path: save_file(flat, path, metadata={_RUN: json.dumps(run)}))

    def load(self, run: dict[str, Any], out: Path) -> list[float] | None:
        """Take over the checkpoint and return its place; None if there is none. out: the folder that the user named.

        Raises EngineError, with nothing changed, if it is of another run.
        """
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as kept:
            about, wanted = json.loads(kept.metadata()[_RUN]), json.loads(json.dumps(run))
            if other := sorted(key for key in wanted if about.get(key) != wanted[key]):
                raise EngineError(
                    f"{out} holds a run with another setting of {', '.join(other)}: choose another --out, or delete it"
                )
            tensors: dict[str, Tensor] = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118  no mapping
        for name, master in self._weights.named().items():
            master.copy_(tensors[name])
        self._weights.refresh()
        self._optimiser.restore({n.removeprefix(_OPTIMISER): x for n, x in tensors.items() if n.startswith(_OPTIMISER)})
        place: list[float] = tensors[_PLACE].tolist()
        return place

    def sound(self) -> bool:
        """Whether all weights are numbers: a step's loss is that of the weights before it."""
        return bool(torch.stack([master.isfinite().all() for master in self._weights.named().values()]).all())

    def diverged(self, step: int, rates: str) -> EngineError:
        """rates: the options to lower."""
        return EngineError(
            f"the loss is not a number at step {step}; {self.path.parent} keeps the last good state, if one was written: "
            f"lower {rates} and run again with another --out"
        )


def saved_place(path: Path) -> int | None:
    """The step of a checkpoint; None if there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as kept:
        return int(kept.get_tensor(_PLACE)[0])


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """One line of a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
