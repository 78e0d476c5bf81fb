"""Attention over a tree of new rows, bit for bit what decoding one row at a time computes at the same position.

A row at position p sees one key per position: below L, the committed length, the cached one, and from L on its
ancestor's or its own. If a row's keys are always added up in the same grouping of *positions*, the other rows of the
step cannot change a bit of its result. The grouping, a function of p alone:

- Tiles of `tile` positions. Within a tile the order is the tensor core's.
- The *near* keys, in the row's own tile and the one before (in a windowed layer: all of the window), are one run of the
  online softmax, tile by tile in ascending order.
- The *far* keys, all below those, fall into splits at fixed positions (`Plan.splits`), each a run of its own.
- The runs are merged one by one: the splits in ascending order, then the near one.

With at most 64 rows and tiles of at least 64 keys, every far key of every row lies below L: it is the same key for all
rows. So a far split is read once per key head, for nodes and grouped heads folded into one block of rows, while a near
run serves one node, whose ancestors it finds through `paths`. Both are programs of one kernel and run the same loop on
blocks of one shape. There a row's result does not depend on the rows beside it, and a tile of which a row sees nothing
leaves the row's state as it was, bit for bit.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.kernels.ancestry import MAX_NODES
from mtp_engine.kernels.launch import cdiv, next_power_of_2, pdl
from mtp_engine.kernels.reference import attend, visible_bias
from mtp_engine.kernels.tree_attention_kernels import LOG2E, merge_kernel, runs_kernel


@final
@dataclass(frozen=True)
class Plan:
    """What may be tuned. `tile` and `splits` are part of the arithmetic; the others change no bit.

    splits: (keys per split, how many splits) for two stretches of positions, then the keys per split beyond.
    rows: block of (node, head) rows that share a tile's keys; with tensor cores 16 per warp or more, so that no sum
    crosses warps and blocks of any size add alike.
    depth: tiles that are fetched ahead.
    """

    tile: int = 64
    splits: tuple[int, int, int, int, int] = (256, 16, 512, 24, 2048)
    rows: int = 64
    warps: int = 4
    depth: int = 2
    merge_warps: int = 1

    @classmethod
    def default(cls, dtype: torch.dtype, rows: int, kv_heads: int, dim: int, bound: int = 0) -> "Plan":
        """rows: (node, head) rows that share far keys, or one node's if there are none. They may not decide arithmetic, nor
        may `bound`, see tree_attention. dim: of queries."""
        # measured on an H100 (bench/LOG.md). Few heads make few programs, of which shorter splits make more, and wide heads
        # gain more from two programs per multiprocessor, unless each has many tiles to read
        splits = (128, 32, 512, 56, 4096)
        if kv_heads >= 4:
            splits = (256, 16, 512, 24, 2048) if kv_heads >= 8 else (256, 16, 1024, 60, 4096)
        depth = 2 if bound > 4096 or (64 < dim <= 128 if bound else dim <= 64) else 1
        if dtype == torch.float32:  # without tensor cores; only exact, not fast
            return cls(splits=splits, rows=16, warps=8, depth=0)
        return cls(splits=splits, depth=depth) if rows <= 64 else cls(splits=splits, rows=128, warps=8, depth=depth)

    def far(self, bound: int) -> int:
        """How many splits the far keys of a row at position bound - 1 fall into."""
        left, count = ((bound - 1) // self.tile - 1) * self.tile, 0
        for size, most in (self.splits[:2], self.splits[2:4], (self.splits[4], 1 << 30)):
            taken = min(most, max(0, -(-left // size)))
            left, count = left - taken * size, count + taken
        return count


@final
@dataclass(frozen=True)
class Scratch:
    """Room for the runs of one call. Calls that follow one another on a stream may share it."""

    acc: Tensor  # fp32, at least rows * runs * Dv
    stats: Tensor  # fp32, at least rows * runs * 2: maximum and sum

    @classmethod
    def empty(cls, rows: int, runs: int, dim: int, device: torch.device) -> "Scratch":
        """rows: B * N * Hq; runs: 1 + Plan.far(bound); dim: Dv."""
        acc = torch.empty(rows * runs * dim, dtype=torch.float32, device=device)
        return cls(acc, torch.empty(rows * runs * 2, dtype=torch.float32, device=device))


def head_blocks(dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover a head's dimension: 192 = 128 + 64, 24 -> 16 + 16, 8 -> 16 + 0."""
    whole = max(16, 1 << dim.bit_length() - 1)
    return whole, max(16, next_power_of_2(dim - whole)) if dim > whole else 0


def tree_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, bound: int, scale: float, sink: Tensor | None,
    scratch: Scratch | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Attention of up to 64 new rows per request, whose own keys and values are already in the cache.

    q: [B, N, Hq, Dk] bf16 or fp32, k_cache: [R, Hkv, Dk], v_cache: [R, Hkv, Dv] storage rows of one layer, all with a
    contiguous last dimension. pages: [B, P] int32: cache slot t lies in storage row t % page_size of page
    pages[b, t // page_size % wrap]; wrap is smaller than what t reaches only in windowed layers. Row j of the step
    has slot lengths[b] + j. lengths, first: [B] int64, tokens cached and the first position that has a key (a row
    always sees itself). positions: [B, N] int64; paths: [B, N, N] int32 from `ancestry`. window: keys a row sees,
    itself included, 0 = all. bound: no lengths[b] + N exceeds it; it decides the grid, and programs that find nothing
    to do are cheap but not free. scale: of the scores. sink: [Hq] logits that join the denominator.
    Returns [B, N, Hq, Dv] in q's dtype.
    """
    batch, nodes, heads, dim = q.shape
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or Plan.default(q.dtype, group if window else nodes * group, kv_heads, dim, 0 if window else bound)
    assert nodes <= MAX_NODES <= plan.tile, "more rows, or smaller tiles, and far keys would differ between rows"
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages, positions)), "last dimension"
    assert all(x.is_contiguous() for x in (paths, lengths, first)), "paths come from ancestry()"
    out = torch.empty(batch, nodes, heads, v_dim, dtype=q.dtype, device=q.device)
    splits = 0 if window else plan.far(bound)
    if splits and scratch is None:
        scratch = Scratch.empty(batch * nodes * heads, 1 + splits, v_dim, q.device)
    acc, stats = (scratch.acc, scratch.stats) if splits and scratch else (out, out)
    assert not splits or acc.numel() >= batch * nodes * heads * (1 + splits) * v_dim, "the scratch is too small"
    shared: dict[str, Any] = {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "DV": v_dim,
        "DV_PAD": max(16, next_power_of_2(v_dim)),
    }
    shared |= {"TILE": plan.tile, "SPLITS": plan.splits, "SINK": sink is not None, "PDL": pdl(), "launch_pdl": pdl()}
    shared |= {"enable_fp_fusion": False}
    whole, rest = head_blocks(dim)
    runs_kernel[splits * cdiv(nodes * group, plan.rows) * kv_heads + nodes * kv_heads, batch](
        q, k_cache, v_cache, pages, lengths, positions, paths, first, out if sink is None else sink, out, acc, stats,
        *q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], positions.stride(0), pages.stride(0), wrap,
        nodes, splits, scale * LOG2E.value, DK=dim, D0=whole, D1=rest, PAGE=page_size, WINDOW=window, ROWS=plan.rows,
        DEPTH=plan.depth, WHOLE=splits == 0, num_warps=plan.warps, **shared,
    )  # fmt: skip
    if splits:
        merge_kernel[(batch * nodes * heads,)](
            acc, stats, lengths, positions, first, out if sink is None else sink, out, positions.stride(0), nodes,
            splits, num_warps=plan.merge_warps, **shared,
        )  # fmt: skip
    return out


def tree_attention_twin(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, bound: int, scale: float, sink: Tensor | None,
    scratch: Scratch | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """`tree_attention` in torch: one dense softmax in fp32 over the first `bound` slots and the step's rows."""
    nodes = q.shape[1]
    index = torch.arange(nodes, device=q.device)
    prefix = torch.arange(bound, device=q.device).expand(len(lengths), -1)
    oldest = torch.maximum(positions - window + 1 if window else torch.zeros_like(positions), first[:, None])
    cached = (prefix < lengths[:, None])[:, None] & (prefix[:, None] >= oldest[..., None])
    offsets = (positions - lengths[:, None]).clamp(max=nodes - 1)
    above = paths.long().gather(2, offsets[:, None].expand_as(paths)) == index
    rows = (above & (positions[:, None] >= oldest[..., None])) | (index[:, None] == index)
    seen = torch.cat([cached, rows], -1)
    slots = torch.cat([prefix, lengths[:, None] + index], 1)
    storage = pages.long().gather(1, slots // page_size % wrap) * page_size + slots % page_size
    unseen = ~seen.any(1)[..., None, None]  # may hold anything
    k, v = (cache[storage].masked_fill(unseen, 0) for cache in (k_cache, v_cache))
    return attend(q.contiguous(), k, v, visible_bias(seen, q.shape[2] // k.shape[2]), scale, sink)
