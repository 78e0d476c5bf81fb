"""Whole models as graphs: the main model's body and head, and the levels of its MTP layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from mtp_engine.config import LayerConfig, ModelConfig, MTPConfig, RopeConfig
from mtp_engine.models.build import FEATURES, FFN_NORM, MTPNames
from mtp_engine.models.layers import RotaryEmbedding
from mtp_engine.models.onnx import blocks
from mtp_engine.models.onnx.blocks import AttentionInputs, AttentionWeights, Precision
from mtp_engine.models.onnx.fold import Matrix, Rounded, turn, units
from mtp_engine.models.onnx.graph import Graph


class Reader(Protocol):
    """Where weights come from: store.Checkpoints."""

    def tensor(self, name: str, *shape: int) -> Tensor: ...
    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix that may be stored as FP8 with scales. `name` is without `.weight`."""


HEAD = "head"  # what the head reads is called in `seconds`
_ROWS = 4096  # of a large matrix that are worked on at a time


@final
@dataclass(frozen=True)
class Builder:
    """Writes the graphs of one model. Hidden states are rotated everywhere, in and out."""

    read: Reader
    config: ModelConfig
    precision: Precision = Precision()  # noqa: RUF009
    seconds: Mapping[str, Tensor] = field(default_factory=dict)  # of the inputs of matrices, by name: see compensate.py

    def embedding(self, path: Path) -> None:
        """The rotated table, [V, H] fp32, without a header."""
        table = self.read.tensor("model.embed_tokens.weight", self.config.vocab_size, self.config.hidden_size)
        with path.open("wb") as file:
            for piece in _pieces(table):
                file.write(turn(piece.double().numpy()).astype(np.float32).data)

    def main(self, path: Path, features: Sequence[int], *, probe: bool = False) -> None:
        """x [1, N, H], the tokens' embeddings, positions [1, N], sizes, masks, past keys and values of every layer -> hidden
        [1, N, (F + 1) * H], and the new keys and values of each kind of layer, one layer after the other: [layers * N,
        kv_heads, dim]. probe: also what each matrix is multiplied with, under the names of `products`."""
        graph, c = Graph(), self.config
        x = graph.input("x", TensorProto.FLOAT, [1, "N", c.hidden_size])
        step = _StepInputs(graph, c.layers, c.max_context)
        delta: str | None = None
        kept: list[str] = []
        new: list[tuple[str, str]] = []
        for i, layer in enumerate(c.layers):
            x, delta, k, v = self._block(graph, x, delta, f"model.layers.{i}", layer, FFN_NORM, step, i)
            new.append((k, v))
            if i in features:
                kept.append(graph("Add", x, delta))
        assert delta is not None, "a model has layers"
        x = graph("Add", x, delta)
        if probe:
            for name, value in zip(self.products(), graph.products, strict=True):
                graph.output(name, value)
        graph.output("hidden", graph("Concat", *kept, x, axis=-1) if kept else x)
        for kind, members in groups(c.layers).items():
            for name, side in (("k", 0), ("v", 1)):
                graph.output(f"new_{name}{kind}", graph("Concat", *(new[i][side] for i in members), axis=0))
        graph.save(path)

    def products(self) -> list[str]:
        return [
            f"model.layers.{i}.{name}"
            for i in range(len(self.config.layers))
            for name in ("qkv", "out", "gate_up", "down")
        ]

    def _round(self, weight: Matrix, name: str) -> Rounded:
        return Rounded.of(weight, self.precision.weights, self.seconds.get(name))

    def head(self, path: Path, norm: str, rows: np.ndarray[Any, Any] | None) -> None:
        """hidden [1, N, H] before the norm called `norm` -> logits [1, N, n]. rows: of which tokens; None: all."""
        graph, hidden = Graph(), self.config.hidden_size
        x = graph.input("hidden", TensorProto.FLOAT, [1, "N", hidden])
        name = "model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight"
        weight = self._rounded_rows(name, self._norm(norm), rows, moments=norm == "model.norm")
        normed = blocks.norm(graph, x, hidden, self.config.norm_eps)
        graph.output(
            "logits",
            blocks.fixed_product(
                graph, normed, weight, self.precision.head, self.precision.step(self.precision.head, weight)
            ),
        )
        graph.save(path)

    def mix(self, path: Path, config: MTPConfig) -> None:
        """What the main model gave [1, N, (F + 1) * H] -> what the MTP layers read [1, N, H] (MTPModule.main_hidden)."""
        graph, hidden, eps = Graph(), self.config.hidden_size, self.config.norm_eps
        count = len(config.features)
        x = graph.input("hidden", TensorProto.FLOAT, [1, "N", (count + 1) * hidden])
        if config.features:
            parts = graph.many("Split", x, outputs=count + 1, axis=-1, num_outputs=count + 1)
            earlier = [blocks.norm(graph, part, hidden, eps) for part in parts[:-1]]
            joined = self._joined(f"{FEATURES}.proj", [f"{FEATURES}.{i}.norm" for i in range(count)])
            rounded = Rounded.of(joined, self.precision.weights)
            y = blocks.fixed_product(
                graph,
                graph("Concat", *earlier, axis=-1),
                rounded,
                self.precision.join,
                self.precision.step(self.precision.join, rounded),
            )
            graph.output("mixed", graph("Add", parts[-1], y))
        elif config.hidden == "post_norm":  # its weights stand between two norms, in the basis of the checkpoint
            weight = turn(np.diag(self._norm("model.norm")))
            weight = turn(weight.T).T  # Q^T diag(norm) Q
            normed = blocks.norm(graph, x, hidden, eps)
            graph.output("mixed", graph("MatMul", normed, graph.constant(weight.astype(np.float32))))
        else:
            graph.output("mixed", x)
        graph.save(path)

    def level(self, path: Path, names: MTPNames, k: int, config: MTPConfig) -> None:
        """embedded, hidden [1, N, H], and the rest as for the main model -> output [1, N, H], new keys and values [N, ...]."""
        graph, hidden, eps, prefix = Graph(), self.config.hidden_size, self.config.norm_eps, f"{names.prefix}.{k}"
        halves = [graph.input(name, TensorProto.FLOAT, [1, "N", hidden]) for name in ("embedded", "hidden")]
        norms = [f"{prefix}.{names.embedding_norm}", f"{prefix}.{names.hidden_norm}"]
        if config.concat == "hidden_first":
            halves, norms = halves[::-1], norms[::-1]
        step = _StepInputs(graph, [config.layer], self.config.max_context)
        joined = graph("Concat", *(blocks.norm(graph, half, hidden, eps) for half in halves), axis=-1)
        weight = Rounded.of(self._joined(f"{prefix}.{names.projection}", norms), self.precision.weights)
        x = blocks.fixed_product(
            graph, joined, weight, self.precision.join, self.precision.step(self.precision.join, weight)
        )
        x, delta, new_k, new_v = self._block(graph, x, None, prefix, config.layer, names.ffn_norm, step, 0)
        graph.output("hidden_out", graph("Add", x, delta))
        graph.output("new_k0", new_k)
        graph.output("new_v0", new_v)
        graph.save(path)

    def _block(
        self, graph: Graph, x: str, delta: str | None, prefix: str, layer: LayerConfig, ffn_norm: str, step: "_StepInputs",
        index: int,
    ) -> tuple[str, str, str, str]:  # fmt: skip
        """A decoder layer. The residual stream comes and goes as a sum of two, which the next norm adds."""
        hidden, eps = self.config.hidden_size, self.config.norm_eps
        if delta is None:
            normed = blocks.norm(graph, x, hidden, eps)
        else:
            x, normed = blocks.add_norm(graph, x, delta, hidden, eps)
        a = layer.attention
        context = a.window or self.config.max_context
        weights = self._attention(prefix, layer, context)
        delta, k, v = blocks.attention(
            graph, normed, a, weights, step.shared(index), step.past(index), self.precision, context
        )
        x, normed = blocks.add_norm(graph, x, delta, hidden, eps)
        return x, self._ffn(graph, normed, prefix, layer, ffn_norm), k, v

    def _ffn(self, graph: Graph, normed: str, prefix: str, layer: LayerConfig, ffn_norm: str) -> str:
        wide, norm = layer.intermediate, self._norm(f"{prefix}.{ffn_norm}")
        gate, up = (self._into(f"{prefix}.mlp.{name}_proj", wide, norm) for name in ("gate", "up"))
        down = self._out(f"{prefix}.mlp.down_proj", wide)
        both = self._round(np.concatenate([gate, up]), f"{prefix}.gate_up")
        return blocks.gated(graph, normed, both, self._round(down, f"{prefix}.down"), self.precision)

    def _attention(self, prefix: str, layer: LayerConfig, context: int) -> AttentionWeights:
        a = layer.attention
        norm, name = self._norm(f"{prefix}.input_layernorm"), f"{prefix}.self_attn"
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [self._into(f"{name}.{each}_proj", rows, norm) for each, rows in zip("qkv", sizes, strict=True)]
        parts[2] *= a.value_scale
        biases = None
        if a.bias:
            q, k, v = (self._vector(f"{name}.{x}_proj.bias", rows) for x, rows in zip("qkv", sizes, strict=True))
            biases = (q, k, v * a.value_scale)
        rounded = self._round(np.concatenate(parts), f"{prefix}.qkv")
        q, k, v = np.split(rounded.weight, np.cumsum(sizes)[:2])
        root = np.sqrt(self.config.hidden_size)
        found = units(
            q, k, v, biases, heads=a.heads, kv_heads=a.kv_heads, scale=a.qk_dim**-0.5, context=context,
            longest=root * (1 + self.precision.step(self.precision.qkv, rounded) / 2), spread=self.precision.value_spread,
        )  # fmt: skip
        per_row = np.concatenate([np.repeat(found.query, a.qk_dim), np.repeat(found.key, a.qk_dim), found.value])
        bias = np.concatenate(biases) / per_row if biases else None
        # a query head's values are those of its group; their units go into the matrix behind them
        value = np.repeat(found.value.reshape(a.kv_heads, 1, a.v_dim), a.heads // a.kv_heads, 1).reshape(-1)
        out = self._out(f"{name}.o_proj", a.heads * a.v_dim) * value
        qkv = Rounded(rounded.values, rounded.scale / per_row)
        return AttentionWeights(qkv, bias, self._round(out, f"{prefix}.out"), found)

    def _vector(self, name: str, size: int) -> Matrix:
        return self.read.tensor(name, size).double().numpy()

    def _norm(self, name: str) -> Matrix:
        return self._vector(f"{name}.weight", self.config.hidden_size)

    def _into(self, name: str, rows: int, norm: Matrix) -> Matrix:
        """A matrix that reads the residual stream through a norm with these weights. [rows, H]."""
        weight = self.read.matrix(name, rows, self.config.hidden_size).double().numpy()
        return turn(weight * norm)

    def _out(self, name: str, columns: int) -> Matrix:
        """A matrix that writes to the residual stream. [H, columns]."""
        return turn(self.read.matrix(name, self.config.hidden_size, columns).double().numpy().T).T

    def _joined(self, name: str, norms: Sequence[str]) -> Matrix:
        """A matrix from several normed states to the residual stream. [H, len(norms) * H]."""
        hidden = self.config.hidden_size
        weight = self.read.matrix(name, hidden, len(norms) * hidden).double().numpy()
        parts = np.split(weight, len(norms), axis=1)
        turned = [turn(part * self._norm(norm)) for part, norm in zip(parts, norms, strict=True)]
        return turn(np.concatenate(turned, 1).T).T

    def _rounded_rows(self, name: str, norm: Matrix, rows: np.ndarray[Any, Any] | None, *, moments: bool) -> Rounded:
        table = self.read.tensor(name, self.config.vocab_size, self.config.hidden_size)
        if rows is not None:
            table = table[torch.from_numpy(rows)]
        pieces = [self._round(turn(piece.double().numpy() * norm), HEAD if moments else "") for piece in _pieces(table)]
        values = np.concatenate([piece.values for piece in pieces], 1)
        return Rounded(np.ascontiguousarray(values), np.concatenate([piece.scale for piece in pieces]))


def _pieces(table: Tensor) -> list[Tensor]:
    return [table[start : start + _ROWS] for start in range(0, len(table), _ROWS)]


def groups(layers: Sequence[LayerConfig]) -> dict[int, list[int]]:
    """The layers of each cache group, as cache.HybridKV counts them."""
    kinds: dict[tuple[int | None, int, int, int], list[int]] = {}
    for number, layer in enumerate(layers):
        a = layer.attention
        kinds.setdefault((a.window, a.kv_heads, a.qk_dim, a.v_dim), []).append(number)
    return dict(enumerate(kinds.values()))


@final
class _StepInputs:
    """What a step's layers are given, declared when first asked for: positions, and for each cache group g a mask and how many
    of its columns are past and new keys."""

    def __init__(self, graph: Graph, layers: Sequence[LayerConfig], context: int) -> None:
        self._graph, self._layers, self._context = graph, layers, context
        self._group = {number: kind for kind, members in groups(layers).items() for number in members}
        self._positions = graph.input("positions", TensorProto.INT64, [1, "N"])
        self._masks = {
            kind: graph.input(f"mask{kind}", TensorProto.FLOAT, ["N", f"T{kind}"]) for kind in groups(layers)
        }
        self._sizes = {kind: graph.input(f"sizes{kind}", TensorProto.INT64, [2]) for kind in groups(layers)}
        self._tables: dict[RopeConfig, tuple[str, str]] = {}
        self._wide: dict[tuple[int, int], str] = {}

    def shared(self, layer: int) -> AttentionInputs:
        a, kind = self._layers[layer].attention, self._group[layer]
        wide = (kind, a.heads // a.kv_heads)
        if wide not in self._wide:
            self._wide[wide] = self._graph("Concat", *[self._masks[kind]] * wide[1], axis=0)
        if a.rope not in self._tables:
            angles = torch.arange(self._context)[None], RotaryEmbedding(a.rope, torch.device("cpu"))
            cos, sin = (table[0, :, 0].numpy() for table in angles[1](angles[0]))
            half = a.rope.dim // 2  # the tables repeat, the sine's first half with its sign changed
            self._tables[a.rope] = self._graph.constant(cos[:, :half]), self._graph.constant(sin[:, half:])
        return AttentionInputs(self._wide[wide], self._sizes[kind], self._positions, *self._tables[a.rope])

    def past(self, layer: int) -> tuple[str, str]:
        a, rows = self._layers[layer].attention, f"S{self._group[layer]}"
        keys = self._graph.input(f"k{layer}", TensorProto.FLOAT, [rows, a.kv_heads, a.qk_dim])
        return keys, self._graph.input(f"v{layer}", TensorProto.FLOAT, [rows, a.kv_heads, a.v_dim])
