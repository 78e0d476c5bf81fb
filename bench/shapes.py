"""Models with true dimensions and random weights, made on the device in seconds. For timing only.

They go through the same parsing and building as a checkpoint. Nothing about acceptance can be learned from them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine import Engine, EngineConfig
from mtp_engine.backend import make_backend
from mtp_engine.config import DEFAULT_MODEL, AttentionConfig, ModelConfig, MTPConfig
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.fp8 import FP8, BlockLinear, BlockMatrix, fused_rows, fused_sizes, plain_rows
from mtp_engine.kernels.linear import Linear
from mtp_engine.models import build, mimo, mimo_v2_flash
from mtp_engine.models.build import MTPNames
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.fields import Fields
from mtp_engine.models.layers import LinearMap, RotaryEmbedding
from mtp_engine.models.make_tiny import TINY
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors
from mtp_engine.models.weights import Parts

_CHUNK = (1 << 24) + 1  # random values that are drawn; odd, so that no two rows of a tiled matrix are alike
_FP8_SPREAD = 48.0  # standard deviation of the stored e4m3 numbers, whose largest is 448
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _fp8(block: int) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}}


_MIMO_7B = {  # XiaomiMiMo/MiMo-7B-Base, config.json
    **TINY["mimo"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151680, "max_position_embeddings": 32768,
}  # fmt: skip
_SMOL = {  # the default model's sizes, where its files are not at hand
    **TINY["mimo"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
_FLASH = {  # XiaomiMiMo/MiMo-V2-Flash, config.json
    **TINY["mimo_v2_flash"], **_fp8(128), "hidden_size": 4096, "intermediate_size": 16384, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "sliding_window": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "vocab_size": 152576,
    "max_position_embeddings": 262144, "num_hidden_layers": 48, "moe_layer_freq": [0] + [1] * 47,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0] + [1, 1, 1, 1, 1, 0] * 7,
}  # fmt: skip


@final
@dataclass(frozen=True)
class Shape:
    """A config.json and how many MTP layers come with it. contexts: lengths that are worth timing."""

    raw: dict[str, Any]
    mtp_layers: int
    contexts: tuple[int, ...]
    tree: str = "chain:3"

    @property
    def family(self) -> Any:
        return {"mimo": mimo, "mimo_v2_flash": mimo_v2_flash}[self.raw["model_type"]]

    def parse(self) -> tuple[ModelConfig, MTPConfig]:
        prefix = self.family.MTP_NAMES.prefix
        names = [f"{prefix}.{k}." for k in range(self.mtp_layers)]
        return self.family.parse(Fields(self.raw)), self.family.parse_mtp(Fields(self.raw), names)


FLASH = Shape(_FLASH, 3, (1024, 16384, 65536))  # 312 GB: for figures on paper
SHAPES = {
    "mimo-7b": Shape(_MIMO_7B, 1, (1024, 16384)),
    "smol": Shape(_SMOL, 1, (1024, 4096)),
    # layer 0, a global and five sliding MoE layers, three MTP layers, embedding and head: 44 GB
    "mimo-slice": Shape(
        {**_FLASH, "num_hidden_layers": 7, "hybrid_layer_pattern": [0, 0, 1, 1, 1, 1, 1], "moe_layer_freq": [0] + [1] * 6},
        3, (1024, 16384, 65536),
    ),
    "tiny-7b": Shape(TINY["mimo"], 1, (48, 200)),
    "tiny": Shape({**TINY["mimo_v2_flash"], **_fp8(16)}, 3, (48, 200)),
}  # fmt: skip
DEFAULT_CONTEXTS, DEFAULT_TREE = (1024, 4096), "tree:31"  # of the default model


@final
class RandomWeights:
    """models.weights.Weights without a checkpoint: the same shapes and dtypes, random values, all on the device.

    Matrices keep the size of what goes through them, and norms are 1, so that activations stay finite.
    """

    def __init__(self, stored: Iterable[Stored], dtype: torch.dtype, device: torch.device, block: int | None) -> None:
        self.dtype, self.device, self.make_linear = dtype, device, Linear
        self._fp8 = {tensor.name for tensor in stored if tensor.dtype == "F8_E4M3"}
        self._block = block or 0
        generator = torch.Generator(device).manual_seed(0)
        self._chunk = torch.randn(_CHUNK, generator=generator, device=device)
        self._drawn = 0

    def _draw(self, shape: Sequence[int], dtype: torch.dtype, scale: float) -> Tensor:
        """Normal values times `scale`, from another place of the chunk in every call."""
        out = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        self._drawn += 104729
        values = (self._chunk.roll(self._drawn) * scale).to(dtype)
        # torch copies FP8 faster as the bytes it is
        flat, values = (x.view(torch.uint8) if dtype == FP8 else x for x in (out.view(-1), values))
        for part in flat.split(len(values)):
            part.copy_(values[: len(part)])
        return out

    def tensor(self, name: str, *shape: int) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return self._draw(shape, self.dtype, 1.0 if "embed_tokens" in name or len(shape) == 1 else shape[1] ** -0.5)

    def exact(self, name: str, *shape: int) -> Tensor:
        """The router, whose scores shall differ clearly, and its small bias."""
        return self._draw(shape, torch.float32, 0.01 if len(shape) == 1 else 2 * shape[1] ** -0.5)

    def linear(self, parts: Parts, columns: int, *, bias: bool = False) -> LinearMap:
        sizes = [rows for _, rows in parts]
        if f"{parts[0][0]}.weight" not in self._fp8:
            return self._plain_linear(sum(sizes), columns, bias)
        return self._fp8_linear(plain_rows(sizes, self._block), columns, bias)

    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap:
        """As Weights.qkv: the global layers of an FP8 checkpoint have scales of fused sections."""
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [(f"{prefix}.{name}_proj", rows) for name, rows in zip("qkv", sizes, strict=True)]
        if a.window is not None or f"{parts[0][0]}.weight" not in self._fp8:
            return self.linear(parts, columns, bias=a.bias)
        section = (sizes[0] // a.kv_heads, a.qk_dim, a.v_dim)
        assert sum(fused_sizes(*section, self._block)), "a section has blocks"
        return self._fp8_linear(fused_rows(a.kv_heads, *section, self._block), columns, a.bias)

    def experts(self, names: Sequence[Parts], columns: int) -> ExpertStack:
        sizes = [rows for _, rows in names[0]]
        if f"{names[0][0][0]}.weight" not in self._fp8:
            return PlainStack(self._draw((len(names), sum(sizes), columns), self.dtype, columns**-0.5))
        return self._blocks(len(names), plain_rows(sizes, self._block), columns)

    def _plain_linear(self, rows: int, columns: int, bias: bool) -> LinearMap:
        added = self._draw((rows,), self.dtype, 0.1) if bias else None
        return self.make_linear(self._draw((rows, columns), self.dtype, columns**-0.5), added)

    def _fp8_linear(self, table: Tensor, columns: int, bias: bool) -> LinearMap:
        stack = self._blocks(1, table, columns)
        added = self._draw((len(table),), self.dtype, 0.1) if bias else None
        return BlockLinear(BlockMatrix(stack.data[0], stack.scale[0], stack.rows, stack.block), added)

    def _blocks(self, count: int, table: Tensor, columns: int) -> BlockMatrix:
        """table: [R] int64, the scale row of every row."""
        data = self._draw((count, len(table), columns), FP8, _FP8_SPREAD)
        shape = (count, int(table.max()) + 1, -(-columns // self._block))
        scale = self._draw(shape, torch.float32, 0.1).add_(1.0).clamp_(min=0.5).mul_(columns**-0.5 / _FP8_SPREAD)
        return BlockMatrix(data, scale, table.to(self.device), self._block)


@final
@dataclass(frozen=True)
class Model:
    """A main model and its MTP layers, as the backend runs them."""

    name: str
    main: Decoder
    module: MTPModule
    names: MTPNames
    contexts: tuple[int, ...]
    tree: str

    @property
    def config(self) -> ModelConfig:
        return self.main.config


def load(name: str, config: EngineConfig, path: str = DEFAULT_MODEL, mtp: str | None = None) -> Model:
    """`default`, the default model with its own weights from `path` and `mtp`, or one of SHAPES, with random ones.
    A draft_vocab of 0 lets all tokens be drafted."""
    if name == "default":
        engine = Engine.load(path, config, mtp=mtp)
        return Model(name, engine.model, engine.loop.work.drafter.module, MTPNames(), DEFAULT_CONTEXTS, DEFAULT_TREE)  # type: ignore[attr-defined]
    shape, device = SHAPES[name], torch.device(config.device)
    (main_config, mtp_config), names = shape.parse(), shape.family.MTP_NAMES
    stored = [*main_tensors(main_config), *mtp_tensors(main_config, mtp_config, names)]
    weights: Any = RandomWeights(stored, _DTYPES[config.dtype], device, main_config.fp8_block)
    main = build.decoder(weights, main_config, lambda *_: None)
    vocab = config.draft_vocab or main_config.vocab_size
    head = main.unembed if vocab >= main_config.vocab_size else Linear(main.head_weight[:vocab].contiguous())
    count = 1 if mtp_config.reused else mtp_config.depth
    layers = [build.mtp_layer(weights, names, k, mtp_config, main, head) for k in range(count)]
    rotary = RotaryEmbedding(mtp_config.layer.attention.rope, device)
    ids = torch.arange(min(vocab, main_config.vocab_size), device=device)
    module = MTPModule(mtp_config, layers, main.embedding, main.norm, ids, rotary)
    backend = make_backend(config, device, lambda *_: None)
    return Model(name, backend.fuse(main), backend.fuse_mtp(module), names, shape.contexts, shape.tree)
