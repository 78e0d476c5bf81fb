"""From a folder to a model: which family it is, its main model, and its MTP layers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from mtp_engine.config import AttentionConfig, Experts, LayerConfig, ModelConfig, MTPConfig, RopeConfig
from mtp_engine.errors import EngineError
from mtp_engine.kernels.int4 import LEAST
from mtp_engine.models import build, llama, mimo, mimo_v2_flash
from mtp_engine.models.checkpoint import Checkpoint, read_index, read_json
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.fields import Fields
from mtp_engine.models.layers import RotaryEmbedding
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.plan import Plan, Share, make_plan, make_share
from mtp_engine.models.tensors import main_tensors, mtp_tensors
from mtp_engine.models.weights import Makers, Weights
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Progress

_FAMILIES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "MiMoForCausalLM": mimo,
    "MiMoV2FlashForCausalLM": mimo_v2_flash,
}
"""Each has parse, parse_mtp, MTP_NAMES and USUAL_MTP_LAYERS, the number that its published models have."""


def read_config(folder: Path, window_keys: int = 0, experts: Experts = "auto") -> ModelConfig:
    """config.json of a main model. Raises EngineError for a family the engine does not know.

    window_keys: keys that a query of a sliding-window layer sees, itself included; 0 is the family's default. experts: see
    EngineConfig.
    """
    family, fields = _family(folder)
    config: ModelConfig = family.parse(fields, window_keys)
    return config if experts == "auto" else with_int4(config, str(folder))


def with_int4(config: ModelConfig, where: str) -> ModelConfig:
    """The same with experts in 4 bits. Raises EngineError about `where` if there are none that 4 bits can hold."""
    wide = [layer.intermediate for layer in config.layers if layer.moe]
    if not wide:
        raise EngineError(f"{where}: the model has no experts to be held in 4 bits; leave --experts out")
    if odd := [columns for columns in (config.hidden_size, *wide) if columns % LEAST]:
        raise EngineError(
            f"{where}: 4 bits take experts of a multiple of {LEAST} columns, not {odd[0]}; leave --experts out"
        )
    layers = (replace(layer, moe=layer.moe and replace(layer.moe, int4=True)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def load_main(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    *,
    dequantize: bool = False,
    window_keys: int = 0,
    experts: Experts = "auto",
    make: Makers = Makers(),  # noqa: B008  frozen
    group: Group = Group(),  # noqa: B008  frozen
) -> Decoder:
    """The main model of a Hugging Face folder. dequantize: FP8 weights become `dtype` as they are read. make: what then
    becomes of its matrices. experts: see EngineConfig. group: those who share the model; this rank's part is read."""
    config = read_config(folder, window_keys, experts)
    weights = Weights(
        Checkpoint(folder), dtype, device, fp8_block=config.fp8_block, dequantize=dequantize, make=make, group=group
    )
    return build.decoder(weights, config, progress, make.linear)


def has_mtp(folder: Path) -> bool:
    """Whether the folder of a main model holds MTP layers, too."""
    return _family_mtp(folder, 0) is not None


def read_mtp_config(folder: Path, window_keys: int = 0) -> MTPConfig:
    """The MTP layers of a folder: as the `mtp` object of our config.json describes them, or those of a main model."""
    raw = read_json(folder / "config.json")
    if "mtp" in raw:
        return _described(folder, raw["mtp"])
    if (config := _family_mtp(folder, window_keys)) is None:
        raise EngineError(f"{folder}: no MTP layers are in it; name a folder that has some (--mtp)")
    return config


def assume_mtp_config(folder: Path) -> tuple[MTPConfig | None, Literal["config", "family"]]:
    """The MTP layers that a model should have of which only config.json is there, and what their number is taken from:
    num_nextn_predict_layers of config.json, or else the usual number of the family's published models.

    An assumption: published files do not always agree with that field, so tensor names decide wherever there are some.
    """
    family, fields = _family(folder)
    stated = fields.raw.get("num_nextn_predict_layers") is not None
    count = fields.integer("num_nextn_predict_layers", family.USUAL_MTP_LAYERS, least=0)
    config: MTPConfig | None = family.parse_mtp(fields, [f"{family.MTP_NAMES.prefix}.{k}." for k in range(count)])
    return config, "config" if stated else "family"


def plan(folder: Path, config: ModelConfig, mtp: MTPConfig | None) -> Plan:
    """What the model of `folder` needs, from its configuration alone."""
    return make_plan(config, mtp, _family(folder)[0].MTP_NAMES)


def share(folder: Path, config: ModelConfig, mtp: MTPConfig | None, ranks: int) -> Share:
    """What each of so many processes would hold of the model of `folder`. Raises EngineError where it cannot be divided."""
    return make_share(config, mtp, _family(folder)[0].MTP_NAMES, ranks)


def expected_names(folder: Path) -> Iterator[str]:
    """The tensors that config.json calls for, MTP layers included."""
    config, mtp = read_config(folder), _family_mtp(folder, 0)
    for tensor in main_tensors(config):
        yield tensor.name
    for tensor in mtp_tensors(config, mtp, _family(folder)[0].MTP_NAMES) if mtp else ():
        yield tensor.name


def load_mtp(
    folder: Path,
    main: Decoder,
    draft_vocab: int,
    progress: Progress,
    *,
    dequantize: bool = False,
    window_keys: int = 0,
    make: Makers = Makers(),  # noqa: B008  frozen
    shared_head: bool = True,
) -> MTPModule:
    """The folder's MTP layers, sharing the main model's embedding and head, and divided among ranks as it is.

    draft_vocab: how many of the most frequent tokens they may propose (`draft_token_ids` lists them); 0 means all.
    make: what becomes of their matrices. shared_head: the main model's head may serve them, where it covers their tokens.
    """
    config = read_mtp_config(folder, window_keys)
    own = read_json(folder / "config.json").get("mtp")
    names = build.MTPNames() if own else _family(folder)[0].MTP_NAMES
    checkpoint = Checkpoint(folder)
    weights = Weights(
        checkpoint,
        main.embedding.dtype,
        main.embedding.device,
        fp8_block=own.get("fp8_block") if own else read_config(folder).fp8_block,
        dequantize=dequantize or bool(own),  # ours are small: FP8 only saves them space on disk
        make=make,
        group=main.group,
    )
    draft_ids = _draft_ids(checkpoint, main, draft_vocab)
    # a list of all tokens may have an order of its own
    whole = torch.arange(main.config.vocab_size, device=draft_ids.device)
    shared = shared_head and torch.equal(draft_ids, whole)
    head = main.unembed if shared else make.linear(_head_rows(main, draft_ids), None)
    count = 1 if config.reused else config.depth
    layers = []
    for k in range(count):
        progress("loading MTP layers", k + 1, count)
        layers.append(build.mtp_layer(weights, names, k, config, main, head))
    rotary = RotaryEmbedding(config.layer.attention.rope, main.embedding.device)
    mix = build.feature_mix(weights, config, main.config.hidden_size, main.config.norm_eps)
    shard = main.group.shard
    own = shard.part(len(draft_ids))
    draft_ids = draft_ids[own.start : own.stop]
    return MTPModule(shard.mtp(config), layers, main.embedding, main.norm, draft_ids, rotary, mix, group=main.group)


def _family(folder: Path) -> tuple[ModuleType, Fields]:
    path = folder / "config.json"
    raw = read_json(path)
    names = raw.get("architectures") or ["(none named)"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise EngineError(f"{path}: architectures is {names!r}, not a list of names")
    if names[0] not in _FAMILIES:
        raise EngineError(f"{path}: architecture {names[0]} is not supported; known: {', '.join(_FAMILIES)}")
    return _FAMILIES[names[0]], Fields(raw, str(path))


def _family_mtp(folder: Path, window_keys: int) -> MTPConfig | None:
    family, fields = _family(folder)
    names = {*read_index(folder), *(Checkpoint(folder) if any(folder.glob("*.safetensors")) else ())}
    config: MTPConfig | None = family.parse_mtp(fields, sorted(names), window_keys)
    return config


def _described(folder: Path, raw: dict[str, Any]) -> MTPConfig:
    """Our own description: the keys are the fields of MTPConfig."""
    try:
        attention = dict(raw["attention"])
        scaling = attention.pop("rope_scaling", None)
        rope = RopeConfig(
            attention.pop("rope_dim"), float(attention.pop("rope_theta")), tuple(scaling) if scaling else None
        )
        layer = LayerConfig(AttentionConfig(rope=rope, **attention), raw["intermediate_size"])
        switches = {key: raw[key] for key in ("depth", "chained", "reused", "hidden", "concat", "own_norm")}
        return MTPConfig(layer=layer, features=tuple(raw.get("features", ())), **switches)
    except KeyError as missing:
        raise EngineError(f"{folder / 'config.json'}: the field mtp.{missing.args[0]} is missing") from None
    except TypeError as error:
        raise EngineError(f"{folder / 'config.json'}: mtp.attention is wrong: {error}") from None


def _draft_ids(checkpoint: Checkpoint, main: Decoder, wanted: int) -> torch.Tensor:
    """The tokens the draft head covers, [n] int64: as many for each rank. Without a list of frequent tokens, all of them."""
    vocab, device = main.config.vocab_size, main.embedding.device
    if wanted and "draft_token_ids" in checkpoint:
        ids = checkpoint.raw("draft_token_ids", checkpoint.shape("draft_token_ids"))[:wanted].long()
        ids = ids[: len(ids) - len(ids) % main.group.size]
        if not bool(((ids >= 0) & (ids < vocab)).all()):
            raise EngineError(f"{checkpoint.folder}: draft_token_ids names tokens outside the vocabulary of {vocab}")
        return ids.to(device)
    return torch.arange(vocab, device=device)


def _head_rows(main: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """This rank's part of the main head's rows for tokens `ids` [n], [n / ranks, H]. Any rank may hold a token's row, so
    each turn all give what one of them needs."""
    group, weight = main.group, main.head_weight
    if group.size == 1:
        return weight[ids]
    held, rows = group.shard.part(main.config.vocab_size), weight[:0]
    for rank, asked in enumerate(ids.chunk(group.size)):
        here = (asked >= held.start) & (asked < held.stop)
        given = weight[(asked - held.start).clamp(0, len(held) - 1)] * here[:, None]
        total = group.sum(given, weight.dtype)
        rows = total if rank == group.shard.rank else rows
    return rows
