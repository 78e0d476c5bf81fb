"""FlashInfer's attention for the steps of a loop. Its work is shared out on the host, between CUDA graphs.

A plan is made for a bound on each request's length and stays good until the length outgrows it; what a row sees is on
the device (kernels/attention.py). Rings are planned once, for all their pages; a graph turns their page table itself.
"""

from dataclasses import dataclass, field
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtp_engine.attention.exact import DeviceRows, exact_attention
from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, PagedKV, WindowKV
from mtp_engine.kernels.attention import TreePlan, TreeShape
from mtp_engine.kernels.flashinfer_build import load
from mtp_engine.protocols import Attention, Progress

_SLACK = 256  # tokens that a plan allows a request to grow
_TOTAL_PAGES = 1 << 16  # of a batch that a plan has room for


@final
@dataclass
class _Planned:
    """A plan for one cache group and number of rows, and what it was last made for."""

    group: PagedKV | WindowKV
    plan: TreePlan
    rows: int
    batch: int
    tables: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def refresh(self, slots: list[int], bounds: list[int]) -> None:
        """Make a new plan if the old one does not suit requests in `slots` of up to `bounds` tokens."""
        group = self.group
        if isinstance(group, WindowKV) or self.batch != len(slots):
            return
        tables = [list(group.table[slot]) for slot in slots]
        if not all(tables):
            return  # the cache of another loop, which has no such requests
        if self.tables == tables and all(b + self.rows <= t for b, t in zip(bounds, self.tokens, strict=True)):
            return
        self.tables, self.tokens = tables, [bound + self.rows + _SLACK for bound in bounds]
        pages = [min(-(-n // group.page_size), len(t)) for n, t in zip(self.tokens, tables, strict=True)]
        self.plan.plan([count * group.page_size for count in pages], tables)


@final
class FlashInferAttention:
    """The attentions of all steps of the loops that share it (an AttentionFactory)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._plans: WeakKeyDictionary[HybridKV, dict[tuple[int, int, int], _Planned]] = WeakKeyDictionary()

    def __call__(self, cache: HybridKV, rows: StepRows) -> Attention:
        """A prompt's chunks go through our own kernel: they are eager, and FlashInfer would plan each on the host."""
        return exact_attention(cache, rows) if rows.chain else _Step(self, cache, rows)

    def refresh(self, slots: list[int], bounds: list[int]) -> None:
        """Before each step, on its stream: see that the plans suit requests in `slots` of up to `bounds` tokens."""
        for plans in self._plans.values():
            for planned in plans.values():
                planned.refresh(slots, bounds)

    def plan(self, cache: HybridKV, index: int, batch: int, nodes: int, heads: int) -> TreePlan:
        """The plan of cache group `index` for so many requests of `nodes` rows, made at first use, outside of graphs."""
        plans, group = self._plans.setdefault(cache, {}), cache.groups[index]
        if (index, batch, nodes) not in plans:
            kv_heads, qk_dim, v_dim = group.k.shape[2], group.k.shape[3], group.v.shape[3]
            ring, each = isinstance(group, WindowKV), group.device_pages.shape[1]
            pages = batch * (each + 1) if ring else min(_TOTAL_PAGES, batch * each)
            shape = TreeShape(batch, nodes, heads, kv_heads, qk_dim, v_dim, group.page_size, pages, not ring)
            plan = TreePlan(load(qk_dim, v_dim, progress=self._progress), shape, group.k.device)
            if ring:
                plan.plan([(each + 1) * group.page_size] * batch, [[0] * (each + 1)] * batch)
            plans[index, batch, nodes] = _Planned(group, plan, nodes, batch)
        return plans[index, batch, nodes].plan


@final
class _Step:
    """One step (a DeviceAttention)."""

    def __init__(self, owner: FlashInferAttention, cache: HybridKV, rows: StepRows) -> None:
        self._owner, self._step = owner, DeviceRows(cache, rows)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._no_sinks: dict[int, Tensor] = {}  # by the number of heads

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._step.destination(layer)

    def attend(self, layer: int, q: Tensor, *, scale: float, sink: Tensor | None) -> Tensor:
        step = self._step
        index, member = step.cache.place[layer]
        group, (batch, nodes, heads, _) = step.cache.groups[index], q.shape
        plan = self._owner.plan(step.cache, index, batch, nodes, heads)
        if index not in self._views:
            self._views[index] = self._seen(group, plan)
        prefix, low = self._views[index]
        if sink is None:
            if heads not in self._no_sinks:
                self._no_sinks[heads] = torch.full((heads,), -float("inf"), device=q.device)
            sink = self._no_sinks[heads]
        out = torch.empty(batch * nodes, heads, group.v.shape[3], dtype=q.dtype, device=q.device)
        k, v = (x[member].view(-1, group.page_size, *x.shape[2:]) for x in (group.k, group.v))
        plan.run(
            q.flatten(0, 1), k, v, tree_mask=step.ancestry[1].flatten(), prefix=prefix, low=low, sink=sink.float(),
            scale=scale, out=out,
        )  # fmt: skip
        return out.view(batch, nodes, heads, -1)

    def _seen(self, group: PagedKV | WindowKV, plan: TreePlan) -> tuple[Tensor, Tensor]:
        """For each row how many keys of the page table are cached, and the first it sees: [B * N] int32 each."""
        step, rows = self._step, self._step.rows
        lengths, first = rows.lengths[:, None], step.first[:, None]
        start = torch.zeros_like(lengths)
        if isinstance(group, WindowKV):
            first = torch.maximum(first, rows.positions - group.window + 1)
            start = (lengths - group.window + 1).clamp(min=0) // group.page_size
            ring = group.device_pages[rows.slots]
            turns = (start + torch.arange(ring.shape[1] + 1, device=start.device)) % ring.shape[1]
            plan.page_table.copy_(ring.gather(1, turns).flatten())
            start = start * group.page_size
        prefix = (lengths - start).expand_as(rows.positions)
        low = (first - start).expand_as(rows.positions)
        return prefix.flatten().int(), low.flatten().int()

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        keys, values, rows = self.destination(layer)
        keys[rows], values[rows] = k.flatten(0, 1), v.flatten(0, 1)
        return self.attend(layer, q, scale=scale, sink=sink)
