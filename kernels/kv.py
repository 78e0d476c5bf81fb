"""Triton kernels for the rows of the caches: where they lie, and moving the accepted ones.

Cache slot t of request b lies in storage row pages[b, (t // page_size) % wrap] * page_size + t % page_size. A paged
cache never wraps (wrap >= its pages); a ring wraps after `wrap` pages. Small int tensors must be contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.arrival import check_contiguous
from mtp_engine.kernels.launch import pdl

_ELEMENTS = 8192  # of a cache that one program of `move_kept` holds in registers


@triton.jit
def _storage_row(pages, slot, PAGE: tl.constexpr, wrap, mask):
    """pages: pointer to the request's row of the table; slot: int64."""
    return tl.load(pages + (slot // PAGE) % wrap, mask=mask, other=0).to(tl.int64) * PAGE + slot % PAGE


@triton.jit
def _line(pages, requests, b, P):
    """Pointer to request b's row of the page table: row requests[b], or b."""
    if requests is not None:
        b = tl.load(requests + b)
    return pages + b * P


@triton.jit
def _storage_rows_kernel(
    pages, requests, lengths, rows, N, P, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(lengths + b) + i
    row = _storage_row(_line(pages, requests, b, P), slot, PAGE, P, i < N)
    tl.store(rows + b * N + i, row, mask=i < N)


@triton.jit
def _copy(storage, source, target, mask, column, width, stride):
    """storage: pointer to a layer, rows of `width` elements `stride` apart. source, target, mask: [M]; column: [C]."""
    moved = mask[:, None] & (column < width)[None, :]
    values = tl.load(storage + source[:, None] * stride + column[None, :], mask=moved)
    tl.debug_barrier()  # a row may be one thread's source and another's target: read all before writing any
    tl.store(storage + target[:, None] * stride + column[None, :], values, mask=moved)


@triton.jit
def _move_kernel(
    k, v, pages, requests, lengths, path, counts,
    k_width, v_width, k_layer, v_layer, k_row, v_row, k_chunks, length_stride, M, P, wrap,
    PAGE: tl.constexpr, MP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (columns of k or of v, request, layer) moves all its rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, b, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, MP)
    line = _line(pages, requests, b, P)
    node = tl.load(path + b * M + i, mask=i < M, other=0)
    moved = (i < M) & (i < tl.load(counts + b)) & (node != i)
    length = tl.load(lengths + b * length_stride)
    origin = _storage_row(line, length + node, PAGE, wrap, moved)
    goal = _storage_row(line, length + i, PAGE, wrap, moved)
    if chunk < k_chunks:
        _copy(k + layer * k_layer, origin, goal, moved, chunk * CHUNK + tl.arange(0, CHUNK), k_width, k_row)
    else:
        column = (chunk - k_chunks) * CHUNK + tl.arange(0, CHUNK)
        _copy(v + layer * v_layer, origin, goal, moved, column, v_width, v_row)


def storage_rows(pages: Tensor, lengths: Tensor, count: int, page_size: int, *, requests: Tensor) -> Tensor:
    """Storage rows [B, count] int64 of cache slots lengths[b], lengths[b] + 1, ...; one launch.

    pages: [S, P] int32, of which request b's is row requests[b]; they wrap after P; lengths, requests: [B] int64.
    """
    batch = len(lengths)
    check_contiguous(pages)
    rows = torch.empty(batch, count, dtype=torch.int64, device=lengths.device)
    block = min(1024, triton.next_power_of_2(count))
    _storage_rows_kernel[(-(-count // block), batch)](
        pages, requests, lengths, rows, count, pages.shape[1], PAGE=page_size, BLOCK=block, PDL=pdl(),
        launch_pdl=pdl(), num_warps=1 if block <= 128 else 4,
    )  # fmt: skip
    return rows


@triton.jit
def _store_kernel(
    k_new, v_new, k, v, rows, k_width, v_width, k_row, v_row, KP: tl.constexpr, VP: tl.constexpr, PDL: tl.constexpr
):
    """Program (row, k or v)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    if row < 0:
        return
    c, d = tl.arange(0, KP), tl.arange(0, VP)
    if tl.program_id(1) == 0:
        tl.store(k + row * k_row + c, tl.load(k_new + i * k_width + c, mask=c < k_width), mask=c < k_width)
    else:
        tl.store(v + row * v_row + d, tl.load(v_new + i * v_width + d, mask=d < v_width), mask=d < v_width)


def store_rows(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Put rows [N, H, Dk] and [N, H, Dv] into the storage rows `rows` [N] int64 of k [R, H, Dk] and v [R, H, Dv]; those whose
    storage row is -1 nowhere. One launch."""
    k_new, v_new, k, v = (x.flatten(1) for x in (k_new, v_new, k, v))
    check_contiguous(k_new, v_new, rows)
    assert k.stride(1) == v.stride(1) == 1
    k_width, v_width = k_new.shape[1], v_new.shape[1]
    _store_kernel[(len(rows), 2)](
        k_new, v_new, k, v, rows, k_width, v_width, k.stride(0), v.stride(0), KP=triton.next_power_of_2(k_width),
        VP=triton.next_power_of_2(v_width), PDL=pdl(), launch_pdl=pdl(),
    )  # fmt: skip


def move_kept(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    path: Tensor,
    counts: Tensor,
    page_size: int,
    wrap: int,
    *,
    requests: Tensor | None = None,
) -> None:
    """Move cache slot lengths[b] + path[b, i] to lengths[b] + i for i < counts[b], as if all were read before any is
    written; one launch. Rows that stay are not touched.

    k: [L, R, H, Dk]; v: [L, R, H, Dv], a row's elements contiguous; pages, requests: as for `storage_rows`, with
    requests None if b's is row b; no two requests share pages. lengths: [B] int64 of any stride, as they were before
    the step (so the root's positions will do); path: [B, D+1], D < 64, counts: [B] int64, the accepted nodes. Chains
    and single roots never move: their launch can be left out.
    """
    batch, moves = path.shape
    k, v = k.flatten(2), v.flatten(2)
    check_contiguous(path, pages)
    assert moves <= 64
    assert k.stride(2) == v.stride(2) == 1
    padded = triton.next_power_of_2(moves)
    chunk = min(triton.next_power_of_2(max(k.shape[2], v.shape[2])), _ELEMENTS // padded)
    k_chunks, v_chunks = (-(-x.shape[2] // chunk) for x in (k, v))
    _move_kernel[(k_chunks + v_chunks, batch, len(k))](
        k, v, pages, requests, lengths, path, counts, k.shape[2], v.shape[2], k.stride(0), v.stride(0), k.stride(1),
        v.stride(1), k_chunks, lengths.stride(0), moves, pages.shape[1], wrap, PAGE=page_size, MP=padded, CHUNK=chunk,
        PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
