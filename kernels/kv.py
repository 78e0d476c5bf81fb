"""Triton kernels for the rows of the caches: where they lie, which see which, and moving the accepted ones.

Cache slot t of request b lies in storage row pages[b, (t // page_size) % wrap] * page_size + t % page_size. A paged
cache never wraps (wrap >= its pages); a ring wraps after `wrap` pages. Small int tensors must be contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.launch import pdl

_ELEMENTS = 8192  # of a cache that one program of `move_rows` holds in registers


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
    k, v, source, target, pages, requests, lengths, path, counts,
    k_width, v_width, k_layer, v_layer, k_row, v_row, k_chunks, length_stride, M, P, wrap,
    PAGE: tl.constexpr, MP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (columns of k or of v, request, layer) moves all its rows. Rows come from `path` if there are pages."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, b, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, MP)
    if pages is None:
        origin = tl.load(source + b * M + i, mask=i < M, other=0)
        goal = tl.load(target + b * M + i, mask=i < M, other=0)
        moved = (i < M) & (origin != goal)
    else:
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
    assert pages.is_contiguous()
    rows = torch.empty(batch, count, dtype=torch.int64, device=lengths.device)
    block = min(1024, triton.next_power_of_2(count))
    _storage_rows_kernel[(-(-count // block), batch)](
        pages, requests, lengths, rows, count, pages.shape[1], PAGE=page_size, BLOCK=block, PDL=pdl(),
        launch_pdl=pdl(), num_warps=1 if block <= 128 else 4,
    )  # fmt: skip
    return rows


def move_rows(k: Tensor, v: Tensor, source: Tensor, target: Tensor) -> None:
    """k[:, target] = k[:, source], v[:, target] = v[:, source], as if all were read before any is written; one launch.

    k: [L, R, H, Dk]; v: [L, R, H, Dv], a row's elements contiguous; source, target: [B, M] int64, M <= 64. No request's
    targets may be another's sources or targets (pages and rings are never shared), and a request's own targets must
    differ but where nothing moves. Rows that stay are not touched.
    """
    assert source.is_contiguous()
    assert target.is_contiguous()
    assert source.shape == target.shape
    _launch_move(k, v, source.shape, {"source": source, "target": target})


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
    """Move cache slot lengths[b] + path[b, i] to lengths[b] + i for i < counts[b], as `move_rows` does; one launch.

    pages, requests: as for `storage_rows`; lengths: [B] int64 of any stride, as they were before the step (so the
    root's positions will do); path: [B, D+1], counts: [B] int64, the accepted nodes. Chains and single roots never
    move: their launch can be left out.
    """
    assert path.is_contiguous()
    assert pages.is_contiguous()
    rows = {"pages": pages, "lengths": lengths, "path": path, "counts": counts}
    if requests is not None:
        rows["requests"] = requests
    _launch_move(k, v, path.shape, rows, page_size, wrap)


def _launch_move(
    k: Tensor, v: Tensor, shape: torch.Size, rows: dict[str, Tensor], page_size: int = 1, wrap: int = 1
) -> None:
    """shape: of the moves, [B, M]."""
    batch, moves = shape
    k, v = k.flatten(2), v.flatten(2)
    assert moves <= 64
    assert k.stride(2) == v.stride(2) == 1
    padded = triton.next_power_of_2(moves)
    chunk = min(triton.next_power_of_2(max(k.shape[2], v.shape[2])), _ELEMENTS // padded)
    k_chunks, v_chunks = (-(-x.shape[2] // chunk) for x in (k, v))
    names = ("source", "target", "pages", "requests", "lengths", "path", "counts")
    pages, lengths = rows.get("pages"), rows.get("lengths")
    _move_kernel[(k_chunks + v_chunks, batch, len(k))](
        k, v, *(rows.get(name) for name in names), k.shape[2], v.shape[2], k.stride(0), v.stride(0), k.stride(1),
        v.stride(1), k_chunks, 0 if lengths is None else lengths.stride(0), moves, 0 if pages is None else pages.shape[1],
        wrap, PAGE=page_size, MP=padded, CHUNK=chunk, PDL=pdl(), launch_pdl=pdl(), num_warps=4,
    )  # fmt: skip
