"""Loader: GB/s from page cache into resident weights, and peak memory against what stays resident.

    python bench/loader.py [--gb 1.5] [--repeat 3] [--ranks 2 [--device cuda]]

Writes a MiMo-V2-Flash checkpoint of that size to a temporary folder, FP8 with the fused grid and BF16, then loads each
in a fresh process. Peak is the growth of the process (VmHWM) over its size with everything imported; the last line is
JSON with the median of the repeats. --ranks: experts have the real size, and are loaded by one process, and then by so many
at the same time, each its share; every process has the same number of cores for itself. Rates are of the whole checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import conditions, require_commit
from safetensors.torch import save_file

from mtp_engine.kernels.fp8 import FP8
from mtp_engine.models import mimo_v2_flash
from mtp_engine.models.export import fp8_settings, write_json
from mtp_engine.models.fields import Fields
from mtp_engine.models.make_tiny import TINY
from mtp_engine.models.tensors import main_tensors, mtp_tensors
from mtp_engine.parallel.processes import new_store

_LAYER = {  # the real model's heads and FP8 block; width and experts scaled down
    "hidden_size": 2048, "head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "num_attention_heads": 16, "swa_num_attention_heads": 16, "num_key_value_heads": 4, "swa_num_key_value_heads": 8,
    "intermediate_size": 8192, "moe_intermediate_size": 1024, "n_routed_experts": 24, "num_experts_per_tok": 8,
    "sliding_window": 128, "vocab_size": 8192,
}  # fmt: skip
_REAL = _LAYER | {"hidden_size": 4096, "moe_intermediate_size": 2048}
_CASES = (("fp8", "bf16", False), ("bf16", "bf16", False), ("bf16", "fp32", False), ("fp8", "bf16", True))


def write(folder: Path, gigabytes: float, fp8: bool, sizes: dict[str, Any]) -> Path:
    """Numbers that repeat, in four files and one of MTP layers."""
    per_layer = 24 * 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"] * (1 if fp8 else 2) / 1e9  # its experts
    layers = max(2, round(gigabytes / per_layer))
    pattern = [int(i % 6 != 0) for i in range(layers)]
    raw = {**TINY["mimo_v2_flash"], **sizes, "num_hidden_layers": layers, "hybrid_layer_pattern": pattern,
           "moe_layer_freq": [0, *[1] * (layers - 1)], **({"quantization_config": fp8_settings(128)} if fp8 else {})}  # fmt: skip
    config, names = mimo_v2_flash.parse(Fields(raw)), mimo_v2_flash.MTP_NAMES
    mtp = mimo_v2_flash.parse_mtp(Fields(raw), [f"{names.prefix}.{k}." for k in range(3)])
    assert mtp is not None
    drawn = torch.randn(1 << 20)
    kinds = {"F8_E4M3": (drawn * 48).to(FP8), "BF16": drawn.bfloat16(), "F32": drawn.abs()}
    main = list(main_tensors(config))
    quarter = -(-len(main) // 4)
    files = {f"model-{n}": main[n * quarter : (n + 1) * quarter] for n in range(4)}
    files["model_mtp"] = list(mtp_tensors(config, mtp, names))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", raw)
    for name, tensors in files.items():
        tiled = {each.name: _tiled(kinds[each.dtype], each.shape) for each in tensors}
        save_file(tiled, folder / f"{name}.safetensors")
    return folder


def _tiled(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    data = values.view(torch.uint8).repeat(-(-prod(shape) // len(values)))
    return data[: prod(shape) * values.itemsize].clone().view(values.dtype).view(shape)


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


def child(
    folder: Path, dtype: str, dequantize: bool, rank: int, ranks: int, cores: int, port: int, device: str
) -> None:
    """Load a rank's share once, when told to, and print what it took. port: where ranks on GPUs meet, which exchange columns."""
    import time

    from mtp_engine.kernels.linear import packed_is_faster
    from mtp_engine.models import loader
    from mtp_engine.parallel.group import Group
    from mtp_engine.parallel.processes import Processes, join_store
    from mtp_engine.parallel.shard import Shard

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[rank * cores : (rank + 1) * cores])
    torch.set_num_threads(cores)
    where = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else "cpu")
    group = Group(Shard(rank, ranks))
    if where.type == "cuda":
        torch.cuda.set_device(where)
        if port:
            group = Processes(join_store(port, ranks), group.shard, where, kernels=True).group
        group.gather(torch.zeros(1 << 20, dtype=torch.int32, device=where))  # compiles it
        torch.cuda.synchronize()
    for file in folder.glob("*.safetensors"):  # into the page cache, not into this process
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    packed_is_faster()  # measured once per process; not part of loading
    print(flush=True)
    sys.stdin.readline()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    main = loader.load_main(folder, types[dtype], where, lambda *_: None, dequantize=dequantize, group=group)
    module = loader.load_mtp(folder, main, 0, lambda *_: None, dequantize=dequantize)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    seconds = time.perf_counter() - start
    peak, resident = memory("VmHWM") - before, resident_bytes([main, module.layers])
    read = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(json.dumps({"seconds": seconds, "read": read, "resident": resident, "peak": peak}))


def together(folder: Path, dtype: str, dequantize: bool, ranks: int, cores: int, device: str) -> dict[str, Any]:
    """One loading by so many processes: the slowest one's seconds and the largest peak, and what rank 0 says of the rest."""
    store = new_store(ranks) if ranks > 1 and device == "cuda" else None
    command = [sys.executable, __file__, "--child", str(folder), dtype, str(int(dequantize))]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(cores), str(store.port if store else 0), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    for each in children:
        assert each.stdout is not None
        each.stdout.readline()
    said = [json.loads(out) for out in _go(children)]
    return said[0] | {key: max(each[key] for each in said) for key in ("seconds", "peak")}


def _go(children: list["subprocess.Popen[bytes]"]) -> list[bytes]:
    for each in children:
        assert each.stdin is not None
        each.stdin.write(b"\n")
        each.stdin.flush()
    return [each.communicate()[0] for each in children]


def measure(
    folder: Path, dtype: str, dequantize: bool, repeat: int, ranks: int = 1, cores: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """cores: of each process; 0: all."""
    cores = cores or len(os.sched_getaffinity(0))
    runs = [together(folder, dtype, dequantize, ranks, cores, device) for _ in range(repeat)]
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
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where checkpoints stay; those that are there are taken.")
    parser.add_argument("--write", action="store_true", help="Write them and measure nothing.")
    parser.add_argument("--child", nargs=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.child:
        folder, dtype, dequantize, *numbers, device = options.child
        child(Path(folder), dtype, dequantize == "1", *map(int, numbers), device)
        return
    if not (0 < options.gb < 1000 and options.repeat >= 1):
        parser.error("--gb must be above 0 and --repeat at least 1")
    commit = require_commit()
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        root, sizes = options.folder or Path(temporary), _LAYER if options.ranks == 1 else _REAL
        folders = {kind: root / kind for kind in ("fp8", "bf16")}
        for kind, folder in folders.items():
            if not folder.exists():
                write(folder, options.gb, kind == "fp8", sizes)
        results = {} if options.write else measure_all(folders, options)
    print(
        json.dumps(
            {"bench": "loader", "ranks": options.ranks, "results": results, **conditions(commit, options.device)}
        )
    )


def measure_all(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    print(f"{'stored -> engine':28} {'read GB':>8} {'resident':>9} {'seconds':>8} {'GB/s':>6} {'peak/resident':>14}")
    cores = len(os.sched_getaffinity(0)) // options.ranks
    for stored, dtype, dequantize in _CASES if options.ranks == 1 else _CASES[:2]:
        for ranks in sorted({1, options.ranks}):
            name = f"{stored} -> {'fp8' if stored == 'fp8' and not dequantize else dtype}"
            name += f", {ranks} x {cores} cores" if options.ranks > 1 else ""
            folder = folders[stored]
            r = results[name] = measure(folder, dtype, dequantize, options.repeat, ranks, cores, options.device)
            print(f"{name:28} {r['read_gb']:8.2f} {r['resident_gb']:9.2f} {r['seconds']:8.2f} {r['gb_per_s']:6.2f} "
                  f"{r['peak_over_resident']:14.3f}", flush=True)  # fmt: skip
    return results


if __name__ == "__main__":
    main()
