"""Attention of chains: prompts, and steps of many requests. The bits of kernels/tree_attention.py, whose docstring says
which keys are added up in what order.

A row's key at a position is the same for all rows of a chain, so one program serves up to 64 or 128 (node, head) rows: it
reads the request's keys once, run after run, and merges the runs as it goes. Nothing goes through memory in between.
There is one program per key head and tile of positions: where these are too few to fill the GPU, tree_attention's many
programs are faster.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from mtp_engine.kernels.ancestry import MAX_NODES
from mtp_engine.kernels.chain_attention_kernels import chain_kernel, own_kernel, shared_kernel
from mtp_engine.kernels.launch import overlap
from mtp_engine.kernels.tree_attention import Plan, Scratch, head_blocks
from mtp_engine.kernels.tree_attention_kernels import LOG2E

_PROGRAMS = 96  # fewer leave too much of the GPU idle


def suits_chain(batch: int, nodes: int, kv_heads: int) -> bool:
    """Whether `chain_attention` is the faster one for chains of so many nodes, or the only one."""
    return nodes > MAX_NODES or batch * kv_heads >= _PROGRAMS


def chain_plan(dtype: torch.dtype, nodes: int, heads: int, kv_heads: int, dim: int) -> Plan:
    """Tiles and splits are tree_attention's; the rest changes no bit. nodes: rows of a request; dim: of queries."""
    plan = Plan.default(dtype, 1, kv_heads, dim)
    if dtype == torch.float32:
        return plan
    few = nodes * (heads // kv_heads) <= 64
    return replace(plan, rows=64, warps=4, depth=2) if few else replace(plan, rows=128, warps=8, depth=2)


def chain_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, first: Tensor | None, *, page_size: int,
    wrap: int, window: int, scale: float, sink: Tensor | None, plan: Plan | None = None,
    counts: Tensor | None = None, most: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of any number of new rows per request, row i at position lengths[b] + i, above row i + 1; all their keys and
    values are in the cache already.

    Arguments as for `tree_attention`, but first may be None: 0 everywhere. scale must be positive. counts, [B] int64: where
    rows are packed, q is [1, N, Hq, Dk], of whose rows counts[b], at most `most`, are request b's, one request behind the other.
    Returns [B, N, Hq, Dv], or [1, N, Hq, Dv], in q's dtype.
    """
    nodes, heads, dim = q.shape[1:]
    batch, total = len(lengths), nodes
    if counts is not None:
        nodes = most
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or chain_plan(q.dtype, nodes, heads, kv_heads, dim)
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages)), "last dimension"
    out = torch.empty(q.shape[0], total, heads, v_dim, dtype=q.dtype, device=q.device)
    ends = lengths if counts is None else counts.cumsum(0)
    taken = min(plan.rows // group, plan.tile)
    per = triton.cdiv(min(nodes, plan.tile), taken)
    tiles = 1 + triton.cdiv(nodes - 1, plan.tile)  # of positions: the first row may stand anywhere in its own
    whole, rest = head_blocks(dim)
    chain_kernel[(tiles * per * kv_heads, batch)](
        q, k_cache, v_cache, pages, lengths, lengths if first is None else first, ends, counts if counts is not None else ends,
        out if sink is None else sink, out,
        *q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], pages.stride(0), wrap, nodes, per,
        scale * LOG2E.value, GROUP=group, KV_HEADS=kv_heads, DK=dim, DV=v_dim, D0=whole, D1=rest,
        DV_PAD=max(16, triton.next_power_of_2(v_dim)), PAGE=page_size, WINDOW=window, TILE=plan.tile, SPLITS=plan.splits,
        ROWS=plan.rows, TAKEN=taken, DEPTH=plan.depth, FIRST=first is not None, SINK=sink is not None,
        PACKED=counts is not None, PDL=overlap(q.shape[0] * total), launch_pdl=overlap(q.shape[0] * total), num_warps=plan.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def forest_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, scale: float, sink: Tensor | None, plan: Plan | None = None,
    own: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`tree_attention` for batches whose requests fill the GPU with a program per key head. Arguments as there.

    Keys that all nodes of a request see are read once for all of them, run after run as in `chain_attention`; then each node's
    own are added by a program per node. own: rows and warps of these, for measurements.
    """
    batch, nodes, heads, dim = q.shape
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or chain_plan(q.dtype, nodes, heads, kv_heads, dim)
    assert nodes <= MAX_NODES <= plan.tile, "more rows, or smaller tiles, and far keys would differ between rows"
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages, positions)), "last dimension"
    assert all(x.is_contiguous() for x in (paths, lengths, first)), "paths come from ancestry()"
    out = torch.empty(batch, nodes, heads, v_dim, dtype=q.dtype, device=q.device)
    scratch = Scratch.empty(batch * nodes * heads, 2, v_dim, q.device)
    taken = plan.rows // group
    blocks, tiles = triton.cdiv(nodes, taken), 1 if nodes == 1 else 2
    whole, rest = head_blocks(dim)
    strides = (*q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], positions.stride(0), pages.stride(0))
    shared = {
        "GROUP": group, "KV_HEADS": kv_heads, "DK": dim, "DV": v_dim, "D0": whole, "D1": rest, "PAGE": page_size,
        "DV_PAD": max(16, triton.next_power_of_2(v_dim)), "WINDOW": window, "TILE": plan.tile,
        "PDL": overlap(batch * nodes), "launch_pdl": overlap(batch * nodes), "enable_fp_fusion": False,
    }  # fmt: skip
    shared_kernel[(tiles * blocks * kv_heads, batch)](
        q, k_cache, v_cache, pages, lengths, positions, first, scratch.acc, scratch.stats, *strides, wrap, nodes, blocks,
        scale * LOG2E.value, SPLITS=plan.splits, ROWS=plan.rows, TAKEN=taken, DEPTH=plan.depth, num_warps=plan.warps,
        **shared,
    )  # fmt: skip
    rows, warps = own or (min(plan.rows, 64), min(plan.warps, 4) if plan.rows > 16 else plan.warps)
    own_kernel[(nodes * kv_heads, batch)](
        q, k_cache, v_cache, pages, lengths, positions, paths, first, out if sink is None else sink, out, scratch.acc,
        scratch.stats, *strides, wrap, nodes, scale * LOG2E.value, ROWS=rows, SINK=sink is not None, num_warps=warps,
        **shared,
    )  # fmt: skip
    return out
