"""Models with true dimensions and random weights, made on the device in seconds. For timing only.

They go through the same parsing and building as a checkpoint. Nothing about acceptance can be learned from them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine import Engine, EngineConfig
from mtp_engine.assemble.backend import make_backend
from mtp_engine.config import DEFAULT_MODEL, AttentionConfig, Experts, ModelConfig, MTPConfig
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.fp8 import FP8, BlockLinear, BlockMatrix, fused_rows, plain_rows
from mtp_engine.kernels.int4 import Int4Stack, group_of, pack
from mtp_engine.kernels.linear import Linear
from mtp_engine.models import build, mimo, mimo_v2_flash
from mtp_engine.models.build import MTPNames
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.fields import Fields
from mtp_engine.models.layers import LinearMap, RotaryEmbedding
from mtp_engine.models.loader import with_int4
from mtp_engine.models.make_tiny import TINY
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors
from mtp_engine.models.weights import Cut, Parts, Split
from mtp_engine.parallel.group import Group
from mtp_engine.parallel.linear import SummedLinear

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
    """A config.json and how many MTP layers come with it. contexts: lengths that are worth timing. experts: as in
    EngineConfig."""

    raw: dict[str, Any]
    mtp_layers: int
    contexts: tuple[int, ...]
    tree: str = "chain:3"
    experts: Experts = "auto"

    @property
    def family(self) -> Any:
        return {"mimo": mimo, "mimo_v2_flash": mimo_v2_flash}[self.raw["model_type"]]

    def parse(self) -> tuple[ModelConfig, MTPConfig]:
        prefix = self.family.MTP_NAMES.prefix
        names = [f"{prefix}.{k}." for k in range(self.mtp_layers)]
        main = self.family.parse(Fields(self.raw))
        main = main if self.experts == "auto" else with_int4(main, "this shape")
        return main, self.family.parse_mtp(Fields(self.raw), names)


FLASH = Shape(_FLASH, 3, (1024, 16384, 65536))  # 312 GB: for figures on paper
SHAPES = {
    "mimo-7b": Shape(_MIMO_7B, 1, (1024, 16384)),
    "mimo-v2-flash": FLASH,
    "smol": Shape(_SMOL, 1, (1024, 4096)),
    # layer 0, a global and five sliding MoE layers, three MTP layers, embedding and head: 44 GB
    "mimo-slice": Shape(
        {**_FLASH, "num_hidden_layers": 7, "hybrid_layer_pattern": [0, 0, 1, 1, 1, 1, 1], "moe_layer_freq": [0] + [1] * 6},
        3, (1024, 16384, 65536),
    ),
    "tiny-7b": Shape(TINY["mimo"], 1, (48, 200)),
    "tiny": Shape({**TINY["mimo_v2_flash"], **_fp8(16), "moe_intermediate_size": 64}, 3, (48, 200)),
}  # fmt: skip
DEFAULT_CONTEXTS, DEFAULT_TREE = (1024, 4096), "tree:31"  # of the default model


@final
class RandomWeights:
    """models.weights.Weights without a checkpoint: the same shapes and dtypes, random values, all on the device.

    Matrices keep the size of what goes through them, and norms are 1, so that activations stay finite. What every rank of a
    group holds whole is the same on all.
    """

    def __init__(
        self, stored: Iterable[Stored], dtype: torch.dtype, device: torch.device, block: int | None, group: Group
    ) -> None:
        self.dtype, self.device, self.group = dtype, device, group
        self._stored = {tensor.name: tensor.dtype for tensor in stored}
        self._block = block or 0
        generator = torch.Generator(device).manual_seed(0)
        self._chunk = torch.randn(_CHUNK, generator=generator, device=device)
        self._drawn = 0

    def _draw(self, shape: Sequence[int], dtype: torch.dtype, scale: float, *, own: bool = True) -> Tensor:
        """Normal values times `scale`, from another place of the chunk in every call. own: other ones on every rank."""
        return self._filled(shape, (self._values(own) * scale).to(dtype))

    def _values(self, own: bool = True) -> Tensor:
        self._drawn += 104729
        return self._chunk.roll(self._drawn + (self.group.shard.rank * 15485863 if own else 0))

    def _filled(self, shape: Sequence[int], values: Tensor) -> Tensor:
        """With `values` over and over."""
        out, dtype = torch.empty(tuple(shape), dtype=values.dtype, device=self.device), values.dtype
        # torch copies FP8 faster as the bytes it is
        flat, values = (x.view(torch.uint8) if dtype == FP8 else x for x in (out.view(-1), values))
        for part in flat.split(len(values)):
            part.copy_(values[: len(part)])
        return out

    def tensor(self, name: str, *shape: int, split: bool = False) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        rows = len(self.group.shard.part(shape[0])) if split else shape[0]
        scale = 1.0 if "embed_tokens" in name or len(shape) == 1 else shape[1] ** -0.5
        return self._draw((rows, *shape[1:]), self.dtype, scale, own=split)

    def exact(self, name: str, *shape: int) -> Tensor:
        """The router, whose scores shall differ clearly, and its small bias."""
        return self._draw(shape, torch.float32, 0.01 if len(shape) == 1 else 2 * shape[1] ** -0.5, own=False)

    def linear(self, parts: Parts, columns: int, *, split: Split = "none") -> LinearMap:
        cut = Cut.of(parts, columns, split, self.group)
        table = plain_rows([rows for _, rows in parts], self._block) if self._quantised(parts) else None
        made = self._linear(cut, table)
        if split not in ("columns", "inputs") or self.group.size == 1:
            return made
        return SummedLinear(made, self.group, cut.columns if split == "inputs" else None)

    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap:
        """As Weights.qkv: the global layers of an FP8 checkpoint have scales of fused sections."""
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [(f"{prefix}.{name}_proj", rows) for name, rows in zip("qkv", sizes, strict=True)]
        heads, kv_heads = self.group.shard.part(a.heads), self.group.shard.kv_heads(a)
        held = ((heads, a.qk_dim), (kv_heads, a.qk_dim), (kv_heads, a.v_dim))
        cut, table = Cut(parts, columns, [range(h.start * d, h.stop * d) for h, d in held], range(columns)), None
        if self._quantised(parts):
            fused = a.window is None
            table = (
                fused_rows(a.kv_heads, sizes[0] // a.kv_heads, a.qk_dim, a.v_dim, self._block)
                if fused
                else plain_rows(list(sizes), self._block)
            )
        return self._linear(cut, table, bias=a.bias)

    def experts(self, names: Sequence[Parts], columns: int, *, split: Split = "none") -> ExpertStack:
        cut = Cut.of(names[0], columns, split, self.group)
        if self._stored[f"{names[0][0][0]}.weight"] == "U8":
            return self._int4(len(names), cut)
        if not self._quantised(names[0]):
            return PlainStack(self._draw((len(names), *cut.shape), self.dtype, columns**-0.5))
        return self._blocks(len(names), cut, plain_rows([rows for _, rows in names[0]], self._block))

    def _quantised(self, parts: Parts) -> bool:
        return self._stored[f"{parts[0][0]}.weight"] == "F8_E4M3"

    def _linear(self, cut: Cut, table: Tensor | None, *, bias: bool = False) -> LinearMap:
        """table: see Cut.grid; None: not in FP8."""
        added = self._draw(cut.shape[:1], self.dtype, 0.1) if bias else None
        if table is None:
            return Linear(self._draw(cut.shape, self.dtype, cut.width**-0.5), added)
        stack = self._blocks(1, cut, table)
        return BlockLinear(BlockMatrix(stack.data[0], stack.scale[0], stack.rows, stack.block), added)

    def _blocks(self, count: int, cut: Cut, table: Tensor) -> BlockMatrix:
        data = self._draw((count, *cut.shape), FP8, _FP8_SPREAD)
        whole = torch.empty(1, int(table.max()) + 1, -(-cut.width // self._block))
        rows, grid = cut.grid(table, whole, self._block)
        scale = self._draw((count, *grid.shape[1:]), torch.float32, 0.1).add_(1.0).clamp_(min=0.5)
        return BlockMatrix(data, scale.mul_(cut.width**-0.5 / _FP8_SPREAD), rows.to(self.device), self._block)

    def _int4(self, count: int, cut: Cut) -> Int4Stack:
        rows, columns = cut.shape
        group, spread = group_of(columns), 2.7  # of numbers from -8 to 7
        data = pack((self._values()[1:] * spread).round().clamp(-8, 7), group)
        scale = self._draw((count, rows, columns // group), torch.bfloat16, 0.1).add_(1.0)
        return Int4Stack(self._filled((count, rows, columns // 2), data), scale.mul_(cut.width**-0.5 / spread), group)


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


def load(
    name: str, config: EngineConfig, path: str = DEFAULT_MODEL, mtp: str | None = None, group: Group = Group()  # noqa: B008
) -> Model:  # fmt: skip
    """`default`, the default model with its own weights from `path` and `mtp`, or one of SHAPES, with random ones.
    A draft_vocab of 0 lets all tokens be drafted. group: of ranks that share one of SHAPES; this one's part is made."""
    if name == "default":
        engine = Engine.load(path, config, mtp=mtp)
        return Model(name, engine.model, engine.loop.work.drafter.module, MTPNames(), DEFAULT_CONTEXTS, DEFAULT_TREE)  # type: ignore[attr-defined]
    return build_shape(name, SHAPES[name], config, group)


def build_shape(name: str, shape: Shape, config: EngineConfig, group: Group = Group()) -> Model:  # noqa: B008
    """A model of random weights. config: settled, its device with its number where there are several."""
    device, shard = torch.device(config.device), group.shard
    (main_config, mtp_config), names = shape.parse(), shape.family.MTP_NAMES
    stored = [*main_tensors(main_config), *mtp_tensors(main_config, mtp_config, names)]
    weights: Any = RandomWeights(stored, _DTYPES[config.dtype], device, main_config.fp8_block, group)
    main = build.decoder(weights, main_config, lambda *_: None)
    vocab = min(config.draft_vocab or main_config.vocab_size, main_config.vocab_size)
    own = shard.part(vocab)
    head = main.unembed if vocab == main_config.vocab_size else Linear(main.head_weight[: len(own)].contiguous())
    count = 1 if mtp_config.reused else mtp_config.depth
    layers = [build.mtp_layer(weights, names, k, mtp_config, main, head) for k in range(count)]
    rotary = RotaryEmbedding(mtp_config.layer.attention.rope, device)
    ids = torch.arange(own.start, own.stop, device=device)
    module = MTPModule(shard.mtp(mtp_config), layers, main.embedding, main.norm, ids, rotary, group=group)
    backend = make_backend(config, device, lambda *_: None, group)
    return Model(name, backend.fuse(main), backend.fuse_mtp(module), names, shape.contexts, shape.tree)
