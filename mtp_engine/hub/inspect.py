"""What a checkpoint holds, from its headers alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, final

from mtp_engine.config import Experts, MTPConfig
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint, read_index
from mtp_engine.models.plan import Plan, Share
from mtp_engine.protocols import Progress

_KV_BYTES = {"fp32": 4, "bf16": 2}
_OWN_MTP = (".mtp.", ".mtp_layers.")  # in the names of MTP tensors that lie among the main model's
_SCALE = "_scale_inv"
_PICKLED = ("*.bin", "*.pt", "*.pth")
MTPSource = Literal["weights", "config", "family"]
"""Where the number of MTP layers comes from: files or their index; or assumed, see loader.assume_mtp_config."""


@final
@dataclass(frozen=True)
class ModelReport:
    """A main model and its MTP layers: as its files say, or, where there are no weights yet, as config.json says.

    dtypes, mtp_dtypes: parameters by stored dtype as safetensors names it (BF16, F8_E4M3, ...). files, mtp_files:
    bytes by file name, none without weights; MTP layers inside the main model's files leave mtp_files empty.
    mtp_depth: tokens the MTP layers can draft in a row, more than mtp_layers where one layer serves every depth.
    mtp_source: how their number is known; it is assumed unless it is "weights".
    kv_bytes_per_token: by engine dtype, of the main model's layers with full attention (those with a sliding window
    keep a fixed number of rows). plan: what config.json calls for. share: what each of several processes
    holds, or one with experts in 4 bits.
    """

    name: str
    folder: str
    family: str
    layers: int
    window_layers: int
    mtp_layers: int
    mtp_depth: int
    mtp_source: MTPSource
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
    plan: Plan
    share: Share | None


def inspect_model(
    name: str, *, mtp: str | None = None, ranks: int = 1, experts: Experts = "auto", progress: Progress = hub.silent
) -> ModelReport:
    """Describe the model `name` (as in `hub.locate`, which fetches a registered one) without loading its weights.

    A folder with config.json alone is enough; the index of the weights tells how many MTP layers there are, which is
    otherwise assumed. mtp: a folder of MTP layers to look at instead of the model's own. ranks: processes that would share
    the model. experts: how they would be held. Raises EngineError for what a user can mend.
    """
    weightless = _is_plan(Path(name))
    if weightless:
        files = hub.ModelFiles(name, Path(name), Path(mtp).expanduser() if mtp else None)
    else:
        files = hub.locate(name, mtp=mtp, progress=progress)
    config = loader.read_config(files.folder)
    apart = files.mtp_folder
    mtp_config, source = _mtp(files, weightless)
    plan = loader.plan(files.folder, config, mtp_config)
    dtypes, mtp_dtypes = plan.parameters_by_dtype, plan.mtp_parameters_by_dtype
    if main := None if weightless else Checkpoint(files.folder):
        dtypes = _parameters(main, (tensor for tensor in main if not _is_mtp(tensor)))
    if heads := Checkpoint(apart) if apart else main:
        mtp_dtypes = _parameters(heads, (tensor for tensor in heads if apart or _is_mtp(tensor)))
    full = [layer.attention for layer in config.layers if layer.attention.window is None]
    width = sum(attention.kv_size for attention in full)
    depth = mtp_config.depth if mtp_config else 0
    return ModelReport(
        name=files.name,
        folder=str(files.folder),
        family=config.family,
        layers=len(config.layers),
        window_layers=len(config.layers) - len(full),
        mtp_layers=1 if mtp_config and mtp_config.reused else depth,
        mtp_depth=depth,
        mtp_source=source,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        parameters=sum(dtypes.values()),
        mtp_parameters=sum(mtp_dtypes.values()),
        dtypes=dtypes,
        mtp_dtypes=mtp_dtypes,
        files=_sizes(files.folder),
        mtp_files=_sizes(apart) if apart else {},
        kv_bytes_per_token={dtype: width * size for dtype, size in _KV_BYTES.items()},
        plan=plan,
        share=_share(files, mtp_config, ranks, experts),
    )


def _share(files: hub.ModelFiles, mtp: MTPConfig | None, ranks: int, experts: Experts) -> Share | None:
    if ranks == 1 and experts == "auto":
        return None
    return loader.share(files.folder, loader.read_config(files.folder, experts=experts), mtp, ranks)


def _mtp(files: hub.ModelFiles, weightless: bool) -> tuple[MTPConfig | None, MTPSource]:
    folder = files.mtp_folder or files.folder
    if files.mtp_folder or loader.has_mtp(folder):
        return loader.read_mtp_config(folder), "weights"
    if weightless and not read_index(folder):
        return loader.assume_mtp_config(folder)
    return None, "weights"


def _is_plan(folder: Path) -> bool:
    """Whether a folder describes a model whose weights are not there. Raises EngineError if its index is incomplete."""
    weights = (path for pattern in ("*.safetensors", *_PICKLED) for path in folder.glob(pattern))
    if not (folder / "config.json").is_file() or any(weights):
        return False
    index = read_index(folder)
    if index and (missing := next((n for n in loader.expected_names(folder) if n not in index), None)):
        raise EngineError(f"{folder}: the index does not list {missing}, which config.json calls for")
    return True


def _is_mtp(tensor: str) -> bool:
    return any(mark in tensor for mark in _OWN_MTP)


def _parameters(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """Parameters by stored dtype, the most frequent first; whole-number tensors are tables, not parameters."""
    counts: Counter[str] = Counter()
    for name in names:
        dtype = checkpoint.stored_dtype(name)
        if not dtype.startswith(("I", "U", "BOOL")) and not name.endswith(_SCALE):
            counts[dtype] += prod(checkpoint.shape(name))
    return dict(counts.most_common())


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
