"""What is to be trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from mtp_engine.training.dialogues import DialogueSettings
from mtp_engine.training.trainer import TrainSettings


@final
@dataclass(frozen=True)
class Job:
    """What is to be trained.

    corpus: a folder of shards; what it lacks is written there, from `texts` if there are any, else by the model itself.
    window: keys that a row of the layers sees; 0 is all. width: of their FFN; 0 is the main model's. features: see
    MTPConfig. fp8: the FFNs are kept in FP8. init: a folder of earlier layers to begin with. evaluation: a file of
    held-out prompts. hidden: see MTPConfig. tensor_parallel: how many processes share the main model, each on a device of its
    own, or a part of the CPU's cores.
    """

    model: str
    out: Path
    corpus: Path
    layers: int = 3
    chained: bool = True
    window: int = 128
    width: int = 0
    features: tuple[int, ...] = ()
    fp8: bool = False
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
    init: Path | None = None
    texts: Sequence[Path] = ()
    dialogues: DialogueSettings = field(default_factory=lambda: DialogueSettings(shards=12))
    settings: TrainSettings = field(default_factory=TrainSettings)
    evaluation: Path | None = None
    evaluated: int = 48
    device: str = "cpu"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    tensor_parallel: int = 1
    command: str = ""  # for the model card
    recipe: str = ""  # the same as a file
