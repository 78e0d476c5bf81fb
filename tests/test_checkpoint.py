"""Checkpoints that are not as they should be: one line that names file and tensor, whatever is wrong."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mimo import load, read_all
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_engine import Engine, EngineConfig
from mtp_engine.cli.main import main
from mtp_engine.errors import EngineError
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.make_tiny import make_tiny

K_SCALE = "model.layers.0.self_attn.k_proj.weight_scale_inv"
EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
MTP_NORM = "model.mtp.layers.1.enorm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("good") / "m", fp8=True)


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """Rewrite the file of tensor `name` with it changed, or without it."""
    file = file_of(folder, name)
    tensors = load_file(file)
    value = change(tensors.pop(name))
    save_file({**tensors, **({} if value is None else {name: value})}, file)
    return file


def truncate(folder: Path) -> None:
    with open(file_of(folder, EXPERT), "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda f: file_of(f, EXPERT).unlink(), (".safetensors is missing", "index")),
    "missing scale": (lambda f: edit(f, K_SCALE, lambda _: None), (K_SCALE, ".safetensors", "missing")),
    "missing expert scale": (lambda f: edit(f, f"{EXPERT}_scale_inv", lambda _: None), (EXPERT, "missing")),
    "missing tensor": (lambda f: edit(f, EXPERT, lambda _: None), (EXPERT, ".safetensors", "missing")),
    "missing MTP tensor": (lambda f: edit(f, MTP_NORM, lambda _: None), (MTP_NORM, "model_mtp.safetensors", "missing")),
    "wrong shape": (lambda f: edit(f, EXPERT, lambda t: t[:-1].contiguous()), (EXPERT, "[31, 64]", "[32, 64]")),
    "wrong scale shape": (lambda f: edit(f, K_SCALE, lambda t: t[:-2].contiguous()), (K_SCALE, "shape")),
    "NaN scale": (lambda f: edit(f, K_SCALE, lambda t: t * float("nan")), (K_SCALE, "scale")),
    "infinite scale": (lambda f: edit(f, f"{EXPERT}_scale_inv", lambda t: t / 0), (f"{EXPERT}_scale_inv", "scale")),
    "bf16 scale": (lambda f: edit(f, K_SCALE, lambda t: t.bfloat16()), (K_SCALE, "BF16")),
    "some parts FP8": (lambda f: edit(f, EXPERT, lambda t: t.bfloat16()), (EXPERT, "FP8")),
    "FP8 unannounced": (lambda f: set_config(f, quantization_config=None), ("quantization_config", "FP8")),
    "truncated file": (truncate, (".safetensors", "cut short")),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "unknown topk_method": (lambda f: set_config(f, topk_method="greedy"), ("config.json", "topk_method", "'greedy'")),
    "unknown family": (lambda f: set_config(f, architectures=["GPT"]), ("config.json", "GPT")),
    "index not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        ("model.safetensors.index.json", "JSON"),
    ),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ("weight_map",)),
    "MTP layer left out": (
        lambda f: [edit(f, n, lambda _: None) for n in read_all(f) if n.startswith("model.mtp.layers.1.")],
        ("model.mtp.layers.1", "missing"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(good: Path, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    folder = tmp_path / "m"
    shutil.copytree(good, folder)
    damage(folder)
    with pytest.raises(EngineError) as error:
        Engine.load(str(folder), EngineConfig(threads=1, max_context=64))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_command_line_shows_the_line(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(good, folder)
    edit(folder, K_SCALE, lambda t: t * float("nan"))
    result = CliRunner().invoke(main, ["generate", "Hi", "--model", str(folder), "--threads", "1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert K_SCALE in result.stderr
    assert file_of(folder, K_SCALE).name in result.stderr


def header(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x00",
    "too long": struct.pack("<Q", 1 << 40) + b"{}",
    "no JSON": header(b"nonsense"),
    "no object": header([1]),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}),
    "wrong size": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
    "beyond the end": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(3),
    "backwards": header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_header_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(EngineError, match=r"model\.safetensors is damaged or cut short"):
        Checkpoint(tmp_path)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(4), "d": torch.tensor(2.5),
        "e": torch.empty(0, 3), "f": torch.randn(4, 4).to(torch.float8_e4m3fn), "g": torch.tensor([True, False]),
        "big": torch.arange(6_000_000, dtype=torch.int32),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.raw(name, tensor.shape)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.float(), tensor.float())


def test_file_that_shrinks_while_read(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(150)
    with pytest.raises(EngineError, match="cut short"):
        checkpoint.raw("a", [100])


def test_weights_do_not_depend_on_the_sharding(good: Path, tmp_path: Path) -> None:
    one = make_tiny(tmp_path / "one", fp8=True, shards=1)
    assert {n: t.float().tolist() for n, t in read_all(one).items()} == {
        n: t.float().tolist() for n, t in read_all(good).items()
    }
    assert len(load(one).blocks) == len(load(good).blocks)
