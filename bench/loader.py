"""Loader: GB/s from page cache into resident weights, and peak memory against what stays resident.

    python bench/loader.py [--gb 1.5] [--repeat 3]

Writes a MiMo-V2-Flash checkpoint of that size to a temporary folder, FP8 with the fused grid and BF16, then loads each
in a fresh process. Peak is the growth of the process (VmHWM) over its size with everything imported; the last line is
JSON with the median of the repeats.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import conditions, require_commit

_LAYER = {  # the real model's heads and FP8 block; width and experts scaled down
    "hidden_size": 2048, "head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "num_attention_heads": 16, "swa_num_attention_heads": 16, "num_key_value_heads": 4, "swa_num_key_value_heads": 8,
    "intermediate_size": 8192, "moe_intermediate_size": 1024, "n_routed_experts": 24, "num_experts_per_tok": 8,
    "sliding_window": 128, "vocab_size": 8192,
}  # fmt: skip
_CASES = (("fp8", "bf16", False), ("bf16", "bf16", False), ("bf16", "fp32", False), ("fp8", "bf16", True))


def write(folder: Path, gigabytes: float, fp8: bool) -> Path:
    from mtp_engine.models.make_tiny import make_tiny

    per_layer = 24 * 3 * 2048 * 1024 * (1 if fp8 else 2) / 1e9  # its experts
    layers = max(2, round(gigabytes / per_layer))
    pattern = [int(i % 6 != 0) for i in range(layers)]
    return make_tiny(
        folder, fp8=fp8, block=128, shards=4, num_hidden_layers=layers, hybrid_layer_pattern=pattern,
        moe_layer_freq=[0, *[1] * (layers - 1)], **_LAYER,
    )  # fmt: skip


def memory(what: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) * 1024


def resident_bytes(root: Any) -> int:
    """Bytes of all tensors that hang on `root`, each storage once. MKL's packed weights count as they are."""
    seen: dict[int, int] = {}
    stack, visited = [root], set()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.is_mkldnn:
                seen[id(item)] = item.numel() * item.element_size()
            else:
                storage = item.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item
        elif callable(item) and getattr(item, "__closure__", None):
            stack += [cell.cell_contents for cell in item.__closure__]
        elif hasattr(item, "__dict__"):
            stack += vars(item).values()
    return sum(seen.values())


def child(folder: Path, dtype: str, dequantize: bool) -> None:
    """Load once and print what it took."""
    import time

    from mtp_engine.kernels.linear import packed_is_faster
    from mtp_engine.models import loader

    for file in folder.glob("*.safetensors"):  # into the page cache, not into this process
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    packed_is_faster()  # measured once per process; not part of loading
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    main = loader.load_main(folder, types[dtype], torch.device("cpu"), lambda *_: None, dequantize=dequantize)
    module = loader.load_mtp(folder, main, 0, lambda *_: None, dequantize=dequantize)
    seconds = time.perf_counter() - start
    peak, resident = memory("VmHWM") - before, resident_bytes([main, module.layers])
    read = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(json.dumps({"seconds": seconds, "read": read, "resident": resident, "peak": peak}))


def measure(folder: Path, dtype: str, dequantize: bool, repeat: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), dtype, str(int(dequantize))]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeat)
    ]
    seconds = statistics.median(run["seconds"] for run in runs)
    last = runs[-1]
    return {
        "read_gb": last["read"] / 1e9, "resident_gb": last["resident"] / 1e9, "seconds": seconds,
        "gb_per_s": last["read"] / 1e9 / seconds, "peak_over_resident": max(run["peak"] for run in runs) / last["resident"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), options.child[1], options.child[2] == "1")
        return
    if not (0 < options.gb < 1000 and options.repeat >= 1):
        parser.error("--gb must be above 0 and --repeat at least 1")
    commit = require_commit()
    results = {}
    print(f"{'stored -> engine':28} {'read GB':>8} {'resident':>9} {'seconds':>8} {'GB/s':>6} {'peak/resident':>14}")
    with tempfile.TemporaryDirectory(prefix="loader-") as root:
        folders = {kind: write(Path(root) / kind, options.gb, kind == "fp8") for kind in ("fp8", "bf16")}
        for stored, dtype, dequantize in _CASES:
            name = f"{stored} -> {'fp8' if stored == 'fp8' and not dequantize else dtype}"
            r = results[name] = measure(folders[stored], dtype, dequantize, options.repeat)
            print(f"{name:28} {r['read_gb']:8.2f} {r['resident_gb']:9.2f} {r['seconds']:8.2f} {r['gb_per_s']:6.2f} "
                  f"{r['peak_over_resident']:14.3f}")  # fmt: skip
    print(json.dumps({"bench": "loader", "results": results, **conditions(commit)}))


if __name__ == "__main__":
    main()
