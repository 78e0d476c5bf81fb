"""What `auto` and unset settings mean for a model and a device, and which settings do not go together."""

import logging
from dataclasses import replace

import torch

from mtp_engine.assemble.backend import cannot_compile, check_tree, find_device
from mtp_engine.config import DRAFT_VOCAB, DType, EngineConfig, ModelConfig, MTPConfig, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.models import loader
from mtp_engine.models.native import why_not
from mtp_engine.parallel.shard import check_divides
from mtp_engine.protocols import Progress
from mtp_engine.runtime.threads import pool_size

_LOG = logging.getLogger("mtp_engine")
_INT8_DRAFT_VOCAB = 8192  # there half of what a draft costs is its head
_RULE_TREES = {
    rule: TreeShape.parse(tree)
    for rule, tree in (("rejection", "chain:3"), ("block", "chain:3"), ("rrs", "4x2x2"), ("traversal", "4x2x2"))
}
_DEFAULT_TREES = {
    "mtp": TreeShape.parse("auto"),
    "ngram": TreeShape.parse("chain:4"),
}  # measured fastest, see bench/LOG.md


def settle_machine(config: EngineConfig, progress: Progress) -> EngineConfig:
    """Choose the device, and set torch's threads. Raises EngineError for a device that is not here."""
    config = replace(config, device=str(find_device(config.device)))
    threads = pool_size(config.threads)
    if config.threads > threads:
        note = f"running with {threads} threads, not {config.threads}: this process has no more cores"
        progress(note, 0, None)
        _LOG.warning(note)
    torch.set_num_threads(threads)
    return config


def settle(config: EngineConfig, files: ModelFiles) -> EngineConfig:
    """Fill in what depends on the model, before any weight is read. config: of `settle_machine`. Raises EngineError for what
    does not fit the model or the device."""
    model = loader.read_config(files.folder, config.window_keys, config.experts)
    if config.max_context > model.max_context:
        raise EngineError(f"max_context is {config.max_context}; {files.name} was made for {model.max_context} tokens")
    device = torch.device(config.device).type
    mtp: MTPConfig | None = None
    if config.drafter == "mtp" and files.mtp_folder is not None:
        mtp = loader.read_mtp_config(files.mtp_folder, config.window_keys)
    if config.tensor_parallel > 1:
        config = _settle_shared(config, device, model, mtp)
    config = replace(config, dtype=_dtype(config, device, model, mtp))
    if config.draft_vocab is None:
        config = replace(config, draft_vocab=_INT8_DRAFT_VOCAB if config.dtype == "int8" else DRAFT_VOCAB)
    if config.drafter == "root":
        return config
    defaults = _DEFAULT_TREES[config.drafter]
    shape = config.tree or (_RULE_TREES if config.drafter == "mtp" else {}).get(config.verifier, defaults)
    if config.drafter == "mtp":
        if files.mtp_folder is None:
            raise EngineError(
                f"{files.name} has no MTP layers: use --drafter ngram or root, or name a folder of them (--mtp)"
            )
        assert mtp is not None
        if len(shape.widths) > mtp.depth and not mtp.reused:
            raise EngineError(f"tree shape {shape} is deeper than the model's {mtp.depth} MTP layers")
        plans = (device == "cpu" or config.attention == "exact") and config.verifier == "match"
        plans = plans and config.candidates == "auto"
        if shape.auto and not plans:
            shape = TreeShape.parse("tree:15" if device == "cuda" else "tree:7")
        check_tree(shape, config, device)
    return replace(config, tree=shape, max_context=config.max_context or model.max_context)


def _settle_shared(config: EngineConfig, device: str, model: ModelConfig, mtp: MTPConfig | None) -> EngineConfig:
    """What ranks run in that share a model. Raises EngineError where that cannot be divided, or asks for more than they can."""
    if config.dtype == "int8":
        raise EngineError("int8 runs in one process: use --dtype fp32 with --tensor-parallel, or leave that out")
    if config.attention == "flashinfer":
        raise EngineError("FlashInfer runs on one GPU: leave --attention out with --tensor-parallel")
    check_divides(config.tensor_parallel, model, mtp)
    dtype: DType = "fp32" if config.dtype == "auto" and device == "cpu" else config.dtype
    return replace(config, dtype=dtype, attention="torch" if device == "cpu" else config.attention)


def _dtype(config: EngineConfig, device: str, model: ModelConfig, mtp: MTPConfig | None) -> DType:
    """The number format that `auto` means here. Raises EngineError for int8 where there is none."""
    if device == "cuda":
        if config.dtype == "int8":
            raise EngineError("int8 is for CPUs: use --dtype bf16 on a GPU, or --device cpu")
        return "bf16" if config.dtype == "auto" else config.dtype
    if config.dtype not in ("auto", "int8"):
        return config.dtype
    if config.experts == "int4":
        if config.dtype == "int8":
            raise EngineError("int8 holds experts in 8 bits: use --dtype fp32 with --experts int4, or leave that out")
        return "fp32"
    layers = [*model.layers, *([mtp.layer] if mtp else [])]
    why = why_not(model.hidden_size, layers) or cannot_compile()
    if not why:
        return "int8"
    if config.dtype == "int8":
        raise EngineError(f"{why}; or use --dtype fp32")
    _LOG.warning("fp32 is used, which is several times slower: %s", why)
    return "fp32"
