"""What the engine runs on, and what is said when the GPU cannot."""

import sys

import pytest
import torch

from mtp_engine.assemble.backend import check_tree, gpu_errors, make_backend
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.runtime.cuda_graph import bound_bucket, bucket
from mtp_engine.runtime.step import EagerRunner

CUDA = torch.device("cuda")


def test_a_cpu_needs_nothing_but_torch() -> None:
    backend = make_backend(EngineConfig(), torch.device("cpu"), lambda *_: None)
    assert backend.attention is TorchAttention
    assert backend.runner(3) is EagerRunner
    assert not backend.kernels


def test_attention_torch_needs_no_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert make_backend(EngineConfig(attention="torch"), CUDA, lambda *_: None).attention is TorchAttention
    with pytest.raises(EngineError, match=r"pip install triton.*--attention torch"):
        make_backend(EngineConfig(), CUDA, lambda *_: None)


@pytest.mark.parametrize("shape", ["17", "2x20", "30x1"])
def test_trees_wider_than_the_kernels_take_are_refused(shape: str) -> None:
    wide = TreeShape.parse(shape)
    with pytest.raises(
        EngineError, match=rf"tree shape {shape} .* at most 16: use a narrower tree, or --attention torch"
    ):
        check_tree(wide, EngineConfig(), "cuda")
    check_tree(wide, EngineConfig(), "cpu")
    check_tree(wide, EngineConfig(attention="torch"), "cuda")
    check_tree(wide, EngineConfig(candidates="best"), "cuda")
    for narrow in ("16", "4x2x2", "tree:63", "chain:63"):
        check_tree(TreeShape.parse(narrow), EngineConfig(), "cuda")


def test_an_old_gpu_is_told_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(EngineError, match=r"Tesla T4 is of compute capability 7.5.*--attention torch --dtype fp32"):
        make_backend(EngineConfig(), CUDA, lambda *_: None)


def test_flashinfer_is_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(EngineError, match="FlashInfer computes in bf16"):
        make_backend(EngineConfig(attention="flashinfer", dtype="fp32"), CUDA, lambda *_: None)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), "lower kv_tokens, max_batch"),
        (torch.AcceleratorError("CUDA error: out of memory"), "lower kv_tokens, max_batch"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "start anew"),
    ],
)
def test_cuda_errors_become_one_line(error: RuntimeError, advice: str) -> None:
    with pytest.raises(EngineError, match=advice) as caught, gpu_errors():
        raise error
    assert "\n" not in str(caught.value)


def test_batches_and_bounds_fall_into_few_buckets() -> None:
    assert [bucket(n) for n in (1, 5, 8, 33, 500)] == [1, 6, 8, 48, 500]
    assert all(bucket(n) >= n for n in range(1, 200))
    assert [bound_bucket(n) for n in (1, 512, 513, 70_000)] == [512, 512, 2048, 131_072]
