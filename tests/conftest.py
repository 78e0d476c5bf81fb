"""Shared settings: one thread for each test, and no GPU tests where there is no GPU."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Processes, one per core, share a run of all tests on a CPU. -n says otherwise: 0 is none."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    in_process = "PYTEST_XDIST_WORKER" in os.environ or torch.cuda.is_available()
    if whole and not in_process and config.pluginmanager.has_plugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.maxprocesses = "auto", 8
        config.option.dist = (
            "worksteal"  # what one has not begun, another takes; neighbours share what a module has loaded
        )


@pytest.fixture(autouse=True, scope="session")
def on_one_core() -> Iterator[None]:
    """Tests that do not name a device mean the CPU, also on a machine with a GPU; those that do not say how many threads want
    one: a second makes tiny tensors up to ten times slower, and other tests have the other cores."""
    from mtp_engine import team
    from mtp_engine.assemble import backend, settle

    find, size = backend.find_device, backend.pool_size
    torch.set_num_threads(1)  # for fixtures, too, which are made before `one_thread`
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settle, "find_device", lambda name: find("cpu" if name == "auto" else name))
        for module in (settle, backend, team):
            patch.setattr(module, "pool_size", lambda asked: size(asked or 1))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever an engine before has set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the CPU's library is compiled, once for all tests."""
    return tmp_path_factory.mktemp("library")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)
