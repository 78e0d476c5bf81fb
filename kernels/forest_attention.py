"""Attention of trees in steps of many requests, with the bits of kernels/tree_attention.py, whose docstring says which keys
are added up in what order.

Far keys, and near ones in tiles of positions that end before the committed length, are the same for all nodes of a request:
a program reads them once for up to 64 or 128 (node, head) rows, run after run, as in kernels/chain_attention.py. The rest of
a near run, a tile or two with a node's own ancestors, is added by a small program per node. Between the two go one merged
far state and an unfinished near run per row, where tree_attention writes a run for every split.
"""

import torch
from torch import Tensor

from mtp_engine.kernels.ancestry import MAX_NODES
from mtp_engine.kernels.chain_attention import PROGRAMS, chain_plan
from mtp_engine.kernels.forest_attention_kernels import own_kernel, shared_kernel
from mtp_engine.kernels.launch import cdiv, next_power_of_2, overlap
from mtp_engine.kernels.tree_attention import Plan, Scratch, head_blocks
from mtp_engine.kernels.tree_attention_kernels import LOG2E


def suits_forest(batch: int, nodes: int, kv_heads: int, bound: int) -> bool:
    """Whether `forest_attention` is the faster one for trees of so many nodes, of requests of at most `bound` tokens."""
    programs = batch * kv_heads
    return programs >= PROGRAMS or (programs >= 64 and nodes >= 8 and bound <= 2048)


def forest_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, scale: float, sink: Tensor | None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """`tree_attention` for batches whose requests fill the GPU with a program per key head. Arguments as there."""
    batch, nodes, heads, dim = q.shape
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or chain_plan(q.dtype, nodes, heads, kv_heads, dim, batch)
    assert nodes <= MAX_NODES <= plan.tile, "more rows, or smaller tiles, and far keys would differ between rows"
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages, positions)), "last dimension"
    assert all(x.is_contiguous() for x in (paths, lengths, first)), "paths come from ancestry()"
    out = torch.empty(batch, nodes, heads, v_dim, dtype=q.dtype, device=q.device)
    scratch = Scratch.empty(batch * nodes * heads, 2, v_dim, q.device)
    taken = plan.rows // group
    blocks, tiles = cdiv(nodes, taken), 1 if nodes == 1 else 2
    (whole, rest), when = head_blocks(dim), overlap(batch * nodes)
    strides = (*q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], positions.stride(0), pages.stride(0))
    shared = {
        "GROUP": group, "KV_HEADS": kv_heads, "DK": dim, "DV": v_dim, "D0": whole, "D1": rest, "PAGE": page_size,
        "DV_PAD": max(16, next_power_of_2(v_dim)), "WINDOW": window, "TILE": plan.tile,
        "PDL": when, "launch_pdl": when > 0, "enable_fp_fusion": False,
    }  # fmt: skip
    shared_kernel[(tiles * blocks * kv_heads, batch)](
        q, k_cache, v_cache, pages, lengths, positions, first, scratch.acc, scratch.stats, *strides, wrap, nodes, blocks,
        scale * LOG2E.value, SPLITS=plan.splits, ROWS=plan.rows, TAKEN=taken, DEPTH=plan.depth, num_warps=plan.warps,
        **shared,
    )  # fmt: skip
    rows, warps = (16, 1) if group <= 16 and q.dtype != torch.float32 else (plan.rows, plan.warps)  # a warp has 16 rows
    own_kernel[(nodes * kv_heads, batch)](
        q, k_cache, v_cache, pages, lengths, positions, paths, first, out if sink is None else sink, out, scratch.acc,
        scratch.stats, *strides, wrap, nodes, scale * LOG2E.value, ROWS=rows, SINK=sink is not None, num_warps=warps,
        **shared,
    )  # fmt: skip
    return out
