"""Graphs on disk: written once per model and settings, checked and opened from then on."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from mtp_engine.config import ModelConfig, MTPConfig
from mtp_engine.errors import EngineError
from mtp_engine.models.build import MTPNames
from mtp_engine.models.onnx.build import Builder
from mtp_engine.models.onnx.model import GraphDecoder, GraphMTP
from mtp_engine.models.onnx.session import Session
from mtp_engine.models.weights import Weights

VERSION = 1  # of what graphs compute; raise it with every change of their arithmetic
_MANIFEST = "manifest.json"


@final
@dataclass(frozen=True)
class Checkpoints:
    """A Reader: the tensors of a main model, and of MTP layers that lie elsewhere."""

    main: Weights
    mtp: Weights | None = None

    def _of(self, name: str) -> Weights:
        return self.mtp if self.mtp is not None and name in self.mtp.checkpoint else self.main

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._of(name).tensor(name, *shape)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        stack = self._of(f"{name}.weight").experts([[(name, rows)]], columns)
        return stack.matrix(0, torch.float32)


def can(config: ModelConfig) -> str:
    """Why a model has no graph; empty if it has one."""
    if any(layer.moe for layer in config.layers):
        return "mixtures of experts have no int8 graph yet"
    if any(layer.attention.sink for layer in config.layers):
        return "attention sinks have no int8 graph yet"
    return ""


def prepared(root: Path, key: Mapping[str, object], write: Callable[[Path], None]) -> Path:
    """The folder below `root` that holds what `write` writes for this key. Written if it is not there or not whole."""
    text = json.dumps({"version": VERSION, **key}, sort_keys=True, default=str)
    folder = root / sha256(text.encode()).hexdigest()[:24]
    if _whole(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    try:
        write(new)
        files = {path.name: _digest(path) for path in sorted(new.iterdir())}
        (new / _MANIFEST).write_text(json.dumps({"key": json.loads(text), "files": files}, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(new, folder)
    except OSError as error:
        if not _whole(folder):  # else another process was faster
            raise EngineError(f"{folder}: the model's graphs cannot be written ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_digest(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_main(folder: Path, builder: Builder, features: tuple[int, ...]) -> None:
    builder.embedding(folder / "embedding.bin")
    builder.main(folder / "body.onnx", features)
    builder.head(folder / "head.onnx", "model.norm", None)


def open_main(folder: Path, config: ModelConfig, features: tuple[int, ...], threads: int) -> GraphDecoder:
    table = np.memmap(folder / "embedding.bin", np.float32, "c", shape=(config.vocab_size, config.hidden_size))
    body, head = (Session(folder / f"{name}.onnx", threads) for name in ("body", "head"))
    return GraphDecoder(config, torch.from_numpy(table), body, head, features)


def write_mtp(folder: Path, builder: Builder, names: MTPNames, config: MTPConfig, draft_ids: Tensor) -> None:
    if mixes(config):
        builder.mix(folder / "mix.onnx", config)
    for k in range(1 if config.reused else config.depth):
        builder.level(folder / f"level{k}.onnx", names, k, config)
        norm = f"{names.prefix}.{k}.{names.final_norm}" if config.own_norm else "model.norm"
        builder.head(folder / f"head{k}.onnx", norm, draft_ids.numpy())


def open_mtp(folder: Path, config: MTPConfig, main: GraphDecoder, draft_ids: Tensor, threads: int) -> GraphMTP:
    count = 1 if config.reused else config.depth
    layers, heads = ([Session(folder / f"{name}{k}.onnx", threads) for k in range(count)] for name in ("level", "head"))
    mix = Session(folder / "mix.onnx", threads) if mixes(config) else None
    return GraphMTP(config, layers, heads, main.embedding, draft_ids, mix)


def mixes(config: MTPConfig) -> bool:
    """Whether MTP layers read something else than the main model's hidden state."""
    return bool(config.features) or config.hidden == "post_norm"
