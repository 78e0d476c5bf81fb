"""What a checkpoint holds, from its headers alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from mtp_engine import hub
from mtp_engine.config import MTPConfig
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.loader import read_config, read_mtp_config
from mtp_engine.protocols import Progress

_KV_BYTES = {"fp32": 4, "bf16": 2}
_OWN_MTP = ".mtp."  # in the names of MTP tensors that lie among the main model's


@final
@dataclass(frozen=True)
class ModelReport:
    """A main model and its MTP layers on disk.

    dtypes, mtp_dtypes: parameters by stored dtype as safetensors names it (BF16, F8_E4M3, ...). files, mtp_files:
    bytes by file name; MTP layers inside the main model's files leave mtp_files empty. mtp_depth: tokens the MTP
    layers can draft in a row, more than mtp_layers where one layer serves every depth. kv_bytes_per_token: by engine
    dtype, of the main model's layers with full attention (those with a sliding window keep a fixed number of rows).
    """

    name: str
    folder: str
    family: str
    layers: int
    window_layers: int
    mtp_layers: int
    mtp_depth: int
    hidden_size: int
    vocab_size: int
    max_context: int
    parameters: int
    mtp_parameters: int
    dtypes: dict[str, int]
    mtp_dtypes: dict[str, int]
    files: dict[str, int]
    mtp_files: dict[str, int]
    kv_bytes_per_token: dict[str, int]


def inspect_model(name: str, *, mtp: str | None = None, progress: Progress = hub.silent) -> ModelReport:
    """Describe the model `name` (as in `hub.locate`, which fetches a registered one) without loading its weights.

    mtp: a folder of MTP layers to look at instead of the model's own. Raises EngineError for what a user can mend.
    """
    files = hub.locate(name, mtp=mtp, progress=progress)
    config = read_config(files.folder)
    main = _checkpoint(files.folder)
    dtypes = _parameters(main, (tensor for tensor in main if _OWN_MTP not in tensor))
    mtp_config: MTPConfig | None
    if files.mtp_folder:
        mtp_config = read_mtp_config(files.mtp_folder)
        heads = _checkpoint(files.mtp_folder)
        mtp_dtypes = _parameters(heads, heads)
    else:
        mtp_config = config.mtp
        mtp_dtypes = _parameters(main, (tensor for tensor in main if _OWN_MTP in tensor))
    full = [layer.attention for layer in config.layers if layer.attention.window is None]
    width = sum(attention.kv_heads * (attention.qk_dim + attention.v_dim) for attention in full)
    depth = mtp_config.depth if mtp_config else 0
    return ModelReport(
        name=files.name,
        folder=str(files.folder),
        family=config.family,
        layers=len(config.layers),
        window_layers=len(config.layers) - len(full),
        mtp_layers=1 if mtp_config and mtp_config.reused else depth,
        mtp_depth=depth,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        parameters=sum(dtypes.values()),
        mtp_parameters=sum(mtp_dtypes.values()),
        dtypes=dtypes,
        mtp_dtypes=mtp_dtypes,
        files=_sizes(files.folder),
        mtp_files=_sizes(files.mtp_folder) if files.mtp_folder else {},
        kv_bytes_per_token={dtype: width * size for dtype, size in _KV_BYTES.items()},
    )


def _checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, torch.float32, torch.device("cpu"))  # nothing is converted: only headers are read


def _parameters(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """Parameters by stored dtype, the most frequent first; whole-number tensors are tables, not parameters."""
    counts: Counter[str] = Counter()
    for name in names:
        dtype = checkpoint.stored_dtype(name)
        if not dtype.startswith(("I", "U", "BOOL")):
            size = 1
            for extent in checkpoint.shape(name):
                size *= extent
            counts[dtype] += size
    return dict(counts.most_common())


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
