"""Which weights these are, without reading all of them, and which engines may share what they have read."""

from hashlib import sha256
from importlib.metadata import version

import torch

from mtp_engine.config import EngineConfig, ModelConfig
from mtp_engine.hub.hub import ModelFiles

_SAMPLES, _SAMPLE_BYTES = 64, 16384  # of each file


def weights_identity(files: ModelFiles) -> str:
    """A hash of names, sizes and samples of a model's weight files: retraining changes nearly every value of a matrix, so
    samples tell models apart; they do not prove that a file is undamaged."""
    found = sha256()
    folders = [files.folder, *([files.mtp_folder] if files.mtp_folder else [])]
    for file in sorted({file for folder in folders for file in folder.glob("*.safetensors")}):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()


def prefix_maker(files: ModelFiles, model: ModelConfig, config: EngineConfig, reread: int) -> str:
    """A hash of all that must be the same for a saved beginning of a text to be of use. config: settled. reread: the
    drafter's (see protocols.Drafter)."""
    about = (
        version("mtp-engine"), torch.__version__, model, config.dtype, config.device, config.attention,
        config.window_keys, config.drafter, config.draft_int8, reread, weights_identity(files),
    )  # fmt: skip
    return sha256(repr(about).encode()).hexdigest()
