"""From folders to models that run as graphs, which are kept under `root`."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch

from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.build import MTPNames
from mtp_engine.models.checkpoint import Checkpoint, read_json
from mtp_engine.models.onnx import store
from mtp_engine.models.onnx.blocks import Precision
from mtp_engine.models.onnx.build import Builder
from mtp_engine.models.onnx.model import GraphDecoder, GraphMTP
from mtp_engine.models.onnx.probe import second_moments
from mtp_engine.models.weights import Weights

_CPU = torch.device("cpu")


def load_main(
    folder: Path, root: Path, *, threads: int, precision: Precision, features: tuple[int, ...] = (),
    texts: Sequence[Sequence[int]] = (),
) -> GraphDecoder:  # fmt: skip
    """The main model of a Hugging Face folder. features: layers whose outputs its MTP layers read. texts: token ids, some
    thousand in all, over which rounding errors of weights are made to cancel; none: weights are rounded one by one.
    Raises EngineError where a model has no graph."""
    config = loader.read_config(folder)
    if why := store.can(config):
        raise EngineError(f"{folder}: {why}; use --dtype fp32")
    builder = Builder(store.Checkpoints(_weights(folder, config.fp8_block)), config, precision)
    key = {"main": _identity(folder), "precision": precision, "features": features, "texts": texts}
    path = store.prepared(root, key, lambda new: store.write_main(new, _seen(builder, texts, threads), features))
    return store.open_main(path, config, features, threads)


def load_mtp(
    main_folder: Path, folder: Path, main: GraphDecoder, root: Path, *, threads: int, precision: Precision,
    draft_vocab: int = 0,
) -> GraphMTP:  # fmt: skip
    """The MTP layers of `folder` for `main`, which must give the features that they read.
    draft_vocab: how many of the most frequent tokens they may propose; 0 means all."""
    config = loader.read_mtp_config(folder)
    assert main.features == config.features, "the main model was loaded for other MTP layers"
    own = read_json(folder / "config.json").get("mtp")
    names = MTPNames() if own else loader.family_of(folder)[0].MTP_NAMES
    block = own.get("fp8_block") if own else loader.read_config(folder).fp8_block
    layers = _weights(folder, block)
    ids = loader.draft_ids_of(layers.checkpoint, main, draft_vocab)  # type: ignore[arg-type]
    reader = store.Checkpoints(_weights(main_folder, main.config.fp8_block), layers)
    builder = Builder(reader, main.config, precision)
    key = {"main": _identity(main_folder), "mtp": _identity(folder), "precision": precision, "vocab": len(ids)}
    path = store.prepared(root, key, lambda new: store.write_mtp(new, builder, names, config, ids))
    return store.open_mtp(path, config, main, ids, threads)


def calibration() -> list[list[dict[str, str]]]:
    """Conversations for `texts`, to be put through the model's chat template and tokenizer: some 4,000 tokens that the default
    model wrote."""
    file = resources.files("mtp_engine") / "assets" / "calibration.jsonl"
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def _seen(builder: Builder, texts: Sequence[Sequence[int]], threads: int) -> Builder:
    if not texts:
        return builder
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return replace(builder, seconds=second_moments(builder, texts, Path(folder), threads))


def _weights(folder: Path, block: int | None) -> Weights:
    return Weights(Checkpoint(folder), torch.float32, _CPU, fp8_block=block, dequantize=True)


def _identity(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when a checkpoint's files do."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
