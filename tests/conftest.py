"""Shared settings: one thread for tiny tensors, and no GPU tests where there is no GPU."""

import importlib.util
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on a CPU, slowly
    if importlib.util.find_spec("triton"):
        from interpreter import repair

        repair()

KERNEL_TESTS = (
    "chain_attention",
    "dense",
    "device_path",
    "draft_ops",
    "flashinfer",
    "forest_attention",
    "moe_kernels",
    "tree_attention",
    "tree_kernels",
)
collect_ignore = [] if importlib.util.find_spec("triton") else [f"test_{name}.py" for name in KERNEL_TESTS]

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)  # CI must not depend on luck
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> Iterator[None]:
    """Tests that do not name a device mean the CPU, also on a machine with a GPU."""
    from mtp_engine import engine
    from mtp_engine.backend import find_device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "find_device", lambda name: find_device("cpu" if name == "auto" else name))
        yield


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, except where the default model runs: a second one makes tiny tensors up to ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "model" in request.keywords else 1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)
