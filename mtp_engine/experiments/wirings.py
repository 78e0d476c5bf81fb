"""Other ways to wire a model's MTP layers: what each is, and the fault that it would show if it accepted more."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

from torch import Tensor

from mtp_engine.assemble import load_main
from mtp_engine.config import MTPConfig
from mtp_engine.engine import Engine
from mtp_engine.hub import hub
from mtp_engine.models import loader
from mtp_engine.models.build import MTPNames
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention

Variant = tuple[str, str, MTPModule]
"""What is tried, what is wrong if it accepts more, and the layers."""


def variants(module: MTPModule, engine: Engine, files: hub.ModelFiles) -> Iterator[Variant]:
    """The other wirings."""
    config = module.config
    if not module.mix:  # with features the final norm plays no part
        other: Any = "pre_norm" if config.hidden == "post_norm" else "post_norm"
        yield f"hidden: {other}", "hidden norm", replace(module, config=replace(config, hidden=other))
    swapped = [replace(layer, join=_swapped(layer.join)) for layer in module.layers]
    yield "projection: halves swapped", "swapped concat", replace(module, layers=swapped)
    for by in (-1, 1):
        shifted = cast(MTPModule, _Shifted(module, by))
        yield f"hidden states: {by:+d} position", "shifted hidden states", shifted
    fresh = from_files(engine, files, config)
    if fresh is not None:
        yield f"layers: all {len(fresh.layers)} of the files", "unused layers", fresh


def _swapped(join: Any) -> Callable[[Tensor, Tensor], Tensor]:
    swapped: Callable[[Tensor, Tensor], Tensor] = replace(join, hidden_first=not join.hidden_first)
    return swapped


@final
@dataclass(frozen=True)
class _Shifted:
    """MTP layers whose first level reads the hidden state of another position."""

    module: MTPModule
    by: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        if level == 0 and hidden.shape[1] > 1:
            hidden = hidden.roll(-self.by, 1)
        return self.module.forward(level, embedded, hidden, positions, attention)


def from_files(engine: Engine, files: hub.ModelFiles, config: MTPConfig) -> MTPModule | None:
    """The layers as their files have them, one for each depth, wired as those in use."""
    folder = files.mtp_folder or files.folder
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        if "mtp" in raw:
            there = Path(name)
            for path in folder.glob("*.safetensors"):
                (there / path.name).symlink_to(path.resolve())
            raw["mtp"] |= {"depth": _count(folder), "reused": False}
            (there / "config.json").write_text(json.dumps(raw), encoding="utf-8")
            folder = there
        main = engine.model
        if engine.config.dtype == "int8":  # the engine's own is the library's, of which no layers can be made
            main = load_main(files, engine.config, engine.backend, hub.silent)
        module = loader.load_mtp(
            folder,
            main,
            len(_ids(engine)),
            hub.silent,
            dequantize=engine.config.dtype == "int8",
            make=engine.backend.make,
        )
    module = engine.backend.fuse_mtp(module)
    depth = min(config.depth, module.config.depth)
    wired = replace(config, depth=depth, reused=False)
    return replace(module, config=wired, layers=list(module.layers)[:depth])


def _ids(engine: Engine) -> Tensor:
    ids: Tensor = cast(Any, engine.loop.work.drafter).module.draft_ids
    return ids


def _count(folder: Path) -> int:
    """How many layers lie in a folder of ours."""
    prefix = f"{MTPNames().prefix}."
    return len({name.removeprefix(prefix).split(".")[0] for name in Checkpoint(folder) if name.startswith(prefix)})
