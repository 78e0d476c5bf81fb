"""Kernels are compiled side by side before they are launched. No GPU is needed: a driver stands in for it, and what is
compiled is not loaded. In a process of its own, as the other tests here run kernels in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")

SCRIPT = """
import json, sys, threading
from contextlib import nullcontext
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def launcher_cls(self, src, metadata): order.append("made")

order = []
driver.set_active(Driver())
ran = []
def load(self):
    order.append("loaded" if threading.current_thread() is threading.main_thread() else "loaded beside others")
    return lambda *_: ran.append(self.name)
CompiledKernel.run = property(load)
CompiledKernel.function = CompiledKernel.packed_metadata = None
CompiledKernel.launch_metadata = lambda *_: None
torch.cuda.device = lambda device: nullcontext()

from mtp_engine.kernels import compiling
from mtp_engine.kernels.compiling import Missing
from mtp_engine.kernels.state import last_rows
from mtp_engine.kernels.ancestry import ancestry
from mtp_engine.kernels.tree_attention import tree_attention

B, N, H = 1, 3, 64
def launches():
    values, counts = torch.zeros(B, N, H), torch.ones(B, dtype=torch.int64)
    parents = torch.zeros(B, N, dtype=torch.int64)
    last_rows(values, counts)
    ancestry(parents, parents)
    zeros = torch.zeros(B, dtype=torch.int64)
    kv = torch.zeros(64, 1, 16, dtype=torch.bfloat16)
    tree_attention(torch.zeros(B, N, 1, 16, dtype=torch.bfloat16), kv, kv, torch.zeros(B, 4, dtype=torch.int32), zeros, parents,
        torch.zeros(B, N, N, dtype=torch.int32), zeros, page_size=16, wrap=4, window=0, scale=1.0, sink=None, bound=64)

said, other, found = [], [], {}
missing = Missing()
with missing:
    launches()
    launches()  # each is noted once
    thread = threading.Thread(target=lambda: other.append(last_rows(torch.zeros(2, 5, 32), torch.ones(2, dtype=torch.int64))))
    thread.start(); thread.join()
found["ran"], ran[:], order[:] = list(ran), [], []
found["missing"] = len(missing)
compiling._MANY = int(sys.argv[1])
hits = []
triton.knobs.compilation.listener = lambda **given: hits.append(given["cache_hit"])
missing.compile(torch.device("cpu"), 2, lambda *each: said.append(each))
found["hits"] = hits
found["said"], found["order"] = [said[0], said[-1]], list(order)
again = Missing()
with again:
    launches()
found["again"], found["launched"] = len(again), len(ran)
print(json.dumps(found))
"""


@pytest.mark.parametrize("processes", [False, True])
def test_what_is_missing_is_compiled_at_once_and_only_once(tmp_path: Path, processes: bool) -> None:
    """A launch within is noted and does not happen, but another thread's does; it is compiled as the launch would have it."""

    def run() -> dict[str, object]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "TRITON_CACHE_DIR": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, "1" if processes else "99"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, object] = json.loads(done.stdout)
        return found

    found = run()
    count = found["missing"]
    assert found["ran"] == ["_pick"], "the other thread's"
    assert isinstance(count, int)
    assert count >= 3
    assert found["hits"] == [processes] * count, "this process finds what the others have made"
    (what, first, of), last = found["said"]  # type: ignore[misc]
    assert (what, of, last) == ("compiling kernels", count, ["compiling kernels", count, count])
    assert bool(first) == processes
    order = ["made"] * (0 if processes else count) + ["loaded"] * count
    assert found["order"] == order, "Triton's launchers get mixed up where threads load them at a time"
    assert found["again"] == 0
    assert found["launched"] == count
    made = {path.name for path in tmp_path.iterdir()}
    assert run()["missing"] == count
    assert {path.name for path in tmp_path.iterdir()} == made, "the second process found them on the disk"
