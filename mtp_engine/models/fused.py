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
from mtp_engine.kernels.int4 import Int4Stack
from mtp_engine.kernels.linear import Linear
from mtp_engine.kernels.rope import rope_tables
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, GatedMLP, Head, Join, LinearMap, RMSNorm, RotaryEmbedding
from mtp_engine.models.moe import MoE
from mtp_engine.models.mtp import MTPModule
from mtp_engine.parallel.linear import SummedLinear
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


def add_linear(x: Tensor, linear: LinearMap, residual: Tensor) -> Tensor:
    """residual + linear(x), rounded once: over all ranks, where they share the product. x: [M, K] -> [M, N] in residual's
    dtype."""
    if not isinstance(linear, SummedLinear):
        return dense.linear(x, weight_of(linear), residual=residual)
    return linear.group.sum(dense.linear(x, weight_of(linear.linear), out_dtype=_FP32), residual.dtype, residual)


def weight_of(linear: LinearMap) -> Tensor | BlockMatrix:
    weight = linear.weight if isinstance(linear, Linear | BlockLinear) else None
    assert weight is not None, "a layer that keeps its weight is wanted"
    return weight


def _stack(experts: ExpertStack) -> moe.Stack:
    assert isinstance(experts, PlainStack | BlockMatrix | Int4Stack)
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
        projection, width = self.join.projection, embedded.shape[-1]
        shared = projection if isinstance(projection, SummedLinear) else None
        weight = weight_of(shared.linear if shared else projection)
        assert isinstance(weight, Tensor), "eh_proj is never quantised"
        own = (shared and shared.own) or range(2 * width)  # columns of the whole weight
        halves = [(embedded, self.join.embedding_norm), (hidden, self.join.hidden_norm)]
        y = None
        for half, (x, norm) in enumerate(halves[::-1] if self.join.hidden_first else halves):
            first = half * width
            start, stop = max(own.start, first), min(own.stop, first + width)
            if start >= stop:
                continue
            rows, part = x.flatten(0, -2), weight[:, start - own.start : stop - own.start]
            dtype = _FP32 if shared or stop < own.stop else x.dtype
            if stop - start == width:
                y = dense.linear(rows, part, norm=norm.weight, eps=norm.eps, residual=y, out_dtype=dtype)
            else:  # the norm is that of the whole row
                y = dense.linear(norm(rows)[:, start - first : stop - first], part, residual=y, out_dtype=dtype)
        assert y is not None
        return (shared.group.sum(y, embedded.dtype) if shared else y).view(embedded.shape)


@final
@dataclass(frozen=True)
class FusedBlock:
    """layers.Block in five launches, and one for each sum over ranks; norms are launches of their own where there are more
    than 32 rows."""

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
        flat = add_linear(y, inner.out, flat)
        return ffn(self.block.ffn, self.block.ffn_norm, flat).view(x.shape)


def ffn(layer: object, norm: RMSNorm, x: Tensor) -> Tensor:
    """x + ffn(norm(x)). x: [M, H]."""
    if isinstance(layer, MoE):
        c = layer.config
        y, routing = moe.route(x, norm.weight, norm.eps, layer.router, layer.bias, c.per_token, c.normalise, c.scale)
        h, stack = moe.gate_up(y, routing, _stack(layer.gate_up)), _stack(layer.down)
        if layer.group.size == 1:
            return moe.down(h, routing, stack, x)
        return layer.group.sum(moe.products(h, routing, stack), x.dtype, x, routing.weights)
    assert isinstance(layer, GatedMLP)
    h = dense.gated(x, weight_of(layer.gate_up), norm=norm.weight, eps=norm.eps)
    return add_linear(h, layer.down, x)
