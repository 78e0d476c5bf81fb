"""What a step moves between its parts: rows of draft levels, hidden states, and the state of each slot. Launches count
here more than bytes, so each function is one.

Twins: drafters.portable.TorchDraftOps, runtime.slots.SlotState without kernels, and tree.DraftTree.forced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous
from mtp_engine.kernels.launch import pdl


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _level_rows(
    counts, start, first, parents, depths, out, B, R, Q, stride, shift, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _wait(PDL)
    b, i = tl.program_id(0), tl.arange(0, BLOCK)
    node, rows = i - R + 1, R + Q
    drafted, inside = (i >= R) & (i < rows), i < rows
    parent = tl.load(parents + b * stride + node, mask=drafted, other=0)
    depth = tl.load(depths + b * stride + node, mask=drafted, other=0)
    count, origin = tl.load(counts + b), tl.load(start + b)
    real = tl.where(R > 0, count, 0)  # new rows that stand in this call
    up = tl.where(drafted, tl.where(parent == 0, real - 1, R + parent - 1), tl.where(i < count, i - 1, -1))
    offset = tl.where(drafted, count - 1 + depth, i)
    here, plane = out + b * rows + i, B * rows
    tl.store(here, origin + offset, mask=inside)
    tl.store(here + plane, up.to(tl.int64), mask=inside)
    tl.store(here + 2 * plane, offset, mask=inside)
    tl.store(here + 3 * plane, origin + offset - 1 - shift, mask=inside)
    tl.store(out + 4 * plane + b, tl.load(first + b) + shift)


def level_rows(
    counts: Tensor, start: Tensor, first: Tensor, new: int, parents: Tensor, depths: Tensor, nodes: int, shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows of a draft level, R new ones and tree nodes 1..Q: positions, parents, offsets (position - start), rotary
    positions (position - 1 - shift), each [B, R + Q] int64, and first + shift, [B].

    counts, start, first: [B] int64, real new rows, position of the first, and the request's first row at level 0;
    new: R; parents, depths: [B, >= Q + 1] int64; nodes: Q. The root, at position start + counts - 1, is the last real
    new row. A row's parent is the row it sees next to itself, -1 where there is none: for new row i < counts i - 1, for
    the others none, for a node its parent in the tree, where the root is row counts - 1 if there are new rows.
    """
    batch, rows = len(counts), new + nodes
    out = torch.empty(4 * batch * rows + batch, dtype=torch.int64, device=counts.device)
    assert parents.stride() == depths.stride()
    assert parents.stride(1) == 1
    _level_rows[(batch,)](
        counts, start, first, parents, depths, out, batch, new, nodes, parents.stride(0), shift,
        BLOCK=triton.next_power_of_2(rows), PDL=pdl(), launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
    positions, above, offsets, rotary = out[: 4 * batch * rows].view(4, batch, rows).unbind(0)
    return positions, above, offsets, rotary, out[4 * batch * rows :]


@triton.jit
def _level_inputs(
    embedding, tokens, drafted, hidden, above, carry, slots, counts, embedded, joined,
    R, rows, before, drafted_stride, H, BLOCK: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, request, piece of H)."""
    _wait(PDL)
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = h < H
    if r < R:
        token = tl.load(tokens + b * R + r)
    else:
        token = tl.load(drafted + b * drafted_stride + r - R + 1)
    here = (b * rows + r) * H + h
    tl.store(embedded + here, tl.load(embedding + token * H + h, mask=inside), mask=inside)
    if not FIRST:
        up = tl.load(above + b * rows + r)
        mine = carry + tl.load(slots + b) * H
        source = tl.where(up >= 0, hidden + (b * before + up) * H, mine)
        tl.store(joined + here, tl.load(source + h, mask=inside), mask=inside)
        if r == 0:
            last = tl.maximum(tl.load(counts + b) - 1, 0)
            tl.debug_barrier()
            tl.store(mine + h, tl.load(hidden + (b * before + last) * H + h, mask=inside), mask=inside)


def level_inputs(
    embedding: Tensor, tokens: Tensor, drafted: Tensor, nodes: int, hidden: Tensor, *,
    above: Tensor | None = None, carry: Tensor | None = None, slots: Tensor | None = None, counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Embeddings and hidden states, [B, R + Q, H] each, of a level's rows: R new tokens, then tree nodes 1..Q.

    embedding: [V, H]; tokens: [B, R]; drafted: [B, >= Q + 1], nodes' tokens. At the first level hidden [B, R, H] is what
    is returned. Below, hidden [B, R + Q', H] are the states of the level above: a row gets its parent's (above, [B, R + Q]),
    and one without parent carry[slots[b]], which then becomes the state of the last real new row.
    """
    batch, new = tokens.shape
    rows, width = new + nodes, embedding.shape[1]
    check_contiguous(tokens, hidden, embedding)
    embedded = torch.empty(batch, rows, width, dtype=embedding.dtype, device=embedding.device)
    joined = hidden if above is None else torch.empty_like(embedded)
    block = min(1024, triton.next_power_of_2(width))
    _level_inputs[(rows, batch, -(-width // block))](
        embedding, tokens, drafted, hidden, above, carry, slots, counts, embedded, joined, new, rows, hidden.shape[1],
        drafted.stride(0), width, BLOCK=block, FIRST=above is None, PDL=pdl(), launch_pdl=pdl(),
        num_warps=2 if block <= 512 else 4,
    )  # fmt: skip
    return embedded, joined


@triton.jit
def _pick(values, counts, out, rows, H, BLOCK: tl.constexpr, PDL: tl.constexpr):
    _wait(PDL)
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(tl.load(counts + b) - 1, 0)
    tl.store(out + b * H + h, tl.load(values + (b * rows + row) * H + h, mask=h < H), mask=h < H)


def last_rows(values: Tensor, counts: Tensor) -> Tensor:
    """values: [B, R, H]; counts: [B] int64 -> [B, 1, H], row counts - 1 of each (row 0 where there is none)."""
    batch, rows, width = values.shape
    check_contiguous(values)
    out = torch.empty(batch, 1, width, dtype=values.dtype, device=values.device)
    block = min(1024, triton.next_power_of_2(width))
    _pick[(batch, -(-width // block))](
        values, counts, out, rows, width, BLOCK=block, PDL=pdl(), launch_pdl=pdl(), num_warps=2
    )
    return out


@triton.jit
def _observe(
    slots, lengths, path, tokens, counts, hidden, tokens_table, hidden_table, counts_table, recent, behind, D, rows, ring,
    nodes, H, scratch, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kept node, request, piece of H)."""
    _wait(PDL)
    d, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    slot, node = tl.load(slots + b), tl.load(path + b * D + d)
    stay = b * 0
    if behind is not None:
        stay = tl.where(slot < scratch, tl.load(behind + b), 0)
    at = tl.minimum(stay + d, rows - 1)
    value = tl.load(hidden + (b * nodes + node) * H + h, mask=h < H)
    tl.store(hidden_table + (slot * rows + at) * H + h, value, mask=h < H)
    turned = (tl.load(lengths + b) + d) % ring
    tl.store(recent + (slot * ring + turned) * H + h, value, mask=h < H)
    if tl.program_id(2) == 0:
        tl.store(tokens_table + slot * rows + at, tl.load(tokens + b * D + d))
        if d == 0:
            tl.store(counts_table + slot, tl.minimum(stay + tl.load(counts + b), rows))


def observe(
    slots: Tensor, lengths: Tensor, path: Tensor, tokens: Tensor, counts: Tensor, hidden: Tensor,
    tokens_table: Tensor, hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
) -> None:  # fmt: skip
    """Row d of slot slots[b] becomes tokens[b, d] and hidden[b, path[b, d]], its count counts[b]; row (lengths[b] + d) % R
    of the ring `recent` becomes that state, too. behind: [B] int64, of all but the last slot so many rows stay, and the new
    ones go behind them, as many as there is room for.

    slots, lengths, counts: [B] int64; path, tokens: [B, D] int64; hidden: [B, N, H]; tables: [S, >= D], [S, >= D, H] and
    [S]; recent: [S, R, H], R >= D.
    """
    batch, depth = path.shape
    check_contiguous(path, tokens, hidden, tokens_table, hidden_table, recent)
    width = hidden.shape[2]
    block = min(1024, triton.next_power_of_2(width))
    _observe[(depth, batch, -(-width // block))](
        slots, lengths, path, tokens, counts, hidden, tokens_table, hidden_table, counts_table, recent, behind, depth,
        tokens_table.shape[1], recent.shape[1], hidden.shape[1], width, len(counts_table) - 1, BLOCK=block, PDL=pdl(),
        launch_pdl=pdl(), num_warps=2,
    )  # fmt: skip


@triton.jit
def _advance(
    slots, lengths, tokens, counts, size, depths, state_lengths, state_tokens, table, scratch, D, N,
    DP: tl.constexpr, NP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _wait(PDL)
    b, d, n = tl.program_id(0), tl.arange(0, DP), tl.arange(0, NP)
    slot, count, nodes = tl.load(slots + b), tl.load(counts + b), tl.load(size + b)
    depth = tl.max(tl.load(depths + b * N + n, mask=n < nodes, other=0), 0)
    emitted = tl.load(tokens + b * D + d, mask=d < D, other=0)
    if slot != scratch:
        tl.store(state_lengths + slot, tl.load(lengths + b) + count)
        tl.store(state_tokens + slot, tl.sum(tl.where(d == count - 1, emitted, 0), 0))
    row = table + b * (D + 3)
    tl.store(row, count)
    tl.store(row + 1, nodes)
    tl.store(row + 2, depth)
    tl.store(row + 3 + d, emitted, mask=d < D)


def advance(
    slots: Tensor, lengths: Tensor, tokens: Tensor, counts: Tensor, size: Tensor, depths: Tensor,
    state_lengths: Tensor, state_tokens: Tensor,
) -> Tensor:  # fmt: skip
    """Move the slots' state on, but for the last slot's, and give the step's table, [B, 3 + D] int64: count, nodes and
    depth of the tree, tokens.

    slots, lengths, counts, size: [B]; tokens: [B, D]; depths: [B, N] int64; state_lengths, state_tokens: [S].
    """
    batch, depth = tokens.shape
    check_contiguous(tokens, depths)
    table = torch.empty(batch, 3 + depth, dtype=torch.int64, device=tokens.device)
    _advance[(batch,)](
        slots, lengths, tokens, counts, size, depths, state_lengths, state_tokens, table, len(state_lengths) - 1, depth,
        depths.shape[1], DP=triton.next_power_of_2(depth), NP=triton.next_power_of_2(depths.shape[1]), PDL=pdl(),
        launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
    return table


@triton.jit
def _force(tokens, parents, depths, size, chains, out, B, N, K, stride, deepest, NP: tl.constexpr, PDL: tl.constexpr):
    _wait(PDL)
    b, n = tl.program_id(0), tl.arange(0, NP)
    inside, here, there, count = n < N, b * stride + n, out + b * N + n, tl.load(chains + b * (K + 1))
    on, plane = count > 0, B * N
    token, parent = tl.load(tokens + here, mask=inside, other=0), tl.load(parents + here, mask=inside, other=0)
    chained = inside & on & (n > 0) & (n <= count)
    token = tl.where(chained, tl.load(chains + b * (K + 1) + n, mask=chained, other=0), token)
    tl.store(there, token, mask=inside)
    tl.store(there + plane, tl.where(on, (n - 1).to(tl.int64), parent), mask=inside)
    depth = tl.load(depths + here, mask=inside, other=0)
    tl.store(there + 2 * plane, tl.where(on, tl.minimum(n, deepest).to(tl.int64), depth), mask=inside)
    tl.store(out + 3 * plane + b, tl.where(on, count + 1, tl.load(size + b)))


def force(
    tokens: Tensor, parents: Tensor, depths: Tensor, size: Tensor, chains: Tensor, deepest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents and depths [B, N] and sizes [B] of trees with a chain in place of some; see DraftTree.forced.

    chains: [B, 1 + K] int64; deepest: the trees' max_depth.
    """
    batch, nodes = tokens.shape
    assert tokens.stride() == parents.stride() == depths.stride()
    assert tokens.stride(1) == 1
    check_contiguous(size, chains)
    out = torch.empty(3 * batch * nodes + batch, dtype=torch.int64, device=tokens.device)
    _force[(batch,)](
        tokens, parents, depths, size, chains, out, batch, nodes, chains.shape[1] - 1, tokens.stride(0), deepest,
        NP=triton.next_power_of_2(nodes), PDL=pdl(), launch_pdl=pdl(), num_warps=1,
    )  # fmt: skip
    table = out[: 3 * batch * nodes].view(3, batch, nodes)
    return table[0], table[1], table[2], out[3 * batch * nodes :]
