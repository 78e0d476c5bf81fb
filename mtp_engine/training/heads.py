"""The MTP layers of a frozen main model: their configuration, their first values, and the folder they are kept in."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig
from mtp_engine.errors import EngineError
from mtp_engine.hub.files import atomically
from mtp_engine.kernels.fp8 import FP8, dequantise_blocks, plain_rows, quantise_blocks
from mtp_engine.models import build
from mtp_engine.models.checkpoint import Checkpoint, read_json
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Head, RotaryEmbedding
from mtp_engine.models.mtp import MTPModule
from mtp_engine.training.trainable import TrainableWeights, named_noise

WEIGHTS = "mtp.safetensors"
DRAFT_IDS = "draft_token_ids"
_FP8_BLOCK = 64
_NAMES = build.MTPNames()


def plan_heads(
    model: ModelConfig, layers: int, *, chained: bool, window: int, width: int = 0, features: Sequence[int] = (),
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm",
) -> MTPConfig:  # fmt: skip
    """MTP layers like the main model's last layer. window: keys a row sees, 0 = all; width: of the FFN, 0 = the same;
    features, hidden: see MTPConfig.

    Raises EngineError for a layer that cannot be copied, and for features that are no layers before the last.
    """
    if list(features) != sorted({f for f in features if 0 <= f < len(model.layers) - 1}):
        raise EngineError(f"features are layers from 0 to {len(model.layers) - 2}, in rising order, each once")
    last = model.layers[-1]
    dense = max((layer.intermediate for layer in model.layers if layer.moe is None), default=0)
    width = width or (last.intermediate if last.moe is None else dense)
    if not width:
        raise EngineError("the model has no dense FFN to size the MTP layers by: give --width")
    attention = replace(last.attention, window=window or None)
    layer = LayerConfig(attention, width)
    return MTPConfig(depth=layers, layer=layer, chained=chained, hidden=hidden, features=tuple(features))


def build_heads(config: MTPConfig, main: Decoder, weights: TrainableWeights) -> MTPModule:
    """A module of fresh parameters over the main model's embedding and head. Ranks that share that have the layers whole, and
    each its tokens of the head."""
    layers = [build.mtp_layer(weights, _NAMES, k, config, main, main.unembed) for k in range(config.depth)]
    rotary = RotaryEmbedding(config.layer.attention.rope, main.embedding.device)
    own = main.group.shard.part(main.vocab_size)
    draft_ids = torch.arange(own.start, own.stop, device=main.embedding.device)
    mix = build.feature_mix(weights, config, main.config.hidden_size, main.config.norm_eps)
    return MTPModule(config, layers, main.embedding, main.norm, draft_ids, rotary, mix, group=main.group)


def whole_head(main: Decoder) -> Tensor:
    """The main model's head, [V, H], on every rank."""
    return main.group.gather(main.head_weight).flatten(0, 1)


def proposing(module: MTPModule, ids: Tensor, rows: Tensor) -> MTPModule:
    """The layers with a head for some tokens, as an engine has them. ids: [n] int64; rows: of the head, [n, H]. Of ranks each
    takes its part; without the last ones where they cannot be divided."""
    shard = module.group.shard
    own = shard.part(len(ids) - len(ids) % shard.size)
    ids, rows = ids[own.start : own.stop], rows[own.start : own.stop]

    def linear(normed: Tensor) -> Tensor:
        return F.linear(normed, rows)

    layers = [replace(layer, head=Head(cast(Head, layer.head).norm, linear)) for layer in module.layers]
    return replace(module, layers=layers, draft_ids=ids)


@final
@dataclass(frozen=True)
class FirstValues:
    """What the layers begin with: earlier MTP layers where they are given, else the main model's last block, and a
    projection that passes the hidden state on. The earlier ones may be narrower: the FFN's new rows start at no effect.
    """

    main: Checkpoint
    last_layer: int
    hidden_rms: float  # of the main model's hidden states: hnorm restores the size that its block knows
    earlier: Checkpoint | None = None
    seed: int = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.earlier is not None and name in self.earlier:
            return self._widened(name, shape, _stored(self.earlier, name))
        if name.startswith(build.FEATURES):
            return torch.ones(shape) if "norm" in name else torch.zeros(shape)  # they begin with no effect
        tail = name.removeprefix(f"{_NAMES.prefix}.").split(".", 1)[1]
        if tail == "enorm.weight":
            return torch.ones(shape)
        if tail == "hnorm.weight":
            return torch.full(shape, self.hidden_rms)
        if tail == "eh_proj.weight":
            noise = self._noise(name, (shape[0], shape[0])) * (0.5 * shape[0] ** -0.5)
            return torch.cat([noise, torch.eye(shape[0])], 1)
        source = f"model.layers.{self.last_layer}.{tail.replace(_NAMES.ffn_norm, build.FFN_NORM)}"
        if tail == "final_layernorm.weight":
            source = "model.norm.weight"
        if source in self.main and self.main.torch_dtype(source).itemsize > 1:
            return self._widened(name, shape, self.main.raw(source, self.main.shape(source)).float())
        return torch.ones(shape) if "norm" in name else self._noise(name, shape) * shape[-1] ** -0.5

    def _widened(self, name: str, shape: tuple[int, ...], values: Tensor) -> Tensor:
        if values.shape == shape:
            return values
        if "mlp." not in name or any(new < old for new, old in zip(shape, values.shape, strict=True)):
            raise EngineError(f"{name} has shape {list(values.shape)}; the layers to be trained want {list(shape)}")
        out = torch.zeros(shape)
        if "down_proj" not in name:  # new rows that nothing reads yet
            out = self._noise(name, shape) * shape[-1] ** -0.5
        out[: values.shape[0], : values.shape[1]] = values
        return out

    def _noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return named_noise(name, shape, self.seed)


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of earlier layers in fp32, FP8 ones (see save_heads) with their scales. Raises EngineError."""
    values, scales = checkpoint.raw(name, checkpoint.shape(name)), f"{name}_scale_inv"
    if values.dtype != FP8:
        return values.float()
    block = read_json(checkpoint.folder / "config.json").get("mtp", {}).get("fp8_block")
    if not block or scales not in checkpoint:
        raise checkpoint.error(name, "is FP8 in a layout that training does not read: begin without --init")
    rows = plain_rows([len(values)], block)
    return dequantise_blocks(values, checkpoint.raw(scales, checkpoint.shape(scales)), rows, block, torch.float32)


def save_heads(
    folder: Path, config: MTPConfig, weights: Mapping[str, Tensor], draft_ids: Tensor, about: Mapping[str, Any],
    *, fp8: bool = False,
) -> None:  # fmt: skip
    """Write mtp.safetensors and config.json, each whole or not at all. about: further fields of config.json.

    Tensors are bf16; fp8: matrices are FP8 with a scale per block, but for attention's. draft_ids: [n] int32, tokens by falling
    frequency, for the reduced draft vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name in sorted(weights):
        value = weights[name].detach().cpu()
        if fp8 and value.dim() == 2 and "self_attn" not in name:
            rows = len(value)
            blocks = quantise_blocks(value, plain_rows([rows], _FP8_BLOCK), -(-rows // _FP8_BLOCK), _FP8_BLOCK)
            tensors |= dict(zip((name, f"{name}_scale_inv"), blocks, strict=True))
        else:
            tensors[name] = value.bfloat16().contiguous()
    attention = _attention_fields(config.layer.attention)
    mtp: dict[str, Any] = {
        "depth": config.depth, "chained": config.chained, "reused": config.reused, "hidden": config.hidden,
        "concat": config.concat, "own_norm": config.own_norm, "intermediate_size": config.layer.intermediate,
        "attention": attention,
    }  # fmt: skip
    mtp |= {"features": list(config.features)} if config.features else {}
    mtp |= {"fp8_block": _FP8_BLOCK} if fp8 else {}
    atomically(folder / WEIGHTS, lambda path: save_file({**tensors, DRAFT_IDS: draft_ids.to("cpu", torch.int32)}, path))
    text = json.dumps({**about, "mtp": mtp}, indent=2) + "\n"
    atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _attention_fields(a: AttentionConfig) -> dict[str, Any]:
    """What loader.read_mtp_config reads back; defaults are left out."""
    fields: dict[str, Any] = {
        "heads": a.heads, "kv_heads": a.kv_heads, "qk_dim": a.qk_dim, "v_dim": a.v_dim,
        "rope_dim": a.rope.dim, "rope_theta": a.rope.theta, "window": a.window,
    }  # fmt: skip
    optional = {"rope_scaling": a.rope.scaling, "sink": a.sink, "bias": a.bias}
    fields |= {key: value for key, value in optional.items() if value}
    return fields if math.isclose(a.value_scale, 1.0) else fields | {"value_scale": a.value_scale}
