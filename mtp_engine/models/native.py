"""Models for decoding on a CPU: the same weights in 8 bits, all layers of a step in one call of kernels.cpu.

`fuse` wraps the torch modules, whose linear layers are kernels.cpu.calls.PackedLinear; they stay the twin of the library.
"""

from collections.abc import Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import Protocol, cast, final

import torch
from torch import Tensor

from mtp_engine.config import LayerConfig, ModelConfig, MTPConfig, RopeConfig
from mtp_engine.kernels.cpu.calls import (
    LANES,
    TILE,
    CLayer,
    CLevel,
    CRope,
    CStep,
    PackedLinear,
    PackedStack,
    Part,
    Team,
)
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, GatedMLP, Head, Join, LinearMap, RMSNorm, RotaryEmbedding
from mtp_engine.models.moe import MoE
from mtp_engine.models.mtp import FeatureMix, MTPModule
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Attention

_CPU = torch.device("cpu")


class StepKeys(Attention, Protocol):
    """Attention of a step that the library runs: attention.native.NativeAttention."""

    def describe(self, step: CStep) -> object: ...


def why_not(hidden: int, layers: Sequence[LayerConfig]) -> str:
    """Why the library cannot run these layers; empty if it can."""
    for layer in layers:
        a = layer.attention
        if hidden % LANES or a.qk_dim % LANES or a.v_dim % LANES or layer.intermediate % TILE:
            return f"int8 needs head and hidden sizes in multiples of {LANES} and FFNs in multiples of {TILE}"
    return ""


def fuse(decoder: Decoder, team: Team) -> Decoder:
    """A main model whose steps are single calls; it has what a decode loop asks of a Decoder, and no more."""
    config = decoder.config
    stack = Stack(team, cast(Sequence[Block], decoder.blocks), config.hidden_size, config.norm_eps)
    head = NativeHead(cast(Head, decoder.head))
    return cast(Decoder, NativeDecoder(config, decoder.embedding, stack, head, decoder.features))


def fuse_mtp(module: MTPModule, team: Team) -> MTPModule:
    hidden = module.embedding.shape[1]
    levels = [
        NativeLevel(
            cast(Join, layer.join), Stack(team, [cast(Block, layer.block)], hidden, cast(Join, layer.join).hidden_norm.eps,
            first=k), NativeHead(cast(Head, layer.head)),
        )
        for k, layer in enumerate(module.layers)
    ]  # fmt: skip
    native = NativeMTP(module.config, levels, module.embedding, module.main_norm, module.draft_ids, module.mix)
    return cast(MTPModule, native)


def packed(linear: LinearMap) -> PackedLinear:
    assert isinstance(linear, PackedLinear), "a layer that was loaded for int8 is wanted"
    return linear


@final
class Stack:
    """Decoder blocks that run as one call."""

    def __init__(self, team: Team, blocks: Sequence[Block], hidden: int, eps: float, *, first: int = 0) -> None:
        """first: number of the first block among the cache's layers."""
        self._team, self._blocks, self._hidden, self._eps = team, blocks, hidden, eps
        configs = [block.attention.config for block in blocks]
        self._ropes: list[RopeConfig] = list(dict.fromkeys(config.rope for config in configs))
        self._frequencies = [RotaryEmbedding(rope, _CPU).frequencies for rope in self._ropes]
        self._c_ropes = (CRope * len(self._ropes))(*(CRope(each.data_ptr(), len(each)) for each in self._frequencies))
        self._experts: list[object] = []
        self._features: Sequence[int] | None = None  # that the layers were told of last
        kinds: dict[tuple[int | None, int, int, int], int] = {}  # as cache.HybridKV counts them
        self._layers = (CLayer * len(blocks))()
        for block, layer in zip(blocks, self._layers, strict=True):
            a = block.attention.config
            kind = (a.window, a.kv_heads, a.qk_dim, a.v_dim)
            kinds[kind] = kinds.get(kind, -1) + 1
            layer.group, layer.place = list(kinds).index(kind), first + kinds[kind]
            self._describe(layer, block)

    def _describe(self, layer: CLayer, block: Block) -> None:
        inner = block.attention
        a = inner.config
        layer.qkv, layer.out = packed(inner.qkv).matrix, packed(inner.out).matrix
        layer.heads, layer.kv_heads, layer.qk_dim, layer.v_dim = a.heads, a.kv_heads, a.qk_dim, a.v_dim
        layer.rope, layer.value_scale = self._ropes.index(a.rope), a.value_scale
        layer.sink = None if inner.sink is None else inner.sink.data_ptr()
        layer.attention_norm, layer.ffn_norm = block.attention_norm.weight.data_ptr(), block.ffn_norm.weight.data_ptr()
        if isinstance(block.ffn, MoE):
            self._describe_experts(layer, block.ffn)
            return
        assert isinstance(block.ffn, GatedMLP)
        layer.gate_up, layer.down = packed(block.ffn.gate_up).matrix, packed(block.ffn.down).matrix
        layer.wide, layer.per_token = layer.down.columns, 1

    def _describe_experts(self, layer: CLayer, moe: MoE) -> None:
        assert isinstance(moe.gate_up, PackedStack)
        assert isinstance(moe.down, PackedStack)
        c, pairs = moe.config, zip(moe.gate_up.members, moe.down.members, strict=True)
        matrices = [each.matrix for pair in pairs for each in pair]
        array = (type(matrices[0]) * len(matrices))(*matrices)
        self._experts.append(array)
        layer.experts, layer.router, layer.router_bias = addressof(array), moe.router.data_ptr(), moe.bias.data_ptr()
        layer.expert_count, layer.per_token, layer.normalise = c.experts, c.per_token, c.normalise
        layer.route_scale, layer.wide = c.scale, matrices[1].columns

    def describe(self, features: Sequence[int] = ()) -> CStep:
        """A step through these blocks, without its rows. It is valid as long as this object is."""
        if features != self._features:
            self._features = features
            for number, layer in enumerate(self._layers):
                layer.feature = features.index(number) if number in features else -1
        return CStep(
            layers=addressof(self._layers), ropes=addressof(self._c_ropes), layer_count=len(self._layers),
            rope_count=len(self._ropes), hidden=self._hidden, features=len(features), eps=self._eps,
        )  # fmt: skip

    def run(self, x: Tensor, rotary: Tensor, attention: Attention, features: Sequence[int] = ()) -> Tensor:
        """x: [B * N, H] fp32; rotary: [B, N] int64 -> [B * N, (F + 1) * H]: the outputs of the layers `features`, then the
        last one's."""
        x, rotary = x.contiguous(), rotary.contiguous()
        y = torch.empty(len(x), (len(features) + 1) * self._hidden)
        step = self.describe(features)
        step.x, step.y, step.rotary = x.data_ptr(), y.data_ptr(), rotary.data_ptr()
        held = cast(StepKeys, attention).describe(step)
        self._team.step(step)
        del held
        return y


@final
@dataclass(frozen=True)
class NativeHead:
    """layers.Head with the norm inside the product."""

    head: Head

    def __call__(self, hidden: Tensor) -> Tensor:
        rows, norm = hidden.reshape(-1, hidden.shape[-1]), self.head.norm
        logits = packed(self.head.linear).joined([Part(rows, norm.weight)], norm.eps)
        return logits.view(*hidden.shape[:-1], -1)


@final
@dataclass(frozen=True, repr=False)
class NativeDecoder:
    """A TargetModel."""

    config: ModelConfig
    embedding: Tensor  # [V, H]
    stack: Stack
    head: NativeHead
    features: tuple[int, ...] = ()  # layers whose outputs `forward` returns too

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """As Decoder.forward."""
        x = self.embedding[tokens.flatten()]
        return self.stack.run(x, positions, attention, self.features).view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H], or what `forward` gave -> [..., V] fp32."""
        return self.head(hidden[..., -self.config.hidden_size :])


@final
@dataclass(frozen=True)
class NativeLevel:
    """mtp.MTPLayer."""

    join: Join
    stack: Stack
    head: NativeHead

    def describe(self, embedding: Tensor) -> CLevel:
        """A level of drafting, without its rows and tree. It is valid as long as this object is. embedding: [V, H]."""
        join = self.join
        return CLevel(
            step=self.stack.describe(), join=packed(join.projection).matrix, head=packed(self.head.head.linear).matrix,
            embedding_norm=join.embedding_norm.weight.data_ptr(), hidden_norm=join.hidden_norm.weight.data_ptr(),
            head_norm=self.head.head.norm.weight.data_ptr(), embedding=embedding.data_ptr(), hidden_first=join.hidden_first,
        )  # fmt: skip

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: Tensor, attention: Attention) -> Tensor:
        """As MTPModule.forward."""
        join, flat = self.join, [x.flatten(0, 1) for x in (embedded, hidden)]
        halves = [Part(flat[0], join.embedding_norm.weight), Part(flat[1], join.hidden_norm.weight)]
        x = packed(join.projection).joined(halves[::-1] if join.hidden_first else halves, join.hidden_norm.eps)
        return self.stack.run(x, rotary, attention).view(hidden.shape)


@final
@dataclass(frozen=True, repr=False)
class NativeMTP:
    """An MTPModule."""

    config: MTPConfig
    layers: Sequence[NativeLevel]
    embedding: Tensor  # [V, H]
    main_norm: RMSNorm
    draft_ids: Tensor  # [n] int64
    mix: FeatureMix | None = None
    group: Group = Group()  # noqa: RUF009  frozen; int8 runs in one process

    def main_hidden(self, hidden: Tensor) -> Tensor:
        """As MTPModule.main_hidden."""
        if self.mix is None:
            return self.main_norm(hidden) if self.config.hidden == "post_norm" else hidden
        *features, last = hidden.reshape(-1, hidden.shape[-1]).chunk(len(self.mix.norms) + 1, -1)
        parts = [Part(each, norm.weight) for each, norm in zip(features, self.mix.norms, strict=True)]
        mixed = packed(self.mix.projection).joined(parts, self.mix.norms[0].eps, added=last)
        return mixed.view(*hidden.shape[:-1], -1)

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """As MTPModule.forward."""
        return self.layers[0 if self.config.reused else level].forward(embedded, hidden, positions, attention)

    def logits(self, level: int, output: Tensor) -> Tensor:
        """[..., H] -> [..., n] fp32 over the draft vocabulary."""
        return self.layers[0 if self.config.reused else level].head(output)
