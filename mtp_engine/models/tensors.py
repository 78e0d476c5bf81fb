"""The tensors that a checkpoint of a given configuration must hold: names, shapes, stored dtypes. Nothing is read.

Of experts in 4 bits, which no checkpoint holds, what an engine does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import final

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig
from mtp_engine.kernels.fp8 import fused_sizes
from mtp_engine.kernels.int4 import group_of
from mtp_engine.models.build import FEATURES, FFN_NORM, MTPNames

BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


@final
@dataclass(frozen=True)
class Stored:
    """A tensor as safetensors describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BYTES[self.dtype]

    @property
    def is_parameter(self) -> bool:
        """Scales are part of how a parameter is stored."""
        return not self.name.endswith("_scale_inv")


def main_tensors(config: ModelConfig) -> Iterator[Stored]:
    """Of the main model, in the order of its layers."""
    hidden = config.hidden_size
    yield Stored("model.embed_tokens.weight", (config.vocab_size, hidden))
    for i, layer in enumerate(config.layers):
        yield from _block(f"model.layers.{i}", layer, config, FFN_NORM)
    yield Stored("model.norm.weight", (hidden,))
    if not config.tied_head:
        yield Stored("lm_head.weight", (config.vocab_size, hidden))


def mtp_tensors(config: ModelConfig, mtp: MTPConfig, names: MTPNames) -> Iterator[Stored]:
    """Of the MTP layers beside that main model."""
    hidden = config.hidden_size
    norms = [names.embedding_norm, names.hidden_norm, *([names.final_norm] if mtp.own_norm else [])]
    for k in range(1 if mtp.reused else mtp.depth):
        prefix = f"{names.prefix}.{k}"
        for norm in norms:
            yield Stored(f"{prefix}.{norm}.weight", (hidden,))
        yield Stored(f"{prefix}.{names.projection}.weight", (hidden, 2 * hidden))
        yield from _block(prefix, mtp.layer, config, names.ffn_norm)
    if mtp.features:
        for i in range(len(mtp.features)):
            yield Stored(f"{FEATURES}.{i}.norm.weight", (hidden,))
        yield Stored(f"{FEATURES}.proj.weight", (hidden, len(mtp.features) * hidden))


def _block(prefix: str, layer: LayerConfig, config: ModelConfig, ffn_norm: str) -> Iterator[Stored]:
    hidden, a, fp8 = config.hidden_size, layer.attention, config.fp8_block
    for norm in ("input_layernorm", ffn_norm):
        yield Stored(f"{prefix}.{norm}.weight", (hidden,))
    sizes = {"q_proj": a.heads * a.qk_dim, "k_proj": a.kv_heads * a.qk_dim, "v_proj": a.kv_heads * a.v_dim}
    scales = qkv_scale_rows(a, fp8) if fp8 else (0, 0, 0)
    for (name, rows), scale_rows in zip(sizes.items(), scales, strict=True):
        yield from _matrix(f"{prefix}.self_attn.{name}", rows, hidden, fp8, scale_rows)
        if a.bias:
            yield Stored(f"{prefix}.self_attn.{name}.bias", (rows,))
    yield Stored(f"{prefix}.self_attn.o_proj.weight", (hidden, a.heads * a.v_dim))
    if a.sink:
        yield Stored(f"{prefix}.self_attn.attention_sink_bias", (a.heads,))
    if layer.moe is None:
        yield from _mlp(f"{prefix}.mlp", hidden, layer.intermediate, fp8)
        return
    yield Stored(f"{prefix}.mlp.gate.weight", (layer.moe.experts, hidden), "F32")
    yield Stored(f"{prefix}.mlp.gate.e_score_correction_bias", (layer.moe.experts,), "F32")
    for e in range(layer.moe.experts):
        for tensor in _mlp(f"{prefix}.mlp.experts.{e}", hidden, layer.intermediate, None if layer.moe.int4 else fp8):
            yield from _packed(tensor) if layer.moe.int4 else [tensor]


def qkv_scale_rows(a: AttentionConfig, block: int) -> tuple[int, ...]:
    """Rows of the scales of q_proj, k_proj and v_proj: global layers were quantised fused (see kernels/fp8.py)."""
    if a.window is None:
        per_section = fused_sizes(a.heads // a.kv_heads * a.qk_dim, a.qk_dim, a.v_dim, block)
        return tuple(a.kv_heads * blocks for blocks in per_section)
    return tuple(-(-rows // block) for rows in (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim))


def _mlp(prefix: str, hidden: int, wide: int, fp8: int | None) -> Iterator[Stored]:
    for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
        yield from _matrix(f"{prefix}.{name}_proj", rows, columns, fp8, -(-rows // fp8) if fp8 else 0)


def _packed(matrix: Stored) -> Iterator[Stored]:
    """As kernels.int4.Int4Stack holds it."""
    rows, columns = matrix.shape
    yield Stored(matrix.name, (rows, columns // 2), "U8")
    yield Stored(f"{matrix.name}_scale", (rows, columns // group_of(columns)))


def _matrix(name: str, rows: int, columns: int, fp8: int | None, scale_rows: int) -> Iterator[Stored]:
    yield Stored(f"{name}.weight", (rows, columns), "F8_E4M3" if fp8 else "BF16")
    if fp8:
        yield Stored(f"{name}.weight_scale_inv", (scale_rows, -(-columns // fp8)), "F32")
