"""Attention of chains: prompts, and steps of many requests. The bits of kernels/tree_attention.py, whose docstring says
which keys are added up in what order.

A row's key at a position is the same for all rows of a chain, so one program serves up to 64 or 128 (node, head) rows: it
reads the request's keys once, run after run, and merges the runs as it goes. Nothing goes through memory in between.
There is one program per key head and tile of positions: where these are too few to fill the GPU, tree_attention's many
programs are faster. On Hopper, steps of many requests go through kernels/chain_teams.py.

Chains of several requests may be packed, one behind the other, with rows behind them that belong to nobody: then a table
on the device says which rows each program serves, so that a CUDA graph fits any prompts of so many rows.
"""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.ancestry import MAX_NODES
from mtp_engine.kernels.chain_attention_kernels import blocks_kernel, chain_kernel
from mtp_engine.kernels.chain_teams import chain_teams, suits_teams
from mtp_engine.kernels.launch import cdiv, next_power_of_2, overlap, pdl, warpgroups
from mtp_engine.kernels.tree_attention import Plan, head_blocks
from mtp_engine.kernels.tree_attention_kernels import LOG2E

PROGRAMS = 96  # fewer leave too much of the GPU idle


@final
@dataclass(frozen=True)
class Packed:
    """How many of a row of rows are each request's."""

    lengths: Tensor  # [B] int64, the position of a request's first row
    counts: Tensor  # [B] int64
    ends: Tensor  # [B] int64, the row behind a request's last one
    rows: int  # of all requests, and those of nobody
    padded: bool  # whether there may be rows of nobody, whose result is 0
    _blocks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Tensor, counts: Tensor, rows: int, *, padded: bool = False) -> "Packed":
        return cls(lengths, counts, counts.cumsum(0), rows, padded)

    def blocks(self, tile: int, taken: int) -> Tensor:
        """[M, 2] int32: the request of a block of at most `taken` rows in one tile of positions, and the position of the
        first of them. The request is -1 for blocks that are not there."""
        if (tile, taken) not in self._blocks:
            batch = len(self.counts)
            size = min(self.rows, cdiv(tile, taken) * (self.rows // tile + 2 * batch))
            blocks = torch.empty(size, 2, dtype=torch.int32, device=self.counts.device)
            padded = next_power_of_2(batch)
            blocks_kernel[(cdiv(size, 64),)](
                self.lengths, self.counts, blocks, batch, size, TILE=tile, TAKEN=taken, B=padded, M=64, PDL=pdl(),
                launch_pdl=pdl(),
            )  # fmt: skip
            self._blocks[tile, taken] = blocks
        return self._blocks[tile, taken]


def suits_chain(batch: int, nodes: int, kv_heads: int) -> bool:
    """Whether `chain_attention` is the faster one for chains of so many nodes, or the only one."""
    return nodes > MAX_NODES or batch * kv_heads >= PROGRAMS


def chain_plan(dtype: torch.dtype, nodes: int, heads: int, kv_heads: int, dim: int, batch: int = 64) -> Plan:
    """Tiles and splits are tree_attention's; the rest changes no bit. nodes: rows of a request, or of all that are packed;
    dim: of queries."""
    plan = Plan.default(dtype, 1, kv_heads, dim)
    if dtype == torch.float32:
        return plan
    rows = nodes * (heads // kv_heads)
    depth = 3 if batch * kv_heads <= 132 else 1  # one program may have a multiprocessor to itself (measured on an H100)
    return replace(plan, rows=64, warps=4, depth=depth) if rows <= 64 else replace(plan, rows=128, warps=8, depth=2)


def chain_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, first: Tensor | None, *, page_size: int,
    wrap: int, window: int, scale: float, sink: Tensor | None, plan: Plan | None = None,
    packed: Packed | None = None, fresh: tuple[Tensor, Tensor] | None = None, teams: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of any number of new rows per request, row i at position lengths[b] + i, above row i + 1; all their keys and
    values are in the cache already.

    Arguments as for `tree_attention`, but first may be None: 0 everywhere. scale must be positive. packed: q is
    [1, N, Hq, Dk], with the rows of one request behind those of the other. fresh: these rows' own keys and values,
    [N, Hkv, Dk] and [N, Hkv, Dv], where they are packed, windowed, and not in the cache yet. teams: kernels/chain_teams.py may
    serve the call, if it can; that changes no bit.
    Returns [B, N, Hq, Dv], or [1, N, Hq, Dv], in q's dtype.
    """
    (nodes, heads, dim), batch = q.shape[1:], len(lengths)
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or chain_plan(q.dtype, nodes, heads, kv_heads, dim, batch)
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages)), "last dimension"
    assert not fresh or (packed and window and all(x.is_contiguous() for x in fresh)), "rows of a windowed layer"
    new = torch.zeros if packed and packed.padded else torch.empty
    out = new(*q.shape[:3], v_dim, dtype=q.dtype, device=q.device)
    when = overlap(q.shape[0] * q.shape[1])
    simple = not window and packed is None and first is None and sink is None
    if teams and simple and warpgroups() and suits_teams(q, k_cache, v_cache, page_size, plan.tile):
        given = page_size, plan.splits, when
        return chain_teams(q, k_cache, v_cache, pages, lengths, out, *given, scale=scale)
    taken = min(plan.rows // group, plan.tile)
    per = cdiv(min(nodes, plan.tile), taken)
    tiles = 1 + cdiv(nodes - 1, plan.tile)  # of positions: the first row may stand anywhere in its own
    blocks = packed.blocks(plan.tile, taken) if packed else None
    grid = (tiles * per * kv_heads, batch) if blocks is None else (len(blocks) * kv_heads, 1)
    k_new, v_new = fresh or (k_cache, v_cache)
    whole, rest = head_blocks(dim)
    chain_kernel[grid](
        q, k_cache, v_cache, pages, lengths, lengths if first is None else first, packed.ends if packed else lengths,
        packed.counts if packed else lengths, pages if blocks is None else blocks, k_new, v_new,
        out if sink is None else sink, out,
        *q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], pages.stride(0), wrap, nodes, per,
        scale * LOG2E.value, GROUP=group, KV_HEADS=kv_heads, DK=dim, DV=v_dim, D0=whole, D1=rest,
        DV_PAD=max(16, next_power_of_2(v_dim)), PAGE=page_size, WINDOW=window, TILE=plan.tile, SPLITS=plan.splits,
        ROWS=plan.rows, TAKEN=taken, DEPTH=plan.depth, FIRST=first is not None, SINK=sink is not None,
        PACKED=packed is not None, FRESH=fresh is not None, PDL=when, launch_pdl=when > 0, num_warps=plan.warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
