"""Random trees on which kernels/attention.py is compared with its twin, and timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.kernels.attention import TreePlan, TreeShape, tree_attention_twin
from mtp_engine.kernels.flashinfer_build import KernelError, Progress, load

MAX_ERROR = 5e-3  # bf16 probabilities and values, fp32 sums


@final
@dataclass(frozen=True)
class Case:
    """Random arguments of `TreePlan.plan`, of `run` (without `out`), and of the twin."""

    shape: TreeShape
    kv_tokens: list[int]
    pages: list[list[int]]
    arguments: dict[str, Any]

    def out(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """NaN everywhere, so that what is not written shows."""
        q = self.arguments["q"]
        return torch.full((*q.shape[:2], self.shape.v_dim), float("nan"), dtype=dtype, device=q.device)

    def plan(self, module: Any) -> TreePlan:
        plan = TreePlan(module, self.shape, self.arguments["q"].device)
        plan.plan(self.kv_tokens, self.pages)
        return plan

    def error(self, out: Tensor) -> float:
        """Relative to the twin, ||y - y*|| / ||y*||."""
        expected = self.out(torch.float32)
        tree_attention_twin(**self.arguments, out=expected, kv_tokens=self.kv_tokens, pages=self.pages)
        return float((out.float() - expected).norm() / expected.norm())


def random_case(
    shape: TreeShape, prefixes: Sequence[int], *, spare: int = 0, window: int | None = None, sink: float | None = 0.0,
    device: torch.device, seed: int = 0,
) -> Case:  # fmt: skip
    """Requests with so many committed keys and a random tree each. spare: keys planned for beyond those there are;
    window: positions a row sees, its own among them; sink: the mean of the heads' sinks, None = -inf. Of `shape`, batch and
    max_pages are replaced."""
    source, values = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    kv_tokens = [prefix + shape.rows + spare for prefix in prefixes]
    counts = [-(-tokens // shape.page_size) for tokens in kv_tokens]
    total, rows = sum(counts), shape.rows
    order = iter(torch.randperm(total, generator=source).tolist())
    masks, lows = [], []
    for prefix in prefixes:
        depths, seen = [0] * rows, [1] * rows
        for node in range(1, rows):
            parent = int(torch.randint(max(0, node - 4), node, (), generator=source))
            depths[node], seen[node] = depths[parent] + 1, seen[parent] | 1 << node
        masks += [mask - (1 << 64 if mask >> 63 else 0) for mask in seen]
        lows += [prefix + depth + 1 - window if window else 0 for depth in depths]

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=values, device=device).to(torch.bfloat16)

    def integers(values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    sinks = torch.randn(shape.heads, generator=source) + (-float("inf") if sink is None else sink)
    arguments = {
        "q": draw(len(prefixes) * rows, shape.heads, shape.qk_dim),
        "k_cache": draw(total, shape.page_size, shape.kv_heads, shape.qk_dim),
        "v_cache": draw(total, shape.page_size, shape.kv_heads, shape.v_dim),
        "tree_mask": integers(masks, torch.int64),
        "prefix": integers([prefix for prefix in prefixes for _ in range(rows)], torch.int32),
        "low": integers(lows, torch.int32),
        "sink": sinks.to(device),
        "scale": shape.qk_dim**-0.5,
    }
    pages = [[next(order) for _ in range(count)] for count in counts]
    return Case(replace(shape, batch=len(prefixes), max_pages=total), kv_tokens, pages, arguments)


def graph_micros(call: Callable[[], object], *, calls: int = 20, replays: int = 10) -> float:
    """Median microseconds of a call, from replays of a CUDA graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(before.elapsed_time(after) for before, after in pairwise(marks))
    return times[len(times) // 2] * 1e3 / calls


@final
@dataclass(frozen=True)
class Checked:
    what: str
    error: float  # relative, see Case.error
    micros: float

    @property
    def passed(self) -> bool:
        return self.error <= MAX_ERROR  # not NaN either


def check(qk_dim: int, v_dim: int, *, progress: Progress = lambda what, done, total: None) -> Iterator[Checked]:
    """Run the module on random trees. Raises KernelError where that cannot be."""
    if not torch.cuda.is_available():
        raise KernelError("no NVIDIA GPU is in sight: the attention can only be checked where it is to run")
    module, device = load(qk_dim, v_dim, progress=progress), torch.device("cuda")
    heads, kv_heads = {(192, 128): (64, 4), (64, 64): (9, 3)}.get((qk_dim, v_dim), (32, 8))
    for what, rows, prefixes, spare, window, sink in (
        ("1 row", 1, [1000], 0, None, None),
        ("16 rows behind nothing", 16, [0], 0, None, 1.0),
        ("16 rows, planned for 900 keys more", 16, [1000], 900, None, 0.0),
        ("16 rows, window of 128", 16, [150], 40, 128, 0.0),
        ("64 rows", 64, [3000], 0, None, None),
        ("8 rows, batch of 4 lengths", 8, [0, 5, 333, 2000], 64, None, 0.0),
    ):
        shape = TreeShape(0, rows, heads, kv_heads, qk_dim, v_dim, 64, 0, split=window is None)
        case = random_case(shape, prefixes, spare=spare, window=window, sink=sink, device=device, seed=rows)
        plan, out = case.plan(module), case.out()
        plan.run(**case.arguments, out=out)
        error = case.error(out)
        yield Checked(what, error, graph_micros(lambda: plan.run(**case.arguments, out=out)))  # noqa: B023
