"""GGUF to Hugging Face folder: weights, rope, configuration, tokenizer settings, and every way to be refused."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import tokenizers
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.models.gguf import convert

HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 128
SPECIALS = ["<|end|>", "<|start|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ã ©"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# "xyz" is what no merge leads to.
TOKENS = [*SPECIALS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), "xyz"]


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """fp32 weights of a small llama under their GGUF names."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * DIM, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * DIM, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * DIM, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INNER),
        }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


Edit = Callable[[gguf.GGUFWriter], None]


def write_tiny(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    kinds: dict[str, Kind] | None = None,
    *,
    arch: str = "llama",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    skip: str = "",
    edit: Edit = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a whole small GGUF with the `gguf` package's own writer; returns the raw (quantised) arrays written."""
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }
    for key, value in sizes.items():
        if key != skip:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    edit(writer)
    raw = {}
    for name, values in (tiny_tensors() if tensors is None else tensors).items():
        kind = (kinds or {}).get(name, Kind.F32)
        raw[name] = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, raw[name], raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


def converted(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    folder = path.with_suffix(".hf")
    convert(path, folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def refused(path: Path, *words: str) -> None:
    """`path` is refused with one line that names it and `words`."""
    with pytest.raises(EngineError) as caught:
        convert(path, path.with_suffix(".hf"))
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: llama.cpp's row 2i + j of a head is Hugging Face's row j * DIM / 2 + i."""
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(DIM // 2):
            for j in range(2):
                out[head * DIM + 2 * i + j] = weight[head * DIM + j * (DIM // 2) + i]
    return out


def test_weights_survive_exactly_and_rows_are_put_back(tmp_path: Path) -> None:
    theirs = tiny_tensors()
    stored = dict(theirs)
    for layer in range(LAYERS):
        stored[f"blk.{layer}.attn_q.weight"] = llama_cpp_order(theirs[f"blk.{layer}.attn_q.weight"], HEADS)
        stored[f"blk.{layer}.attn_k.weight"] = llama_cpp_order(theirs[f"blk.{layer}.attn_k.weight"], KV_HEADS)
    write_tiny(tmp_path / "tiny.gguf", stored)
    ours, _ = converted(tmp_path / "tiny.gguf")
    pairs = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.1.attn_k": "model.layers.1.self_attn.k_proj",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
        "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }
    for old, new in pairs.items():
        np.testing.assert_array_equal(ours[f"{new}.weight"], theirs[f"{old}.weight"], err_msg=new)
    assert len(ours) == len(theirs)


def test_attention_scores_agree_between_the_two_rotations(tmp_path: Path) -> None:
    """llama.cpp rotates neighbours of the stored rows; rotating halves of the converted rows gives the same scores."""
    stored = tiny_tensors(seed=1)
    write_tiny(tmp_path / "tiny.gguf", stored)
    ours, config = converted(tmp_path / "tiny.gguf")
    x = np.random.default_rng(2).standard_normal((2, HIDDEN))
    angle = 7.0 * config["rope_theta"] ** (-np.arange(0, DIM, 2) / DIM)
    turn = np.exp(1j * angle)

    def neighbours(rows: np.ndarray) -> np.ndarray:
        return (rows[0::2] + 1j * rows[1::2]) * turn

    def halves(rows: np.ndarray) -> np.ndarray:
        return (rows[: DIM // 2] + 1j * rows[DIM // 2 :]) * turn

    q, k = stored["blk.0.attn_q.weight"] @ x[0], stored["blk.0.attn_k.weight"] @ x[1]
    q_hf = ours["model.layers.0.self_attn.q_proj.weight"] @ x[0]
    k_hf = ours["model.layers.0.self_attn.k_proj.weight"] @ x[1]
    for head in range(HEADS):
        rows, kv_rows = slice(head * DIM, (head + 1) * DIM), slice(head // 2 * DIM, (head // 2 + 1) * DIM)
        expected = np.vdot(neighbours(q[rows]), k[kv_rows][0::2] + 1j * k[kv_rows][1::2]).real
        found = np.vdot(halves(q_hf[rows]), k_hf[kv_rows][: DIM // 2] + 1j * k_hf[kv_rows][DIM // 2 :]).real
        assert found == pytest.approx(expected, rel=1e-5)


def q8_0(block: bytes) -> np.ndarray:
    return np.frombuffer(block[:2], "<f2").astype(np.float32) * np.frombuffer(block[2:], np.int8)


def q4_1(block: bytes) -> np.ndarray:
    scale, lowest = np.frombuffer(block[:4], "<f2").astype(np.float32)
    packed = np.frombuffer(block[4:], np.uint8)
    return scale * np.concatenate([packed & 15, packed >> 4]) + lowest


def q4_0(block: bytes) -> np.ndarray:
    packed = np.frombuffer(block[2:], np.uint8)
    return np.frombuffer(block[:2], "<f2").astype(np.float32) * (np.concatenate([packed & 15, packed >> 4]) - 8.0)


def bf16(block: bytes) -> np.ndarray:
    return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)


BLOCKS = {Kind.Q8_0: (34, q8_0), Kind.Q4_1: (20, q4_1), Kind.Q4_0: (18, q4_0), Kind.BF16: (64, bf16)}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_quantised_values_follow_the_formula_of_their_type(tmp_path: Path, kind: Kind) -> None:
    name = "blk.0.ffn_down.weight"
    raw = write_tiny(tmp_path / "tiny.gguf", kinds={name: kind})[name].tobytes()
    ours, _ = converted(tmp_path / "tiny.gguf")
    size, unpack = BLOCKS[kind]
    expected = np.concatenate([unpack(raw[at : at + size]) for at in range(0, len(raw), size)])
    found = ours["model.layers.0.mlp.down_proj.weight"].ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(found - tiny_tensors()[name].ravel()).max() < 0.5


def test_permuted_rows_may_be_quantised(tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    raw = write_tiny(tmp_path / "tiny.gguf", kinds={name: Kind.Q8_0})[name]
    ours, _ = converted(tmp_path / "tiny.gguf")
    stored = np.stack([np.concatenate([q8_0(row[:34].tobytes()), q8_0(row[34:].tobytes())]) for row in raw])
    found = ours["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(llama_cpp_order(found, HEADS), stored)


def test_transformers_loads_the_folder_without_a_key_missing(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    write_tiny(tmp_path / "tiny.gguf")
    _, config = converted(tmp_path / "tiny.gguf")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "tiny.hf", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    assert (model.config.eos_token_id, model.config.bos_token_id) == (0, 1)
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def test_an_output_matrix_of_its_own_is_kept(tmp_path: Path) -> None:
    head = np.random.default_rng(3).standard_normal((len(TOKENS), HIDDEN)).astype(np.float32)
    write_tiny(tmp_path / "tiny.gguf", {**tiny_tensors(), "output.weight": head})
    ours, config = converted(tmp_path / "tiny.gguf")
    assert config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(ours["lm_head.weight"], head)


def test_a_second_end_token_is_kept(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", edit=lambda writer: writer.add_eot_token_id(5))
    assert converted(tmp_path / "tiny.gguf")[1]["eos_token_id"] == [0, 5]


def test_llama3_rope_scaling_is_found_from_its_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rule = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "head_dim": DIM, "max_position_embeddings": 131072}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(**shape, rope_parameters={**rule, "rope_theta": 50000.0}), "cpu"
    )
    factors = (50000.0 ** (-np.arange(0, DIM, 2) / DIM) / scaled.numpy()).astype(np.float32)
    assert any(1.01 < factor < 31.9 for factor in factors), "the test wants a factor between the two limits"
    write_tiny(tmp_path / "tiny.gguf", {**tiny_tensors(), "rope_freqs.weight": factors})
    assert converted(tmp_path / "tiny.gguf")[1]["rope_scaling"] == rule
    factors[1] *= 1.1
    write_tiny(tmp_path / "odd.gguf", {**tiny_tensors(), "rope_freqs.weight": factors})
    refused(tmp_path / "odd.gguf", "rope_freqs.weight")


def test_linear_rope_scaling(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    write_tiny(tmp_path / "tiny.gguf", edit=edit)
    assert converted(tmp_path / "tiny.gguf")[1]["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in tiny_tensors().items() if key != name}


def reshaped(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {**tiny_tensors(), name: np.zeros(shape, np.float32)}


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "architecture": ({"arch": "qwen2"}, ("general.architecture", "qwen2")),
    "sentencepiece": ({"tokenizer": "llama"}, ("tokenizer.ggml.model", "llama")),
    "pre-tokenizer": ({"pre": "viking"}, ("tokenizer.ggml.pre", "viking")),
    "no field": ({"skip": "block_count"}, ("llama.block_count", "missing")),
    "rope": ({"edit": yarn}, ("llama.rope.scaling.type", "yarn")),
    "part rope": ({"edit": lambda w: w.add_rope_dimension_count(8)}, ("llama.rope.dimension_count",)),
    "zero": ({"skip": "block_count", "edit": lambda w: w.add_block_count(0)}, ("llama.block_count", "0")),
    "type": ({"skip": "block_count", "edit": lambda w: w.add_string("llama.block_count", "two")}, ("two",)),
    "pad id": ({"edit": lambda w: w.add_pad_token_id(99999)}, ("tokenizer.ggml.padding_token_id", "99999")),
    "no tensor": ({"tensors": without("blk.1.attn_k.weight")}, ("blk.1.attn_k.weight", "missing")),
    "no embedding": ({"tensors": without("token_embd.weight")}, ("token_embd.weight", "missing")),
    "shape": ({"tensors": reshaped("blk.0.attn_q.weight", (32, HIDDEN))}, ("blk.0.attn_q.weight", "[32, 64]")),
    "few rows": ({"tensors": reshaped("token_embd.weight", (9, HIDDEN))}, ("tokenizer.ggml.tokens",)),
    "experts": ({"tensors": reshaped("blk.0.ffn_gate_inp.weight", (4, HIDDEN))}, ("blk.0.ffn_gate_inp.weight",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unsupported_files_are_refused_by_field(tmp_path: Path, case: str) -> None:
    arguments, words = REFUSALS[case]
    write_tiny(tmp_path / "tiny.gguf", **arguments)
    refused(tmp_path / "tiny.gguf", *words)


def test_merges_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(data.replace("Ã ©".encode(), b"zq zq"))
    refused(tmp_path / "odd.gguf", "tokenizer.ggml.merges")


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200), *range(200, len(data), len(data) // 100), len(data) - 1]:
        cut.write_bytes(data[:length])
        refused(cut, "not a whole GGUF file")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "No such file")


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """A damaged header is refused, or (a changed letter in a token) read as what it says."""
    write_tiny(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    weights_at = len(data) - sum(values.nbytes for values in tiny_tensors().values())
    rng = random.Random(4)
    odd, messages = tmp_path / "odd.gguf", []
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(weights_at)] = rng.randrange(256)
        odd.write_bytes(damaged)
        try:
            convert(odd, tmp_path / "odd.hf")
        except EngineError as error:
            messages.append(str(error))
    assert all(str(odd) in message and "\n" not in message for message in messages)
    assert len(messages) > 30


LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's own patterns (src/llama-vocab.cpp); smollm splits off single digits, then splits as GPT-2.
PATTERNS = {"llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", ""), "gpt-2": GPT2, "smollm": GPT2}
LINES = [
    "I'LL say it's 12345 times, don't you?\r\n\r\n  Yes",
    "def f(x):\n\treturn  x**2 + 10_000  # ok\n\n\n",
    "naïve café ½ ² 三 ٣٤ Ⅷ 日本語のテスト 123",
    "   leading, trailing   ",
    "🙂👩‍👩‍👧 e\u0301 \u00a0nbsp\u3000wide 'S 'Re",
]


@pytest.mark.parametrize("pre", PATTERNS)
def test_text_is_split_as_llama_cpp_splits_it(tmp_path: Path, pre: str) -> None:
    write_tiny(tmp_path / "tiny.gguf", pre=pre)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for line in LINES:
        parts = regex.split(r"(\p{N})", line) if pre == "smollm" else [line]
        expected = [piece for part in parts for piece in regex.findall(PATTERNS[pre], part)]
        found = [line[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(line)]
        assert found == expected


@pytest.mark.parametrize("pre", PATTERNS)
def test_each_familys_own_rules(tmp_path: Path, pre: str) -> None:
    """Llama 3 takes whole words from the vocabulary before it merges; Qwen composes accents first."""
    write_tiny(tmp_path / "tiny.gguf", pre=pre)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (tokenizer.encode("xyz").ids[-1:] == [TOKENS.index("xyz")]) is (pre == "llama-bpe")
    assert (TOKENS.index("Ã©") in tokenizer.encode("e\u0301").ids) is (pre == "qwen2")
    assert TOKENS.index("Ã©") in tokenizer.encode("é").ids


@pytest.mark.parametrize(
    ("pre", "flag", "bos"),
    [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_its_family_says_so(
    tmp_path: Path, pre: str, flag: bool | None, bos: bool
) -> None:
    write_tiny(tmp_path / "tiny.gguf", pre=pre, edit=lambda w: None if flag is None else w.add_add_bos_token(flag))
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is bos
    assert (tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("").ids == [1]) is bos


def test_template_and_special_tokens_are_written(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    assert tokenizer.encode("<|start|> the<|end|>").ids == [1, TOKENS.index("Ġthe"), 0]
    assert all(token.special for token in tokenizer.get_added_tokens_decoder().values())


class QuickReader(gguf.GGUFReader):
    """The package's reader, but arrays of strings go to `lists`: its own way takes it seven seconds for 49k tokens."""

    def __init__(self, path: Path) -> None:
        self.lists: list[list[str]] = []
        super().__init__(path)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        data = memoryview(self.data)
        if raw_type != gguf.GGUFValueType.ARRAY or data[orig_offs] != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        (count,), at, found = struct.unpack_from("<Q", data, orig_offs + 4), orig_offs + 12, []
        for _ in range(count):
            end = at + 8 + struct.unpack_from("<Q", data, at)[0]
            found.append(str(data[at + 8 : end], "utf-8"))
            at = end
        self.lists.append(found)
        return at - orig_offs, [], [], []


@pytest.mark.model
def test_default_model_against_the_gguf_packages_own_reader() -> None:
    """Names, ranks and a few blocks of every kind of tensor, unpacked by the formulas above."""
    folder = hub.locate(hub.DEFAULT_MODEL).folder
    kept = hub.cache_root() / "gguf" / Path(hub.SMOLLM2.member).name
    reader = QuickReader(kept)
    _languages, vocab, merges = reader.lists
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert stored["vocab"] == {token: index for index, token in enumerate(vocab)}
    assert [" ".join(pair) for pair in stored["merges"]] == merges
    ours = load_file(folder / "model.safetensors")
    assert sum(values.size for values in ours.values()) == sum(tensor.n_elements for tensor in reader.tensors)
    names = {"token_embd": "embed_tokens", "blk.7.ffn_up": "layers.7.mlp.up_proj"}
    names |= {"blk.29.attn_v": "layers.29.self_attn.v_proj", "blk.3.attn_q": "layers.3.self_attn.q_proj"}
    for tensor in reader.tensors:
        if (new := names.get(tensor.name.removesuffix(".weight"))) is None:
            continue
        size, unpack = BLOCKS[tensor.tensor_type]
        found = ours[f"model.{new}.weight"]
        for row in (0, 1, 63, 100, len(found) - 1):
            head, within = divmod(row, 64)
            source = head * 64 + 2 * (within % 32) + within // 32 if "attn_q" in tensor.name else row
            raw = tensor.data[source].tobytes()
            expected = np.concatenate([unpack(raw[at : at + size]) for at in range(0, len(raw), size)])
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-7, err_msg=tensor.name)
