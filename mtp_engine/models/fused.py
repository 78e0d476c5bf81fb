"""Models on a GPU: the same weights through fused kernels, for a step's few rows and a prompt's thousands.

`fuse` wraps the torch modules, which stay as the kernels' twins. A decoder block becomes
five launches: norm + QKV + rotation + cache write, attention, output + residual, norm + gate and up, down + residual.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor

from mtp_engine.config import RopeConfig
from mtp_engine.kernels import dense, moe
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.fp8 import BlockLinear, BlockMatrix
from mtp_engine.kernels.linear import Linear
from mtp_engine.kernels.rope import rope_tables
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, GatedMLP, Head, Join, LinearMap, RMSNorm, RotaryEmbedding
from mtp_engine.models.moe import MoE
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention, DeviceAttention

_FP32 = torch.float32


def fuse(decoder: Decoder) -> Decoder:
    """A main model whose steps run through the fused kernels."""
    blocks = [FusedBlock(cast(Block, block)) for block in decoder.blocks]
    rotary = {rope: FusedRotary(cast(RotaryEmbedding, each)) for rope, each in decoder.rotary.items()}
    return replace(decoder, blocks=blocks, head=FusedHead(cast(Head, decoder.head)), rotary=rotary)


def fuse_mtp(module: MTPModule) -> MTPModule:
    layers = [
        replace(layer, join=FusedJoin(cast(Join, layer.join)), block=FusedBlock(cast(Block, layer.block)),
                head=FusedHead(cast(Head, layer.head)))
        for layer in module.layers
    ]  # fmt: skip
    return replace(module, layers=layers, rotary=FusedRotary(cast(RotaryEmbedding, module.rotary)))


def weight_of(linear: LinearMap) -> Tensor | BlockMatrix:
    weight = linear.weight if isinstance(linear, Linear | BlockLinear) else None
    assert weight is not None, "a layer that keeps its weight is wanted"
    return weight


def _stack(experts: ExpertStack) -> PlainStack | BlockMatrix:
    assert isinstance(experts, PlainStack | BlockMatrix)
    return experts


def bias_of(linear: LinearMap) -> Tensor | None:
    return linear.bias if isinstance(linear, Linear | BlockLinear) else None


@final
@dataclass(frozen=True)
class FusedRotary:
    """layers.RotaryEmbedding in one launch."""

    rotary: RotaryEmbedding

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(positions, self.rotary.frequencies)


@final
@dataclass(frozen=True)
class FusedHead:
    """layers.Head with the norm inside the product."""

    head: Head

    def __call__(self, hidden: Tensor) -> Tensor:
        rows, norm, weight = hidden.flatten(0, -2), self.head.norm, weight_of(self.head.linear)
        logits = dense.linear(rows, weight, norm=norm.weight, eps=norm.eps, out_dtype=_FP32)
        return logits.view(*hidden.shape[:-1], -1)


@final
@dataclass(frozen=True)
class FusedJoin:
    """layers.Join as two products over one half of the weight each, norms inside."""

    join: Join

    def __call__(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        weight = weight_of(self.join.projection)
        assert isinstance(weight, Tensor), "eh_proj is never quantised"
        halves = [(embedded, self.join.embedding_norm), (hidden, self.join.hidden_norm)]
        width, y = embedded.shape[-1], None
        for half, (x, norm) in enumerate(halves[::-1] if self.join.hidden_first else halves):
            part = weight[:, half * width : (half + 1) * width]
            dtype = _FP32 if y is None else x.dtype
            y = dense.linear(x.flatten(0, -2), part, norm=norm.weight, eps=norm.eps, residual=y, out_dtype=dtype)
        assert y is not None
        return y.view(embedded.shape)


@final
@dataclass(frozen=True)
class FusedBlock:
    """layers.Block in five launches; norms are launches of their own where there are more than 32 rows."""

    block: Block

    def __call__(
        self, x: Tensor, tables: Mapping[RopeConfig, tuple[Tensor, Tensor]], attention: Attention, layer: int
    ) -> Tensor:
        batch, nodes, _ = x.shape
        inner, norm, device_attention = (
            self.block.attention,
            self.block.attention_norm,
            cast(DeviceAttention, attention),
        )
        c, flat = inner.config, x.flatten(0, 1)
        cos, sin = (table.flatten(0, 2) for table in tables[c.rope])
        k_cache, v_cache, rows = device_attention.destination(layer)
        q = dense.qkv(
            flat, weight_of(inner.qkv), norm=norm.weight, eps=norm.eps, bias=bias_of(inner.qkv), cos=cos, sin=sin,
            heads=c.heads, kv_heads=c.kv_heads, qk_dim=c.qk_dim, v_dim=c.v_dim, value_scale=c.value_scale,
            k_cache=k_cache, v_cache=v_cache, rows=rows,
        )  # fmt: skip
        y = device_attention.attend(
            layer, q.view(batch, nodes, c.heads, c.qk_dim), scale=c.qk_dim**-0.5, sink=inner.sink
        )
        y = y.flatten(0, 1).flatten(1)
        flat = dense.linear(y, weight_of(inner.out), residual=flat)
        return ffn(self.block.ffn, self.block.ffn_norm, flat).view(x.shape)


def ffn(layer: object, norm: RMSNorm, x: Tensor) -> Tensor:
    """x + ffn(norm(x)). x: [M, H]."""
    if isinstance(layer, MoE):
        c = layer.config
        y, routing = moe.route(x, norm.weight, norm.eps, layer.router, layer.bias, c.per_token, c.normalise, c.scale)
        return moe.down(moe.gate_up(y, routing, _stack(layer.gate_up)), routing, _stack(layer.down), x)
    assert isinstance(layer, GatedMLP)
    h = dense.gated(x, weight_of(layer.gate_up), norm=norm.weight, eps=norm.eps)
    return dense.linear(h, weight_of(layer.down), residual=x)
