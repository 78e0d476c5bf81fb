"""What the engine runs on, and what is said when the GPU cannot."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_engine.attention.torch import TorchAttention
from mtp_engine.backend import check_tree, gpu_errors, make_backend
from mtp_engine.config import MAX_TREE_NODES, EngineConfig, SamplingParams, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.runtime.cuda_graph import GraphRunner, bound_bucket, bucket
from mtp_engine.runtime.request import Members, TreeLimits
from mtp_engine.runtime.step import EagerRunner
from mtp_engine.sampling.batch import SamplingBatch

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
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "start anew"),
    ],
)
def test_cuda_errors_become_one_line(error: RuntimeError, advice: str) -> None:
    with pytest.raises(EngineError, match=advice) as caught, gpu_errors():
        raise error
    assert "\n" not in str(caught.value)


def test_trees_of_another_size_are_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of smaller trees needs kernels and plans of its own: it first runs, in the scratch slot, with its limits."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    ran: list[int] = []

    def draft(members: Members, bound: int) -> Any:
        ran.append(members.limits.most if members.limits else MAX_TREE_NODES)
        return None, None

    device = torch.device("cpu")
    step: Any = SimpleNamespace(draft=draft, verify=lambda *_: torch.zeros(1))
    runner = GraphRunner(step, in_flight=1, scratch=4, device=device, captures=False)
    for text in (None, "tree:7", "4", "tree:7", "chain:7", None):  # 64, 8, 5, 8, 8 and 64 nodes
        params = SamplingParams(tree=TreeShape.parse(text) if text else None)
        limits = TreeLimits.build([params], device)
        slots, sampling = torch.zeros(1, dtype=torch.int64), SamplingBatch.build([params], [0], device)
        runner.prepare(Members((), (), slots, sampling, limits=limits), 100)
    assert ran == [64, 8, 5]


def test_batches_and_bounds_fall_into_few_buckets() -> None:
    assert [bucket(n) for n in (1, 5, 8, 33, 500)] == [1, 6, 8, 48, 500]
    assert all(bucket(n) >= n for n in range(1, 200))
    assert [bound_bucket(n) for n in (1, 512, 513, 70_000)] == [512, 512, 1024, 131_072]
