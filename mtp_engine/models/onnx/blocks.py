"""The nodes of decoder blocks: products in int8 and attention in fixed point.

Why a row's bits depend on nothing but the row. Sums of integers do not round while they stay small enough, so their
order does not matter: neither the number of rows, nor threads, nor where in memory a key lies. Everything else acts on
single elements, or on one row of a fixed length (RMSNorm), or takes a maximum.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from mtp_engine.config import AttentionConfig
from mtp_engine.models.onnx.fold import WEIGHT_SUM, Matrix, Rounded, Units, coarse_unit, most_value
from mtp_engine.models.onnx.graph import Graph

_MOST = 127 * 128 + 63  # the largest number of two bytes, high and low
_ZERO = 128  # the unsigned byte that stands for 0


@final
@dataclass(frozen=True)
class Precision:
    """Bits of the inputs of each kind of product (8, or 15 as two rows of 8), and of weights."""

    qkv: int = 15
    gate_up: int = 8
    out: int = 15
    down: int = 15
    head: int = 8
    join: int = 8
    weights: int = 8
    spread: float = 5.0  # normed inputs beyond so many standard deviations are cut
    value_spread: float = 8.0  # the same for values in the cache

    def step(self, bits: int, weight: Rounded) -> float:
        """What an integer of a row that this matrix reads stands for, the row being normed."""
        return step_of(bits, self.spread, weight.values.shape[0])


def norm(graph: Graph, x: str, hidden: int, eps: float) -> str:
    """x / rms(x)."""
    ones = graph.constant(np.ones(hidden, np.float32))
    return graph("SimplifiedLayerNormalization", x, ones, axis=-1, epsilon=eps, stash_type=1)


def add_norm(graph: Graph, x: str, delta: str, hidden: int, eps: float) -> tuple[str, str]:
    """x + delta, and that divided by its rms."""
    ones = graph.constant(np.ones(hidden, np.float32))
    normed, _, _, added = graph.many(
        "SkipSimplifiedLayerNormalization", x, delta, ones, outputs=4, domain="com.microsoft", epsilon=eps
    )
    return added, normed


def step_of(bits: int, spread: float, hidden: int) -> float:
    """What an integer of a normed row stands for. With 15 bits nothing is cut: no element is above sqrt(hidden)."""
    return spread / 127 if bits == 8 else hidden**0.5 / _MOST


def fixed_product(graph: Graph, x: str, weight: Rounded, bits: int, step: float) -> str:
    """x W^T for rows whose size is known, since their rms is 1. The scale of x is a constant."""
    graph.products.append(x)
    return _fixed(graph, x, weight, bits, step)


def _fixed(graph: Graph, x: str, weight: Rounded, bits: int, step: float) -> str:
    if bits == 8:
        return _product(graph, _bytes(graph, x, step), weight, step)
    high = _bytes(graph, x, step * 128)
    left = graph("Sub", x, graph("DequantizeLinear", high, graph.floats(step * 128), graph.byte(_ZERO)))
    both = graph("Concat", high, _bytes(graph, left, step), axis=1)
    high, low = graph.many("Split", _product(graph, both, weight, step), outputs=2, axis=1, num_outputs=2)
    return graph("Add", graph("Mul", high, graph.floats(128)), low)


def row_product(graph: Graph, x: str, weight: Rounded, bits: int) -> str:
    """x W^T with a scale per row, by its largest element."""
    graph.products.append(x)
    largest = graph("ReduceMax", graph("Abs", x), graph.integers(-1))
    most = graph.floats(127.0 if bits == 8 else float(_MOST))
    factor = graph("Div", most, graph("Max", largest, graph.floats(1e-20)))
    return graph("Div", _fixed(graph, graph("Mul", x, factor), weight, bits, 1.0), factor)


def _bytes(graph: Graph, x: str, step: float) -> str:
    """round(x / step) + 128, as bytes."""
    return graph("QuantizeLinear", x, graph.floats(step), graph.byte(_ZERO))


def _product(graph: Graph, x: str, weight: Rounded, step: float) -> str:
    scale = graph.constant((weight.scale * step).astype(np.float32))
    return graph.ms(
        "MatMulIntegerToFloat", x, graph.constant(weight.values), graph.floats(1.0), scale, graph.byte(_ZERO)
    )


@final
@dataclass(frozen=True)
class AttentionInputs:
    """What the layers of a step share. mask: [heads / kv_heads * N, S + N] fp32, 0 or -inf; sizes: [2] int64, S and N."""

    mask: str
    sizes: str
    positions: str  # [1, N] int64
    cos: str
    sin: str


@final
@dataclass(frozen=True)
class AttentionWeights:
    qkv: Rounded  # rows of queries, keys and values in their units
    bias: Matrix | None
    out: Rounded
    units: Units


def attention(
    graph: Graph, x: str, config: AttentionConfig, weights: AttentionWeights, shared: AttentionInputs, past: tuple[str, str],
    precision: Precision, context: int,
) -> tuple[str, str, str]:  # fmt: skip
    """x: [1, N, H] of rms 1; past: keys and values [S, kv_heads, dim] as integers -> what attention adds to the residual
    stream, and the integers of the new keys and values."""
    c = config
    group, width = c.heads // c.kv_heads, (c.heads + c.kv_heads) * c.qk_dim
    qkv = fixed_product(graph, x, weights.qkv, precision.qkv, precision.step(precision.qkv, weights.qkv))
    if weights.bias is not None:
        qkv = graph("Add", qkv, graph.constant(weights.bias.astype(np.float32)))
    qk, v = graph.many("Split", qkv, graph.integers(width, c.kv_heads * c.v_dim), outputs=2, axis=-1)
    qk = graph.ms(
        "RotaryEmbedding", qk, shared.positions, shared.cos, shared.sin,
        num_heads=c.heads + c.kv_heads, rotary_embedding_dim=0 if c.rope.dim == c.qk_dim else c.rope.dim,
    )  # fmt: skip
    sizes = graph.integers(c.heads * c.qk_dim, c.kv_heads * c.qk_dim)
    q, k = graph.many("Split", graph("Round", qk), sizes, outputs=2, axis=-1)
    k = graph("Reshape", k, graph.integers(-1, c.kv_heads, c.qk_dim))
    most = float(most_value(context))
    v = graph("Clip", graph("Round", v), graph.floats(-most), graph.floats(most))
    v = graph("Reshape", v, graph.integers(-1, c.kv_heads, c.v_dim))
    q = graph("Reshape", q, graph.integers(-1, c.kv_heads, group, c.qk_dim))
    q = graph("Reshape", graph("Transpose", q, perm=[1, 2, 0, 3]), graph.integers(c.kv_heads, -1, c.qk_dim))
    y = _attend(graph, q, past, (k, v), shared, weights.units.shift, context)
    y = graph("Reshape", y, graph.integers(c.kv_heads, group, -1, c.v_dim))
    y = graph("Reshape", graph("Transpose", y, perm=[2, 0, 1, 3]), graph.integers(1, -1, c.heads * c.v_dim))
    return row_product(graph, y, weights.out, precision.out), k, v


def _attend(
    graph: Graph, q: str, past: tuple[str, str], new: tuple[str, str], shared: AttentionInputs, shift: int,
    context: int,
) -> str:  # fmt: skip
    """q: [kv_heads, group * N, dim]; integers throughout -> [kv_heads, group * N, v_dim], averages of values.

    Attention weights become integers that add up to about WEIGHT_SUM, whatever the number of keys: the sum of coarse
    integers, rounded up so that it is never too small, gives the unit of the fine ones.
    """
    scores = [
        graph.ms("FusedMatMul", q, keys, transB=1, transBatchB=1, alpha=2.0**-shift) for keys in (past[0], new[0])
    ]
    s = graph("Add", graph("Concat", *scores, axis=-1), shared.mask)
    last = graph.integers(-1)
    coarse = graph.floats(float(np.log(coarse_unit(context))))
    e = graph("Exp", graph("Sub", s, graph("Sub", graph("ReduceMax", s, last), coarse)))
    unit = graph("Div", graph.floats(WEIGHT_SUM), graph("ReduceSum", graph("Ceil", e), last))
    w = graph("Round", graph("Mul", e, unit))
    parts = graph.many("Split", w, shared.sizes, outputs=2, axis=-1)
    sums = [
        graph.ms("FusedMatMul", part, values, transBatchB=1)
        for part, values in zip(parts, (past[1], new[1]), strict=True)
    ]
    return graph("Div", graph("Add", *sums), graph("ReduceSum", w, last))


def gated(graph: Graph, x: str, gate_up: Rounded, down: Rounded, precision: Precision) -> str:
    """down(silu(gate(x)) * up(x)). x: [1, N, H] of rms 1."""
    wide = gate_up.values.shape[1] // 2
    both = fixed_product(graph, x, gate_up, precision.gate_up, precision.step(precision.gate_up, gate_up))
    gate, up = graph.many("Split", both, graph.integers(wide, wide), outputs=2, axis=-1)
    h = graph("Mul", graph.ms("QuickGelu", gate, alpha=1.0), up)
    return row_product(graph, h, down, precision.down)
