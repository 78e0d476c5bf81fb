"""FlashInfer's FA2 attention for trees of new rows over a paged cache, through an attention variant of our own.

A request's keys are numbered along its page table, s = 0, 1, ... A row r sees key s if

    low[r] <= s < prefix[r]    or    bit s - prefix[r] of tree_mask[r] is set (s - prefix[r] < 64)

so `prefix` is where the step's own rows begin, which lie there in the order of the nodes. Neither depends on how many
keys the plan was made for: a plan for more keys than there are serves until the pages are used up, and what changes
from step to step lies on the device, where a CUDA graph can read it. A sliding window needs nothing else: its page table
starts at some whole page, prefix and low count from there, and low keeps a row to its window. Every row has a sink, a
logit that joins the softmax denominator and carries no value; -inf is none, exactly.

Keys and values that no row sees must be finite all the same, in planned pages too: 0 * NaN is NaN.

Not bitwise invariant: FlashInfer picks the shape of its tiles by the number of rows and splits keys by the lengths of the
batch. kernels/tree_attention.py is for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.kernels.flashinfer_build import KernelError
from mtp_engine.kernels.launch import pdl

MAX_ROWS = 64


@final
@dataclass(frozen=True)
class TreeShape:
    """What is the same in every call that a plan serves. `rows` per request, at most 64; `max_pages` of all requests
    together. split: a request's keys are shared out among several blocks, and their results merged by a second kernel;
    without, one block reads them all, which suits the few keys of a sliding window."""

    batch: int
    rows: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    page_size: int
    max_pages: int
    split: bool = True


@final
@dataclass(frozen=True)
class _Staging:
    """Pinned memory from which one plan is copied to the device; `copied` says when that is over."""

    plan: Tensor  # uint8
    tables: Tensor  # [2 * B + 1 + pages] int32
    copied: torch.cuda.Event


@final
class TreePlan:
    """How FlashInfer shares out the work of calls of one shape, and the page tables of the requests.

    `plan` runs on the host, outside of CUDA graphs, on the stream of the calls. `run` may be captured: all that it reads
    keeps its place, and what is fixed at capture (grid, offsets, whether keys are split) is the same for every plan of an
    object. FlashInfer's scheduler.cuh, in graph mode: the grid is 2 blocks per multiprocessor over the key heads or, if that
    is more, the row tiles of the batch; blocks without work leave at once. The size of a split lies on the device.
    """

    def __init__(
        self, module: Any, shape: TreeShape, device: torch.device, *, workspace: Tensor | None = None, depth: int = 4
    ) -> None:
        """workspace: uint8 on the device, at least `workspace_bytes`, for plans whose calls never overlap; None: its own.
        depth: plans that may be under way to the device at a time; one more waits."""
        if not 1 <= shape.rows <= MAX_ROWS:
            raise ValueError(f"{shape.rows} rows: a tree mask has {MAX_ROWS} bits")
        self._module, self._shape, self._turn = module, shape, 0
        self._info: list[int] = []
        self._row_starts = torch.arange(0, (shape.batch + 1) * shape.rows, shape.rows, dtype=torch.int32)
        self._device_row_starts = self._row_starts.to(device)
        self._tables = torch.zeros(2 * shape.batch + 1 + shape.max_pages, dtype=torch.int32, device=device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._arguments = (
            shape.batch * shape.rows, shape.batch, shape.heads, shape.kv_heads, shape.page_size, True, shape.qk_dim, shape.v_dim,
            False, -1, -1 if shape.split else shape.max_pages, False, 0 if shape.split else 2 * processors, shape.rows,
        )  # fmt: skip  # ..., CUDA graph, ..., causal, window, split at, never split, blocks taken by others, rows each
        # The scheduler asks for far more room than blocks write (heads * tile rows for each, not the heads of one group),
        # but only counts it: it is shown a terabyte without memory, and the real thing is laid out below.
        self._unbounded = torch.empty(1, dtype=torch.uint8, device=device).expand(1 << 40)
        one_page = torch.arange(shape.batch + 1, dtype=torch.int32)
        size = module.workspace_size(self._unbounded, self._row_starts, one_page, one_page[1:], *self._arguments)[1]
        self._integers = torch.zeros(size, dtype=torch.uint8, device=device)
        pin = device.type == "cuda"  # in tests it may not be
        self._staging = [
            _Staging(
                torch.zeros(size, dtype=torch.uint8, pin_memory=pin),
                torch.zeros(self._tables.shape, dtype=torch.int32, pin_memory=pin),
                torch.cuda.Event(),
            )
            for _ in range(depth)
        ]
        self.plan([1] * shape.batch, [[0]] * shape.batch)
        needed = self.workspace_bytes
        self.workspace = torch.empty(needed, dtype=torch.uint8, device=device) if workspace is None else workspace
        if self.workspace.numel() < needed:
            raise ValueError(f"a workspace of {self.workspace.numel()} bytes; {needed} are needed")

    @property
    def _parts(self) -> int:
        """Most (row, split) pairs with a result of their own, each for all heads."""
        shape, blocks, tile = self._shape, self._info[0], self._info[3]
        tiles = -(-shape.rows * shape.heads // shape.kv_heads // tile)
        return shape.rows * (blocks // tiles) if shape.split else 0

    @property
    def workspace_bytes(self) -> int:
        return max(16, self._parts * self._shape.heads * (2 * self._shape.v_dim + 4))  # bf16 values, fp32 log-sums

    def plan(self, kv_tokens: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """kv_tokens: for each request an upper bound, at least 1, of the keys there will be; pages: its page table."""
        shape, staging = self._shape, self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        counts = [-(-tokens // shape.page_size) for tokens in kv_tokens]
        starts = [0, *accumulate(counts)]
        tables = [table[:count] for count, table in zip(counts, pages, strict=True)]
        if len(counts) != shape.batch or starts[-1] > shape.max_pages or min(counts) < 1:
            raise ValueError(
                f"{counts} pages: the plan is for {shape.batch} requests and {shape.max_pages} pages in all"
            )
        if [len(table) for table in tables] != counts:
            raise ValueError("a page table is shorter than its tokens need")
        last = [(tokens - 1) % shape.page_size + 1 for tokens in kv_tokens]
        flat = torch.tensor([*starts, *last, *(page for table in tables for page in table)], dtype=torch.int32)
        staging.copied.synchronize()
        staging.tables[: len(flat)] = flat
        host = flat[: shape.batch + 1]
        made = self._module.plan(
            self._unbounded, self._integers, staging.plan, self._row_starts, host, host[1:], *self._arguments
        )
        info = [int(value) for value in made]
        if self._info and info != self._info:
            raise KernelError("FlashInfer planned a different grid than before; please report this as a bug")
        self._info = info
        self._tables[: len(flat)].copy_(staging.tables[: len(flat)], non_blocking=True)
        staging.copied.record()

    @property
    def page_table(self) -> Tensor:
        """[max_pages] int32 on the device, request after request, which a graph may rewrite between plans."""
        return self._tables[2 * self._shape.batch + 1 :]

    def run(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
        tree_mask: Tensor, prefix: Tensor, low: Tensor, sink: Tensor, scale: float, out: Tensor,
    ) -> Tensor:  # fmt: skip
        """q: [B * N, Hq, Dk] bf16; k_cache: [pages, page, Hkv, Dk], v_cache: [pages, page, Hkv, Dv] bf16, any strides but
        the last; tree_mask: [B * N] int64; prefix, low: [B * N] int32; sink: [Hq] fp32. Writes and returns out,
        [B * N, Hq, Dv] bf16, contiguous. A row that sees nothing gets zeros."""
        batch = self._shape.batch
        info = list(self._info)
        info[10], info[11] = (
            0,
            self._parts * self._shape.heads * 2 * self._shape.v_dim,
        )  # where values and log-sums begin
        self._module.paged_run(
            self.workspace, self._integers, info, q, k_cache, v_cache, self._device_row_starts, self._tables[: batch + 1],
            self._tables[2 * batch + 1 :], self._tables[batch + 1 : 2 * batch + 1], out, None, 2, 0, -1, pdl(),
            tree_mask, prefix, low, sink, scale,
        )  # fmt: skip  # no log-sums wanted, custom mask, [page, head] order, no window
        return out


def tree_attention_twin(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
    tree_mask: Tensor, prefix: Tensor, low: Tensor, sink: Tensor, scale: float, out: Tensor,
    kv_tokens: Sequence[int], pages: Sequence[Sequence[int]],
) -> Tensor:  # fmt: skip
    """The twin of `TreePlan.plan` and `run`: their arguments, in fp32, any device and dtypes."""
    rows, group = len(q) // len(kv_tokens), q.shape[1] // k_cache.shape[2]
    for b, (tokens, table) in enumerate(zip(kv_tokens, pages, strict=True)):
        mine, index = slice(b * rows, (b + 1) * rows), torch.tensor(table, device=q.device)
        k, v = (cache[index].flatten(0, 1)[:tokens].float() for cache in (k_cache, v_cache))
        s = torch.arange(tokens, device=q.device)
        node = s - prefix[mine, None].long()
        tree = (node >= 0) & (node < 64) & (tree_mask[mine, None] >> node.clamp(0, 63) & 1 == 1)
        seen = tree | ((s >= low[mine, None]) & (node < 0))
        scores = torch.einsum("nhd,shd->hns", q[mine].float(), k.repeat_interleave(group, 1)) * scale
        scores = scores.masked_fill(~seen, -float("inf"))
        scores = torch.cat([scores, sink[:, None, None].float().expand(-1, rows, 1)], -1)
        weights = scores.softmax(-1)[..., :-1].nan_to_num(0.0)  # a row that sees nothing
        out[mine] = torch.einsum("hns,shd->nhd", weights, v.repeat_interleave(group, 1)).to(out.dtype)
    return out
