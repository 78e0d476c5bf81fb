"""What a model needs before any weight is there: parameters, bytes and KV cache, from its configuration alone."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from mtp_engine.config import AttentionConfig, ModelConfig, MTPConfig
from mtp_engine.models.build import MTPNames
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors
from mtp_engine.parallel.shard import Shard, check_divides

GPU_GB = (80, 141)  # an H100 and an H200
_USABLE = 0.9  # of a GPU's memory; the rest is the runtime's, and activations
_NODES = 4  # rows a step appends to a ring: a tree of chain:3 with its root
_BF16 = 2


@final
@dataclass(frozen=True)
class Plan:
    """Sizes of a model as its configuration calls for them. KV figures are bytes in bf16.

    active_parameters: those read for one token: without the embedding table, of which it is one row, and with the
    experts that are chosen. kv_per_token: layers with full attention. kv_per_sequence, mtp_kv_per_sequence: the rings
    of the sliding-window layers, whatever the length. kv_full_context: all of it at the longest context.
    gpus: GPUs that hold the weights and one full context, by their memory in GB.
    """

    parameters: int
    active_parameters: int
    mtp_parameters: int
    mtp_layer_parameters: int
    parameters_by_dtype: dict[str, int]
    mtp_parameters_by_dtype: dict[str, int]
    bytes_by_dtype: dict[str, int]
    kv_per_token: int
    kv_per_sequence: int
    mtp_kv_per_token: int
    mtp_kv_per_sequence: int
    kv_full_context: int
    gpus: dict[str, int]


def make_plan(config: ModelConfig, mtp: MTPConfig | None, names: MTPNames) -> Plan:
    """The plan of a main model and its MTP layers, stored as the hub's checkpoints are."""
    main = list(main_tensors(config))
    heads = list(mtp_tensors(config, mtp, names)) if mtp else []
    layers = [layer.attention for layer in config.layers]
    mtp_layers = [mtp.layer.attention] * (1 if mtp.reused else mtp.depth) if mtp else []
    total, mtp_total = _count(main), _count(heads)
    per_token, mtp_per_token = _kv_per_token(layers), _kv_per_token(mtp_layers)
    per_sequence, mtp_per_sequence = _kv_per_sequence(layers), _kv_per_sequence(mtp_layers)
    full = (per_token + mtp_per_token) * config.max_context + per_sequence + mtp_per_sequence
    needed = sum(tensor.nbytes for tensor in (*main, *heads)) + full
    return Plan(
        parameters=total,
        active_parameters=_active(main, config),
        mtp_parameters=mtp_total,
        mtp_layer_parameters=mtp_total // max(1, len(mtp_layers)),
        parameters_by_dtype=_by_dtype(tensor for tensor in main if tensor.is_parameter),
        mtp_parameters_by_dtype=_by_dtype(tensor for tensor in heads if tensor.is_parameter),
        bytes_by_dtype=_by_dtype((*main, *heads), in_bytes=True),
        kv_per_token=per_token,
        kv_per_sequence=per_sequence,
        mtp_kv_per_token=mtp_per_token,
        mtp_kv_per_sequence=mtp_per_sequence,
        kv_full_context=full,
        gpus={f"{size} GB": math.ceil(needed / (size * 1e9 * _USABLE)) for size in GPU_GB},
    )


@final
@dataclass(frozen=True)
class Share:
    """What each of `ranks` processes holds of a model that they share: bytes as published, by part of the model, and KV
    bytes in bf16. Where ranks outnumber key heads, several hold the same ones.

    kv_per_token, kv_per_sequence, kv_full_context: of main model and MTP layers together; see Plan. gpus: by memory in GB,
    whether weights and one full context fit.
    """

    ranks: int
    weights: dict[str, int]
    kv_per_token: int
    kv_per_sequence: int
    kv_full_context: int
    gpus: dict[str, bool]


def make_share(config: ModelConfig, mtp: MTPConfig | None, names: MTPNames, ranks: int) -> Share:
    """Raises EngineError where the model cannot be divided among so many."""
    check_divides(ranks, config, mtp)
    shard = Shard(0, ranks)
    held, held_mtp = shard.model(config), shard.mtp(mtp) if mtp else None
    divided = ("lm_head.weight", f".{names.projection}.weight")  # the other shapes follow from the configuration
    weights: Counter[str] = Counter()
    for tensor in main_tensors(held):
        weights[_part(tensor.name)] += tensor.nbytes // (ranks if tensor.name.endswith(divided) else 1)
    for tensor in mtp_tensors(held, held_mtp, names) if held_mtp else ():
        weights["MTP layers"] += tensor.nbytes // (ranks if tensor.name.endswith(divided) else 1)
    layers = [layer.attention for layer in held.layers]
    if held_mtp:
        layers += [held_mtp.layer.attention] * (1 if held_mtp.reused else held_mtp.depth)
    per_token, per_sequence = _kv_per_token(layers), _kv_per_sequence(layers)
    full = per_token * config.max_context + per_sequence
    needed = weights.total() + full
    return Share(
        ranks=ranks,
        weights=dict(weights.most_common()),
        kv_per_token=per_token,
        kv_per_sequence=per_sequence,
        kv_full_context=full,
        gpus={f"{size} GB": needed <= size * 1e9 * _USABLE for size in GPU_GB},
    )


def _part(name: str) -> str:
    for mark, part in (
        (".experts.", "experts"), (".self_attn.", "attention"), (".mlp.gate.", "routers"), (".mlp.", "dense FFN"),
        ("embed_tokens", "embedding"), ("lm_head", "output head"),
    ):  # fmt: skip
        if mark in name:
            return part
    return "norms"


def _count(tensors: list[Stored]) -> int:
    return sum(tensor.size for tensor in tensors if tensor.is_parameter)


def _active(tensors: list[Stored], config: ModelConfig) -> int:
    shared = sum(t.size for t in tensors if t.is_parameter and ".experts." not in t.name)
    chosen = sum(
        layer.moe.per_token * 3 * layer.intermediate * config.hidden_size for layer in config.layers if layer.moe
    )
    return shared + chosen - (0 if config.tied_head else config.vocab_size * config.hidden_size)


def _by_dtype(tensors: Iterable[Stored], *, in_bytes: bool = False) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.nbytes if in_bytes else tensor.size
    return dict(counts.most_common())


def _row(a: AttentionConfig) -> int:
    return a.kv_size * _BF16


def _kv_per_token(layers: list[AttentionConfig]) -> int:
    return sum(_row(a) for a in layers if a.window is None)


def _kv_per_sequence(layers: list[AttentionConfig]) -> int:
    """Rings of window + nodes - 1 rows."""
    return sum(_row(a) * (a.window + _NODES - 1) for a in layers if a.window is not None)
