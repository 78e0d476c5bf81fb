"""One decoder layer at a time: the sliding MoE layers of a MiMo-V2-Flash slice, attention and MoE apart."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from floors import layer_bytes
from loops import build, pretend
from shapes import Model
from torch import Tensor

from mtp_engine import EngineConfig
from mtp_engine.attention.rows import StepRows
from mtp_engine.kernels.attention_check import graph_micros
from mtp_engine.kernels.experts import route
from mtp_engine.models.layers import Block
from mtp_engine.protocols import Attention

_REPLAYS = 50


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of `run`: replays of a CUDA graph of it on a GPU, calls on a CPU."""
    if device.type != "cuda":
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    return graph_micros(run, calls=1, replays=_REPLAYS) / 1e6


def plain_block(block: Any) -> Block:
    """The torch module, which a fused block wraps."""
    return block if isinstance(block, Block) else block.block


def ffn(block: Any, x: Tensor) -> Tensor:
    """The second half of a layer. x: [M, H]."""
    if isinstance(block, Block):
        return x + block.ffn(block.ffn_norm(x))
    from mtp_engine.models.fused import ffn

    return ffn(block.block.ffn, block.block.ffn_norm, x)


def hits(block: Any, x: Tensor) -> int:
    """How many experts the rows of x choose."""
    inner = plain_block(block)
    moe: Any = inner.ffn
    c = moe.config
    _, chosen = route(inner.ffn_norm(x), moe.router, moe.bias, c.per_token, c.normalise, c.scale)
    return len(chosen.unique())


@torch.inference_mode()
def measure_layers(
    model: Model, config: EngineConfig, rows_of: tuple[int, ...], context: int, bandwidth: float
) -> list[dict[str, Any]]:
    """All sliding MoE layers in a row, so that no layer finds its weights in the L2 cache, divided by their number.

    The MoE's time is that of the layers' second halves alone; the attention's is the difference to whole layers.
    """
    layers = model.config.layers
    numbers = [i for i, layer in enumerate(layers) if layer.moe and layer.attention.window]
    bench = build(model, None, 1, context, config)
    [request] = pretend(bench.loop, 1, context)
    results = []
    for rows in rows_of:
        step = StepRows.prompt(request.slot, context, rows, bench.loop.work.device)
        start = torch.randn(1, rows, model.config.hidden_size, device=bench.loop.work.device).to(
            model.main.embedding.dtype
        )
        x, found = start[0], []
        for number in numbers:
            found.append(hits(model.main.blocks[number], x))
            x = ffn(model.main.blocks[number], x)
        whole, second = _times(
            model, bench.loop.work.attention(bench.loop.work.cache, step), step.positions, start, numbers
        )
        sizes = [layer_bytes(model.config, n, h, 1, context) for n, h in zip(numbers, found, strict=True)]
        floors = [sum(part) / len(numbers) / bandwidth for part in zip(*sizes, strict=True)]
        results.append({
            "rows": rows, "experts_hit": round(statistics.mean(found), 1), "mb": round(sum(floors) * bandwidth / 1e6, 1),
            "layer_us": round(whole * 1e6, 1), "layer_x": round(whole / sum(floors), 2),
            "attention_us": round((whole - second) * 1e6, 1), "attention_x": round((whole - second) / floors[0], 2),
            "moe_us": round(second * 1e6, 1), "moe_x": round(second / floors[1], 2),
        })  # fmt: skip
    bench.close()
    return results


def _times(
    model: Model, attention: Attention, positions: Tensor, start: Tensor, numbers: list[int]
) -> tuple[float, float]:
    """Seconds of a whole layer and of its second half. start: [1, M, H]."""
    tables = {rope: rotary(positions) for rope, rotary in model.main.rotary.items()}
    blocks = [(number, model.main.blocks[number]) for number in numbers]

    def whole() -> Tensor:
        x = start
        for number, block in blocks:
            x = block(x, tables, attention, number)
        return x

    def second() -> Tensor:
        x = start[0]
        for _, block in blocks:
            x = ffn(block, x)
        return x

    assert bool(whole().isfinite().all() & second().isfinite().all()), "activations overflow"
    return seconds(whole, start.device) / len(numbers), seconds(second, start.device) / len(numbers)
