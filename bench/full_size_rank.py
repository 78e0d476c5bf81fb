"""One rank of bench/full_size.py: makes its share of the weights where they stay, and times what it is told to.

Every rank runs the same loop over the same made-up requests, so there is nobody to follow and nothing to tell; rank 0 prints
a JSON line before and after each part. What the parts are: see full_size.py.
"""

import gc
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import rank_checks
import torch
from floors import draft_bytes, main_bytes
from layers import seconds
from loops import ROOM, Forced, build, kernel_times, measure, pretend
from shapes import SHAPES, Model, Shape, build_shape
from torch import Tensor

from mtp_engine import EngineConfig, TreeShape
from mtp_engine.config import Experts
from mtp_engine.kernels import exchange, moe
from mtp_engine.parallel.group import Group, joined, ordered_sum, weighted
from mtp_engine.parallel.processes import Processes, join_store
from mtp_engine.parallel.shard import Shard

_HIDDEN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # whose sums travel: of 4096 columns in bf16 8 KB to 1 MB


@final
@dataclass(frozen=True)
class Job:
    """What a rank is told. port: of the store where ranks meet. alone: one process stands for all, and exchanges with itself.
    bandwidth: bytes per second, for floors."""

    rank: int
    ranks: int
    port: int
    alone: bool
    shape: str
    layers: int
    device: str
    steps: int
    bandwidth: float
    parts: list[dict[str, Any]]
    experts: Experts = "auto"


@final
class Echo:
    """An Exchange of one process that stands for all ranks: what the others would bring is what it brings itself. Its sums
    mean nothing; a rank's own work takes as long as it would among others."""

    fast = False

    def __init__(self, size: int) -> None:
        self._size = size

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        parts = x.expand(self._size, *x.shape)
        return joined(parts) if join else parts

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        return ordered_sum(self.gather(weighted(partial, weights)), dtype, residual)


@final
class Loopback:
    """Echo on a GPU, through the kernel that ranks talk with: what is sent to a rank comes in where that rank's would. Larger
    sums than it is made for are multiplied, or those over experts left as they are."""

    fast = False

    def __init__(self, size: int, device: torch.device) -> None:
        slot = 128 * 8  # bytes of a rank's packets
        self._size = size
        self._memory = torch.zeros(exchange.bytes_needed(size) // 8 + size * slot, dtype=torch.int64, device=device)
        addresses = [self._memory.data_ptr() + rank * slot for rank in range(size)]
        stop = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._boxes = exchange.Boxes.over(0, addresses, stop, device)

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        if x.element_size() < 4:
            return self.gather(x.float(), join=join).to(x.dtype)
        return exchange.gather(x, self._boxes, join=join)

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        if partial.numel() <= exchange.FEW * (1 if weights is None else weights.shape[1]):
            few = 1 << 40  # the other kernel would not do
            return exchange.reduce(partial, self._boxes, dtype, residual, weights, few=few)
        if weights is not None:
            assert residual is not None, "the model's own"
            return moe.add_up(partial, weights, residual)
        return (partial * self._size if residual is None else torch.add(residual, partial, alpha=self._size)).to(dtype)


def cut_shape(name: str, layers: int, experts: Experts = "auto") -> Shape:
    """The shape with its first `layers` layers; 0: with all."""
    shape = SHAPES[name]
    count = min(layers or shape.raw["num_hidden_layers"], shape.raw["num_hidden_layers"])
    lists = {key: shape.raw[key][:count] for key in ("hybrid_layer_pattern", "moe_layer_freq") if key in shape.raw}
    return replace(shape, raw={**shape.raw, **lists, "num_hidden_layers": count}, experts=experts)


@final
class Rank:
    """A rank's model and what it can time."""

    def __init__(self, job: Job, group: Group, device: torch.device) -> None:
        self.job, self.group, self.device = job, group, device
        self.config = EngineConfig(
            device=str(device), dtype="bf16" if device.type == "cuda" else "fp32", draft_vocab=0, max_batch=1,
            attention="exact" if device.type == "cuda" else "torch", tensor_parallel=group.size, prefix_cache=False,
            tree=TreeShape.parse("chain:3"),
        )  # fmt: skip
        self.model: Model | None = None

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        kinds = (
            self.weights,
            self.exchanges,
            self.kernels,
            self.layers,
            self.texts,
            self.profile,
            self.all_reduce,
            self.step,
        )
        found = {each.__name__: each for each in kinds}[part["part"]](part)
        gc.collect()  # graphs and caches go, before the next part makes its own
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**found, "seconds": round(time.perf_counter() - begin, 2)}

    def weights(self, part: dict[str, Any]) -> dict[str, Any]:
        shape = cut_shape(self.job.shape, self.job.layers, self.job.experts)
        self.model = build_shape(self.job.shape, shape, self.config, self.group)
        return {"gb_of_each_rank": self.everywhere(self.held())}

    def exchanges(self, part: dict[str, Any]) -> dict[str, Any]:
        return rank_checks.exchanges(self.group, self.device, part["rounds"])

    def kernels(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"us": rank_checks.kernels(self.group, self.device)}

    def layers(self, part: dict[str, Any]) -> dict[str, Any]:
        assert self.model is not None, "weights come first"
        return rank_checks.layers(self.model, self.config, self.job.bandwidth)

    def texts(self, part: dict[str, Any]) -> dict[str, Any]:
        assert self.model is not None, "weights come first"
        return rank_checks.texts(self.model, self.config, part["prompts"], part["tokens"])

    def profile(self, part: dict[str, Any]) -> dict[str, Any]:
        """The kernels of a step that take longest: microseconds and calls."""
        assert self.model is not None, "weights come first"
        bench = build(self.model, part["tree"], part["batch"], part["context"], self.config)
        pretend(bench.loop, part["batch"], part["context"])
        found = kernel_times(bench)
        bench.close()
        return {"kernels": {name[:60]: [round(us, 1), calls] for name, (us, calls) in list(found.items())[:16]}}

    def all_reduce(self, part: dict[str, Any]) -> dict[str, Any]:
        """Microseconds of one of 20 sums that stand back to back, in a graph where there are any. Sizes: of the result."""
        width = 4096 if self.device.type == "cuda" else 64
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        found = {}
        for rows in _HIDDEN_ROWS:
            partial = torch.randn(rows, width, device=self.device)

            def sums(x: Tensor = partial) -> None:
                for _ in range(20):
                    self.group.sum(x, dtype)

            found[f"{rows * width * dtype.itemsize // 1024} KB"] = round(seconds(sums, self.device) / 20 * 1e6, 2)
        return {"us": found}

    def step(self, part: dict[str, Any]) -> dict[str, Any]:
        """One kind of step: milliseconds, multiples of its bytes, memory."""
        model, tree, batch = self.model, part["tree"], part["batch"]
        assert model is not None, "weights come first"
        context = min(part["context"], model.config.max_context - ROOM - 2)
        needed, free = self.kv_bytes(batch, context + 2 * ROOM), self.free()
        if needed > 0.94 * free:
            return {"failed": f"keys and values take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        bench = build(model, tree, batch, context, self.config)
        if part["forced"]:
            bench.loop.work.verifier = Forced(bench.loop.work.verifier, part["forced"])
        pretend(bench.loop, batch, context)
        t = measure(bench, self.job.steps)
        bench.close()
        floor = sum(self.floors(tree, batch, context)) / self.job.bandwidth
        ms = {name: round(getattr(t, name) * 1e3, 3) for name in ("draft", "verify", "wall", "gap", "idle")}
        return ms | {
            "real_context": context, "accepted": round(t.accepted, 3), "floor": round(floor * 1e3, 3),
            "wall_x": round(t.wall / floor, 2), "tokens_per_s_and_request": round(t.accepted / t.wall, 1),
            "gb_of_each_rank": self.everywhere(self.held()),
        }  # fmt: skip

    def floors(self, tree: str | None, batch: int, context: int) -> tuple[float, float]:
        """Bytes that this rank reads to draft and to verify."""
        model, ranks = self.model, self.group.size
        assert model is not None
        shape, mtp = TreeShape.parse(tree) if tree else None, model.module.config
        verify = main_bytes(model.config, batch * (shape.max_nodes if shape else 1), batch, context, ranks)
        if shape is None:
            return 0.0, verify
        levels, vocab = min(mtp.depth, shape.best or len(shape.widths)), len(model.module.draft_ids)
        return draft_bytes(model.config, mtp, model.names, vocab, levels, batch, context, ranks), verify

    def kv_bytes(self, batch: int, tokens: int) -> int:
        """Of the pages of layers that see everything."""
        assert self.model is not None
        seen = [layer.attention for layer in self.model.config.layers if layer.attention.window is None]
        item = 2 if self.device.type == "cuda" else 4
        return batch * tokens * sum(a.kv_size for a in seen) * item

    def free(self) -> float:
        """Bytes, on the rank that has least."""
        if self.device.type != "cuda":
            return 4e9
        return min(self.everywhere(torch.cuda.mem_get_info(self.device)[0])) * 1e9

    def held(self) -> float:
        """Bytes that are taken on this rank's GPU, by whomever; on a CPU the most that this process ever had."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        free, whole = torch.cuda.mem_get_info(self.device)
        return whole - free

    def everywhere(self, number: float) -> list[float]:
        """In units of 1e9, of each rank."""
        given = torch.tensor([number / 1e9], dtype=torch.float64, device=self.device)
        exchange = self.group.exchange
        each = given[None] if exchange is None else exchange.gather(given)
        return [round(one, 2) for one in each.flatten().tolist()]


def work() -> None:
    job = Job(**json.loads(sys.argv[1]))
    index = 0 if job.alone else job.rank
    device = torch.device(f"cuda:{index}" if job.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    shard = Shard(job.rank, job.ranks)
    if job.alone or job.ranks == 1:
        itself = Loopback(job.ranks, device) if device.type == "cuda" else Echo(job.ranks)
        group = Group(shard, itself if job.ranks > 1 else None)
    else:
        store, kernels = join_store(job.port, job.ranks), device.type == "cuda"
        group = Processes(store, shard, device, kernels=kernels).group
    rank = Rank(job, group, device)
    with torch.inference_mode():
        for part in job.parts:
            say(job, {"begin": part})
            say(job, {"done": part | rank.run(part)})
    sys.stdout.flush()
    os._exit(0)  # with nothing to wait for: another rank may be gone


def say(job: Job, line: dict[str, Any]) -> None:
    if job.rank == 0:
        print(json.dumps(line), flush=True)


def command(job: Job) -> list[str]:
    """That starts it."""
    return [sys.executable, __file__, json.dumps(asdict(job))]


if __name__ == "__main__":
    work()
