"""48 layers of MiMo-V2-Flash on 8 GPUs, as far as fewer GPUs can say: from results of full_size.py, beside SGLang's figures.

Where one GPU did the work of one of 8 (--alone), what it took for sums with itself is replaced by what all-reduces among 8
H100s are published to take: one-shot CUDA kernels up to 32 KB, NCCL up to 256 KB, and beyond that NCCL's 25 us and the bytes at
300 GB/s, which is an assumption.
"""

from typing import Any

from rich.table import Table

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
                ms += sums * (published_us(size) - measured_us(size, times)) / 1e3
            row |= {name: round(ms, 2), f"{name} floor": found[0]["floor"]}
        rows.append(row)
    return rows


def table(result: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    how = "one GPU doing the work of one, sums as published" if result["alone"] else "measured"
    title = f"{result['layers']} layers on {result['ranks']} x {result['device']}: {how}; 1K context, ms a step"
    found = Table(
        "batch", "plain", "floor", "chain:3", "floor", "tokens/s of a user, 2.7 a step", "SGLang, 8 x H200", title=title
    )
    for row in rows:
        plain, chain = row.get("plain"), row.get("chain:3")
        rate = f"{2700 / chain:.0f}" if chain else ""
        floors = [str(row.get(f"{name} floor", "")) for name in ("plain", "chain:3")]
        found.add_row(
            str(row["batch"]),
            str(plain or ""),
            floors[0],
            str(chain or ""),
            floors[1],
            rate,
            str(SGLANG_MS[row["batch"]]),
        )
    return found
