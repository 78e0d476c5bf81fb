"""Writing a model in the hub's format: shards and their index, MTP layers in a file of their own, FP8 in blocks; a
tokenizer with what chats need."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from mtp_engine.config import ModelConfig, MTPConfig
from mtp_engine.kernels.fp8 import fused_rows, plain_rows, quantise_blocks
from mtp_engine.models.build import MTPNames
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors, qkv_scale_rows

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<reserved>")
MTP_FILE = "model_mtp.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
Values = Callable[[str, tuple[int, ...]], Tensor]
"""A parameter by its name and shape, on the CPU, not yet rounded."""


def write_model(
    folder: Path, raw: Mapping[str, Any], config: ModelConfig, mtp: MTPConfig | None, names: MTPNames, values: Values,
    *, shards: int = 1,
) -> None:  # fmt: skip
    """config.json, `shards` files of the main model, the MTP layers', and the index.

    raw: what config.json shall hold, of which config and mtp are the meaning; config.fp8_block makes the weights FP8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _shards(list(main_tensors(config)), shards)
    if mtp:
        files[MTP_FILE] = list(mtp_tensors(config, mtp, names))
    rounding = _Rounding(config, values)
    for file, tensors in files.items():
        save_file(dict(rounding.store(tensors)), folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    where = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    write_json(folder / "config.json", raw)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def add_marks(tokenizer: Tokenizer) -> None:
    """ChatML's special tokens and the family's visible marks, behind what the tokenizer has."""
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKS])


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str) -> None:
    """tokenizer.json, the settings beside it, and the chat template, whose turns end in <|im_end|>."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id("<|im_end|>")})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def fp8_settings(block: int) -> dict[str, Any]:
    """What config.json's quantization_config says about FP8 with a scale per block x block weights."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}


def _shards(tensors: Sequence[Stored], count: int) -> dict[str, list[Stored]]:
    """`count` files of about equal size, in the tensors' order."""
    files: dict[str, list[Stored]] = {f"model-{n + 1:05}-of-{count:05}.safetensors": [] for n in range(count)}
    lists, total, done = list(files.values()), sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        lists[min(done * count // total, count - 1)].append(tensor)
        done += tensor.nbytes
    return files


@final
class _Rounding:
    """From values to what is stored. Of two weights that were quantised together, the second is kept until asked for."""

    def __init__(self, config: ModelConfig, values: Values) -> None:
        self._values, self._block, self._hidden = values, config.fp8_block, config.hidden_size
        self._fused = {
            f"model.layers.{i}.self_attn": layer.attention
            for i, layer in enumerate(config.layers)
            if config.fp8_block and layer.attention.window is None
        }
        self._done: dict[str, Tensor] = {}

    def store(self, tensors: Sequence[Stored]) -> Iterator[tuple[str, Tensor]]:
        for stored in tensors:
            if stored.dtype == "F8_E4M3" or not stored.is_parameter:
                if stored.name not in self._done:
                    self._done |= self._quantised(stored.name.removesuffix("_scale_inv"), stored.shape)
                yield stored.name, self._done.pop(stored.name)
            else:
                value = self._values(stored.name, stored.shape)
                yield stored.name, value.to(_DTYPES[stored.dtype], copy=True).contiguous()

    def _quantised(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        prefix = name.rsplit(".", 2)[0]
        return self._fused_group(prefix) if prefix in self._fused else self._plain(name, shape)

    def _plain(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """An FP8 matrix and its scales. It is bf16 before, so that both kinds of checkpoint start from the same."""
        assert self._block is not None
        weight = self._values(name, shape).bfloat16()
        pair = quantise_blocks(weight, plain_rows([shape[0]], self._block), -(-shape[0] // self._block), self._block)
        return dict(zip((name, f"{name}_scale_inv"), pair, strict=True))

    def _fused_group(self, prefix: str) -> dict[str, Tensor]:
        """Queries, keys and values of a global layer: one section per key head, quantised together, then split."""
        assert self._block is not None
        a = self._fused[prefix]
        sizes = [a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim]
        names = [f"{prefix}.{name}_proj.weight" for name in "qkv"]
        stacked = torch.cat([self._values(n, (rows, self._hidden)) for n, rows in zip(names, sizes, strict=True)])
        rows = fused_rows(a.kv_heads, sizes[0] // a.kv_heads, a.qk_dim, a.v_dim, self._block)
        scale_rows = qkv_scale_rows(a, self._block)
        data, scale = quantise_blocks(stacked.bfloat16(), rows, sum(scale_rows), self._block)
        scales = scale.split(list(scale_rows))  # type: ignore[no-untyped-call]
        parts = dict(zip(names, data.split(sizes), strict=True))  # type: ignore[no-untyped-call]
        parts |= {f"{name}_scale_inv": part for name, part in zip(names, scales, strict=True)}
        return {name: part.contiguous() for name, part in parts.items()}
