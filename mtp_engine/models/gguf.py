"""Turn a llama-architecture GGUF file into a Hugging Face folder: fp32 safetensors, config.json, tokenizer.json.

The `gguf` package undoes the quantisation; gguf_header.py reads the header.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from mtp_engine.models.gguf_header import REQUIRED, Source, StoredTensor, open_gguf

Progress = Callable[[str, int, int | None], None]
Array = npt.NDArray[Any]

_CONTROL, _USER_DEFINED = 3, 4  # token types
_CHUNK = 1 << 22  # weights dequantised at a time: bounds memory, whatever the size of the model


def convert(gguf_path: Path, folder: Path, progress: Progress = lambda what, done, total: None) -> None:
    """Write `folder` (created; a failure may leave it half written, so pass a temporary one) from `gguf_path`.

    Writes config.json, generation_config.json, model.safetensors (fp32, tensors streamed one by one), tokenizer.json,
    tokenizer_config.json and, if the file holds one, chat_template.jinja. `progress` counts bytes of fp32 weights.
    Raises EngineError, naming file and field, for a damaged file or an unsupported architecture, tokenizer or tensor;
    OSError where the disk fails.
    """
    source = open_gguf(gguf_path)
    config = _config(source)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(source, config, folder)
    _write_weights(source, config, folder / "model.safetensors", progress)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", special)
    _write_json(folder / "config.json", config)


def converted_bytes(gguf_path: Path) -> int:
    """About what `convert` writes: all weights in fp32. Raises EngineError for a damaged file."""
    return sum(4 * int(np.prod(tensor.shape)) for tensor in open_gguf(gguf_path).tensors.values()) + (8 << 20)


def _config(source: Source) -> dict[str, Any]:
    """LlamaForCausalLM's config.json."""
    if (architecture := source.get("general.architecture", str)) != "llama":
        raise source.error(f"general.architecture is {architecture!r}, only 'llama' is supported")
    heads = _size(source, "llama.attention.head_count")
    hidden = _size(source, "llama.embedding_length")
    head_dim = _size(source, "llama.attention.key_length", hidden // heads)
    if _size(source, "llama.rope.dimension_count", head_dim) != head_dim or head_dim % 2:
        raise source.error(f"llama.rope.dimension_count differs from the head size {head_dim}")
    if (embedding := source.tensors.get("token_embd.weight")) is None:
        raise source.error("tensor token_embd.weight is missing")
    eos = source.get("tokenizer.ggml.eos_token_id", int, None)
    eot = source.get("tokenizer.ggml.eot_token_id", int, eos)
    epsilon = np.float32(source.get("llama.attention.layer_norm_rms_epsilon", float))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _size(source, "llama.feed_forward_length"),
        "num_hidden_layers": _size(source, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(source, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _size(source, "llama.context_length"),
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, not 9.999999747378752e-06
        "rope_theta": source.get("llama.rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(source, head_dim),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": eos if eot == eos else [eos, eot],
        "torch_dtype": "float32",
    }


def _size(source: Source, key: str, default: Any = REQUIRED) -> int:
    value = source.get(key, int, default)
    if value < 1:
        raise source.error(f"field {key} is {value}")
    return int(value)


def _rope_scaling(source: Source, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's rule from the factors that GGUF stores instead of it; linear scaling; or None."""
    if (kind := source.get("llama.rope.scaling.type", str, "none")) not in ("none", "linear"):
        raise source.error(f"llama.rope.scaling.type {kind!r} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "factor": source.get("llama.rope.scaling.factor", float)}
    if (tensor := source.tensors.get("rope_freqs.weight")) is None:
        return None
    with source.path.open("rb") as file:
        stored = np.concatenate(list(_rows(source, file, tensor, heads=0))).ravel()
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    theta = source.get("llama.rope.freq_base", float, 10000.0)
    turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if stored.shape != turns.shape or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise source.error("tensor rope_freqs.weight follows a rule other than Llama 3's")
    limits = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **limits}


def _expected(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(GGUF name, Hugging Face name, shape, heads whose rows llama.cpp permuted or 0) of every tensor."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "token_embd", "model.embed_tokens", (config["vocab_size"], hidden), 0
    for layer in range(config["num_hidden_layers"]):
        old, new = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{old}.attn_norm", f"{new}.input_layernorm", (hidden,), 0
        yield f"{old}.attn_q", f"{new}.self_attn.q_proj", (heads * dim, hidden), heads
        yield f"{old}.attn_k", f"{new}.self_attn.k_proj", (kv_heads * dim, hidden), kv_heads
        yield f"{old}.attn_v", f"{new}.self_attn.v_proj", (kv_heads * dim, hidden), 0
        yield f"{old}.attn_output", f"{new}.self_attn.o_proj", (hidden, heads * dim), 0
        yield f"{old}.ffn_norm", f"{new}.post_attention_layernorm", (hidden,), 0
        yield f"{old}.ffn_gate", f"{new}.mlp.gate_proj", (inner, hidden), 0
        yield f"{old}.ffn_up", f"{new}.mlp.up_proj", (inner, hidden), 0
        yield f"{old}.ffn_down", f"{new}.mlp.down_proj", (hidden, inner), 0
    yield "output_norm", "model.norm", (hidden,), 0
    if not config["tie_word_embeddings"]:
        yield "output", "lm_head", (config["vocab_size"], hidden), 0


def _write_weights(source: Source, config: dict[str, Any], target: Path, progress: Progress) -> None:
    """Stream every tensor into a safetensors file: 8 bytes of header length, a JSON header, raw values."""
    plan, header, end = [], {}, 0
    for old, new, shape, heads in _expected(config):
        tensor = source.tensors.get(f"{old}.weight")
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else f"{list(tensor.shape)} instead of {list(shape)}"
            raise source.error(f"tensor {old}.weight is {found}")
        size = 4 * int(np.prod(shape))
        header[f"{new}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": (end, end + size)}
        end += size
        plan.append((tensor, heads))
    if unknown := source.tensors.keys() - {tensor.name for tensor, _ in plan} - {"rope_freqs.weight"}:
        raise source.error(f"tensor {min(unknown)} is not part of a llama model that this engine supports")
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with source.path.open("rb") as file, target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor, heads in plan:
            for rows in _rows(source, file, tensor, heads):
                out.write(np.ascontiguousarray(rows, dtype="<f4").data)
                done += rows.nbytes
                progress("converting weights", done, end)


def _rows(source: Source, file: BinaryIO, tensor: StoredTensor, heads: int) -> Iterator[Array]:
    """The tensor's rows, [some, columns] fp32. `heads` > 0 undoes llama.cpp's order of rows within each head.

    llama.cpp rotates neighbours, Hugging Face the two halves of a head: row 2i + j of a head there is row
    j * head_dim / 2 + i here. Quantisation is by row, so the raw rows can be moved before they are unpacked.
    """
    rows, columns = int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
    row_bytes = tensor.size // rows
    unit = rows // heads if heads else 1  # rows that must stay in one chunk
    step = max(1, _CHUNK // (columns * unit)) * unit
    file.seek(tensor.offset)
    for start in range(0, rows, step):
        some = min(step, rows - start)
        raw: Array = np.frombuffer(file.read(some * row_bytes), dtype=np.uint8).reshape(some, row_bytes)
        if heads:
            raw = raw.reshape(-1, unit // 2, 2, row_bytes).swapaxes(1, 2).reshape(some, row_bytes)
        try:
            yield dequantize(raw, tensor.kind)
        except NotImplementedError as error:
            raise source.error(f"tensor {tensor.name} has the unsupported type {tensor.kind.name}") from error


def _write_tokenizer(source: Source, config: dict[str, Any], folder: Path) -> None:
    tokens = source.get("tokenizer.ggml.tokens", list)
    if len(tokens) > config["vocab_size"]:
        raise source.error(f"tokenizer.ggml.tokens has {len(tokens)} entries for {config['vocab_size']} embeddings")
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for theirs, ours in names.items():
        token = source.get(f"tokenizer.ggml.{theirs}_token_id", int, None)
        if token is not None and not 0 <= token < len(tokens):
            raise source.error(f"tokenizer.ggml.{theirs}_token_id is {token} with {len(tokens)} tokens")
        settings[f"{ours}_token"] = None if token is None else tokens[token]
    # llama.cpp adds BOS for llama-bpe unless told otherwise, and for none of the other three.
    by_default = source.get("tokenizer.ggml.pre", str, None) == "llama-bpe"
    settings["add_bos_token"] = source.get("tokenizer.ggml.add_bos_token", bool, by_default)
    settings["model_max_length"] = config["max_position_embeddings"]
    settings["clean_up_tokenization_spaces"] = False
    tokenizer = _tokenizer(source, tokens)
    if settings["add_bos_token"]:
        if (bos := settings["bos_token"]) is None:
            raise source.error("tokenizer.ggml.add_bos_token is set without a tokenizer.ggml.bos_token_id")
        pair = (bos, config["bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[pair])
    tokenizer.save(os.fspath(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    if (template := source.get("tokenizer.chat_template", str, None)) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _tokenizer(source: Source, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE as in the model's own tokenizer.json."""
    if (model := source.get("tokenizer.ggml.model", str)) != "gpt2":
        raise source.error(f"tokenizer.ggml.model {model!r} is not supported, only 'gpt2' (byte-level BPE)")
    pre = source.get("tokenizer.ggml.pre", str)
    if (splitter := _pre_tokenizer(pre)) is None:
        raise source.error(f"tokenizer.ggml.pre {pre!r} is not supported")
    types, merges = source.get("tokenizer.ggml.token_type", list), source.get("tokenizer.ggml.merges", list)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise source.error("tokenizer.ggml.tokens has duplicates, or another length than tokenizer.ggml.token_type")
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(BPE(vocab, pairs, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust extension raises bare Exception
        raise source.error(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens ({error})") from error
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = {
        kind: [AddedToken(tokens[at], normalized=False) for at, own in enumerate(types) if own == kind]
        for kind in (_USER_DEFINED, _CONTROL)
    }
    tokenizer.add_tokens(added[_USER_DEFINED])
    tokenizer.add_special_tokens(added[_CONTROL])
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How the family splits text before BPE, from its published tokenizer.json; None for an unknown family."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if (numbers := {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(name)) is None:
        return None
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words + numbers + rest), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
