"""48 layers of MiMo-V2-Flash on many GPUs, as far as fewer can say, beside SGLang's figures. From lines of two benches:

full_size.py: what was measured. Where one GPU did the work of one of 8 (--alone), what it took for sums with itself is replaced
by what all-reduces among 8 H100s are published to take (one-shot CUDA kernels up to 32 KB, NCCL up to 256 KB, and beyond that
NCCL's 25 us and the bytes at 300 GB/s, which is an assumption), and by what our kernel takes between 2.
roofline.py, of a slice on one GPU: every layer takes what a line through the measured sliding MoE layers says for the bytes that
a rank reads of it: a part that does not depend on the bytes, and a multiple of their time. Sums as above, or as our kernel
makes them between 2 H100s, which is the least that they can take among 8.
"""

from math import log2
from typing import Any

import torch
from floors import draft_bytes, main_bytes
from rich.table import Table
from shapes import FLASH

from mtp_engine.parallel.shard import Shard

OWN_US = {
    "8 KB": 2.4,
    "16 KB": 2.5,
    "32 KB": 2.8,
    "64 KB": 3.2,
    "128 KB": 3.9,
    "256 KB": 5.5,
    "512 KB": 8.5,
    "1024 KB": 14.4,
}
"""Of one sum between 2 H100s, 20 back to back in a CUDA graph, by the size of its result: bench/tensor_parallel.py."""
READ = {"H100": 3.06e12, "H200": 4.2e12}  # bytes per second
SGLANG_MS = {1: 9.3, 8: 16.6, 32: 24.1, 64: 25.4}  # a step with MTP on 8 x H200, sglang-jax#1053
_ONE_SHOT_US, _NCCL_US, _RATE = 7.8, 25.0, 300e9
_LAYERS, _HIDDEN_BYTES, _MTP_SUMS = 48, 4096 * 2, 3  # sums of an MTP layer: its projection, attention, FFN


def published_us(size: int) -> float:
    """One all-reduce of so many bytes among 8 GPUs."""
    if size <= 32 << 10:
        return _ONE_SHOT_US
    return _NCCL_US + (2 * 7 / 8 * size / _RATE * 1e6 if size > 256 << 10 else 0.0)


def measured_us(size: int, times: dict[str, float]) -> float:
    """The same by the run's own kernels. times: of sizes in KB, as full_size.py has them; larger ones take as much longer."""
    known = {int(name.split()[0]) << 10: us for name, us in times.items()}
    at = min((each for each in known if each >= size), default=max(known))
    return known[at] * max(1.0, size / at)


def estimates(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By batch, at the shortest context: milliseconds of a plain step and of chain:3. result: a line of full_size.py."""
    times = next((each["us"] for each in result["measured"] if each["part"] == "all_reduce" and "us" in each), None)
    steps = [
        each for each in result["measured"] if each["part"] == "step" and "wall" in each and each["context"] == 1024
    ]
    rows = []
    for batch in SGLANG_MS:
        row: dict[str, Any] = {"batch": batch}
        for name, tree, forced, nodes in (("plain", None, 0.0, 1), ("chain:3", "chain:3", 2.7, 4)):
            found = [s for s in steps if (s["batch"], s["tree"], s["forced"]) == (batch, tree, forced)]
            if not found:
                continue
            size = batch * nodes * _HIDDEN_BYTES
            sums = 2 * _LAYERS + (3 * _MTP_SUMS if tree else 0)
            ms = found[0]["wall"]
            if result["alone"] and times:
                itself = measured_us(size, times)
                row[f"{name}, our sums"] = round(ms + sums * (measured_us(size, OWN_US) - itself) / 1e3, 2)
                ms += sums * (published_us(size) - itself) / 1e3
            row |= {name: round(ms, 2), f"{name} floor": found[0]["floor"]}
        rows.append(row)
    return rows


def table(result: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    how = "one GPU doing the work of one, sums as published / as ours between 2" if result["alone"] else "measured"
    title = f"{result['layers']} layers on {result['ranks']} x {result['device']}: {how}; 1K context, ms a step"
    found = Table(
        "batch", "plain", "floor", "chain:3", "floor", "tokens/s of a user, 2.7 a step", "SGLang, 8 x H200", title=title
    )
    for row in rows:
        plain, chain = (
            " / ".join(f"{row[each]:.2f}" for each in (name, f"{name}, our sums") if each in row)
            for name in ("plain", "chain:3")
        )
        rate = " / ".join(f"{2700 / row[each]:.0f}" for each in ("chain:3", "chain:3, our sums") if each in row)
        floors = [str(row.get(f"{name} floor", "")) for name in ("plain", "chain:3")]
        found.add_row(
            str(row["batch"]),
            plain,
            floors[0],
            chain,
            floors[1],
            rate,
            str(SGLANG_MS[row["batch"]]),
        )
    return found


def fitted(rows: list[dict[str, Any]], bandwidth: float) -> tuple[float, float, float]:
    """Seconds of a layer without its bytes; how many times theirs these take with up to 64 rows of activations, and with 256,
    where it is no longer bytes alone that count. rows: of measure_layers."""
    few = [row for row in rows if row["rows"] <= 64]
    floors = torch.tensor([[1.0, row["mb"] * 1e6 / bandwidth] for row in few], dtype=torch.float64)
    taken = torch.tensor([[row["layer_us"] / 1e6] for row in few], dtype=torch.float64)
    fixed, times = torch.linalg.lstsq(floors, taken).solution.flatten().tolist()
    most = next((row for row in rows if row["rows"] == 256), None)
    return fixed, times, (most["layer_us"] / 1e6 - fixed) / (most["mb"] * 1e6 / bandwidth) if most else times


def on_paper(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By number and kind of GPUs and batch: milliseconds of plain steps and of chain:3, with sums as published and as our own.
    result: a line of roofline.py with layers of a slice."""
    layers = next(model["layers"]["rows"] for model in result["models"].values() if "rows" in model.get("layers", {}))
    fixed, few, many = fitted(layers, result["bandwidth_tb_s"]["read"] * 1e12)
    found = []
    for ranks, (kind, read) in ((ranks, each) for ranks in (8, 4) for each in READ.items()):
        for batch in SGLANG_MS:
            row: dict[str, Any] = {"gpus": f"{ranks} x {kind}", "batch": batch}
            for name, nodes in (("plain", 1), ("chain:3", 4)):
                size = batch * nodes * _HIDDEN_BYTES
                sums = 2 * _LAYERS + (3 * _MTP_SUMS if nodes > 1 else 0)
                times = few + (many - few) * max(0.0, log2(batch * nodes / 64) / 2)
                s = _LAYERS * fixed + times * _bytes(ranks, batch, nodes) / read + (3 * fixed if nodes > 1 else 0.0)
                row[name] = round(s * 1e3 + sums * published_us(size) / 1e3, 2)
                row[f"{name}, our sums"] = round(s * 1e3 + sums * measured_us(size, OWN_US) / 1e3, 2)
            found.append(row)
    return found


def _bytes(ranks: int, batch: int, nodes: int) -> float:
    """That a rank reads in a step at 1K context; with drafts where there are several nodes."""
    (config, mtp), shard = FLASH.parse(), Shard(0, ranks)
    held, names = shard.model(config), FLASH.family.MTP_NAMES
    verify = main_bytes(held, batch * nodes, batch, 1024, ranks)
    drafts = draft_bytes(held, shard.mtp(mtp), names, config.vocab_size // ranks, 3, batch, 1024, ranks)
    return verify + (drafts if nodes > 1 else 0.0)


def paper_table(result: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    title = f"48 layers on paper, from layers measured on {result['device']}: ms a step at 1K context, drafts 3 deep"
    names = ("plain", "plain, our sums", "chain:3", "chain:3, our sums")
    found = Table("GPUs", "batch", *names, "tokens/s of a user, 2.7 a step", "SGLang, 8 x H200", title=title)
    for row in rows:
        rates = " / ".join(f"{2700 / row[name]:.0f}" for name in names[2:])
        found.add_row(
            row["gpus"], str(row["batch"]), *(str(row[name]) for name in names), rates, str(SGLANG_MS[row["batch"]])
        )
    return found
