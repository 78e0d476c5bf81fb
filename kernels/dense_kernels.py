"""The Triton kernels of kernels/dense.py: y = f(rmsnorm(x) W^T).

For few tokens the norm is part of the product (kernels/dense_products.py says how sums are ordered). For many, and for more
than 16 with FP8 weights, x * norm and 1 / rms(x) are made by kernels before it (RMS). Slices of K may have CTAs of their own
(`slice_kernel`), which `add_kernel` adds up.
"""

import triton
import triton.language as tl

from mtp_engine.kernels.dense_products import (
    _add_squares,
    _begin,
    _box_product,
    _inverse_rms,
    _ones_of_bytes,
    _product,
)


@triton.jit(do_not_specialize=["M"])
def scale_kernel(
    x, x_stride, norm, y, M, K: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y = x * norm, rounded, as `_sliced_product` has it. A program takes COLUMNS columns of BM tokens."""
    token, column = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :],
    )
    keep = (token < M)[:, None] & (column < K)
    factor = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values = tl.load(x + token.to(tl.int64)[:, None] * x_stride + column, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64)[:, None] * K + column, (values * factor).to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M"])
def rms_kernel(
    x, x_stride, eps, rms, byte, M, K: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """1 / rms(x) in fp32, as `_sliced_product` has it. byte: any, where the weight is FP8; the next kernel starts once
    `scale_kernel`, which is before this one, has ended, and waits for this one when its sums are done."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    k = (tl.arange(0, WARPS) * DEPTH)[:, None, None] + tl.arange(0, DEPTH)[None, None, :]
    x_at = x + token.to(tl.int64)[None, :, None] * x_stride + k
    squares = tl.zeros([WARPS, 16, BM], tl.float32)
    ones = tl.full([WARPS, 16, DEPTH], 1.0, tl.float32).to(x.dtype.element_ty)
    if byte is not None:
        ones = _ones_of_bytes(byte, ones)
    for start in range(0, K, WARPS * DEPTH):
        values = tl.load(x_at + start, mask=(token < M)[None, :, None] & (k < K - start), other=0.0)
        squares = _add_squares(ones, values.to(tl.float32), squares)
    tl.store(rms + token, _inverse_rms(squares, eps, K, WARPS, BM), mask=token < M)


@triton.jit(do_not_specialize=["M"])
def slice_kernel(
    x, weight, sums, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """One slice of K of `_box_product`, the third number of the program: sums [SLICES, M, N] fp32. RMS: see `_begin`'s WAIT."""
    STEP: tl.constexpr = min(DEPTH, 64)
    PARTS: tl.constexpr = DEPTH // STEP
    if PDL and not RMS:
        tl.extra.cuda.gdc_wait()
    first, start, s = tl.program_id(0) * BM, tl.program_id(1) * ROWS, tl.program_id(2)
    acc = tl.zeros([ROWS, BM], tl.float32)
    for i in range((K + SLICES * DEPTH - 1) // (SLICES * DEPTH) * PARTS):  # beyond K there are zeros
        at = (i // PARTS * SLICES + s) * DEPTH + i % PARTS * STEP
        acc = tl.dot(weight.load([start, at]), tl.trans(x.load([first, at])), acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if RMS:
            tl.extra.cuda.gdc_wait()
    token = (first + tl.arange(0, BM)).to(tl.int64)[None, :]
    n = start + tl.arange(0, ROWS)[:, None]
    tl.store(sums + (s * M + token) * N + n, acc, mask=(token < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def add_kernel(
    sums, rms, bias, residual, residual_stride, out, M, N: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The slices of `slice_kernel` added up, the first one first, and what `linear_kernel` does then. A program takes COLUMNS
    columns of a token."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros([COLUMNS], tl.float32)
    for s in tl.static_range(SLICES):
        y += tl.load(sums + (s * M + token) * N + n, mask=n < N, other=0.0)
    if rms is not None:
        y = y * tl.load(rms + token)
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + token * residual_stride + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "ahead"])
def linear_kernel(
    x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, M, ahead,
    bias, residual, residual_stride, out, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1) * ROWS
    row = tl.minimum(start + tl.arange(0, ROWS), N - 1).to(tl.int64)
    _begin(weight, w_stride, row, ahead, ROWS, PIECES, PDL, not RMS)
    first = tl.program_id(0) * BM
    token = (first + tl.arange(0, BM)).to(tl.int64)[None, :]
    if BOXES:
        y, _ = _box_product(x, norm, weight, start, start, first, M, K, ROWS, BM, DEPTH, WARPS, False, PDL)
        n = start + tl.arange(0, ROWS)[:, None]
        keep = (token < M) & (n < N)
        if bias is not None:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if residual is not None:
            y += tl.load(residual + token * residual_stride + n, mask=keep, other=0.0).to(tl.float32)
        tl.store(out + token * N + n, y.to(out.dtype.element_ty), mask=keep)
    else:
        n = start + tl.arange(0, ROWS // 2)[:, None]
        n2 = n + ROWS // 2
        keep, keep2 = (token < M) & (n < N), (token < M) & (n2 < N)
        if residual is not None and not WIDE:  # else registers are dearer than time
            base_a = tl.load(residual + token * residual_stride + n, mask=keep, other=0.0).to(tl.float32)
            base_b = tl.load(residual + token * residual_stride + n2, mask=keep2, other=0.0).to(tl.float32)
        if bias is not None:
            bias_a = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            bias_b = tl.load(bias + n2, mask=n2 < N, other=0.0).to(tl.float32)
        a, b = _product(
            x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
            K, ROWS, BM, DEPTH, WARPS, BLOCK, WIDE, PDL, RMS,
        )  # fmt: skip
        if bias is not None:
            a, b = a + bias_a, b + bias_b
        if residual is not None and WIDE:
            base_a = tl.load(residual + token * residual_stride + n, mask=keep, other=0.0).to(tl.float32)
            base_b = tl.load(residual + token * residual_stride + n2, mask=keep2, other=0.0).to(tl.float32)
        if residual is not None:
            a, b = a + base_a, b + base_b
        tl.store(out + token * N + n, a.to(out.dtype.element_ty), mask=keep)
        tl.store(out + token * N + n2, b.to(out.dtype.element_ty), mask=keep2)


@triton.jit(do_not_specialize=["M", "ahead"])
def gated_kernel(
    x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, M, ahead,
    out, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    """N: columns of `out`, half the rows of the weight."""
    P: tl.constexpr = ROWS // 2
    r = tl.arange(0, ROWS)
    row = (tl.minimum(tl.program_id(1) * P + r % P, N - 1) + r // P * N).to(tl.int64)
    _begin(weight, w_stride, row, ahead, ROWS, PIECES, PDL, not RMS)
    first = tl.program_id(0) * BM
    if BOXES:
        n = tl.program_id(1) * P
        gate, up = _box_product(x, norm, weight, n, N + n, first, M, K, P, BM, DEPTH, WARPS, True, PDL)
    else:
        gate, up = _product(
            x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
            K, ROWS, BM, DEPTH, WARPS, BLOCK, WIDE, PDL, RMS,
        )  # fmt: skip
    token = (first + tl.arange(0, BM)).to(tl.int64)[None, :]
    n = tl.program_id(1) * P + tl.arange(0, P)[:, None]
    tl.store(out + token * N + n, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=(token < M) & (n < N))


@triton.jit
def _dimension(p, half, dim, rotary):
    """Dimension `half` (0 or 1) of pair p of a head of `dim`. The pairs below rotary / 2 are those that turn together."""
    return tl.where(p < rotary // 2, p + half * (rotary // 2), p + tl.where(half == 0, rotary // 2, dim // 2))


@triton.jit
def _unit(
    unit, P: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """Program `unit`'s head (counted within its kind where it is one of values), part of it, dimension, how many of these
    rotate, and the head's first row of the weight."""
    PARTS: tl.constexpr = (QK_DIM // 2 + P - 1) // P  # programs per head
    V_PARTS: tl.constexpr = (V_DIM // 2 + P - 1) // P
    rest = unit - (HEADS + KV_HEADS) * PARTS
    values = rest >= 0
    head = tl.where(values, rest // V_PARTS, unit // PARTS)
    part = tl.where(values, rest % V_PARTS, unit % PARTS)
    base = tl.where(values, (HEADS + KV_HEADS) * QK_DIM + head * V_DIM, head * QK_DIM)
    return values, head, part, tl.where(values, V_DIM, QK_DIM), tl.where(values, 0, ROTARY), base


@triton.jit
def _angles(cos, sin, line, i, turns):
    """Cosine, and sine as dimension i takes it: its partner's is the same with the other sign."""
    return tl.load(cos + line + i, mask=turns, other=1.0), tl.load(sin + line + i, mask=turns, other=0.0)


@triton.jit
def _place(
    a, b, angles, i, j, keep, token, slot, values, head, value_scale, q, k_cache, k_row, k_head, v_cache, v_row, v_head,
    HEADS: tl.constexpr, QK_DIM: tl.constexpr,
):  # fmt: skip
    """Rotates pairs of a head's products, dimensions i and j, and stores them where they belong."""
    kind: tl.constexpr = q.dtype.element_ty
    a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)  # as where the product is a tensor of its own
    cos, sin = angles
    a, b = tl.fma(a, cos, b * sin), tl.fma(b, cos, a * -sin)
    if values:
        line = v_cache + slot * v_row + head * v_head
        a, b = a * value_scale, b * value_scale
    elif head < HEADS:
        line = q + token * (HEADS * QK_DIM) + head * QK_DIM
    else:
        line = k_cache + slot * k_row + (head - HEADS) * k_head
    tl.store(line + i, a.to(kind), mask=keep)
    tl.store(line + j, b.to(kind), mask=keep)


@triton.jit(do_not_specialize=["M", "ahead"])
def qkv_kernel(
    x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, M, ahead,
    bias, cos, sin, value_scale, q, k_cache, k_row, k_head, v_cache, v_row, v_head, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    """A CTA's rows are pairs of dimensions of one head, as `_dimension` pairs them. k_row .. v_head: strides of the caches."""
    P: tl.constexpr = ROWS // 2
    values, head, part, dim, rotary, base = _unit(tl.program_id(1), P, HEADS, KV_HEADS, QK_DIM, V_DIM, ROTARY)
    r = tl.arange(0, ROWS)
    row = (base + _dimension(tl.minimum(part * P + r % P, dim // 2 - 1), r // P, dim, rotary)).to(tl.int64)
    _begin(weight, w_stride, row, ahead, ROWS, PIECES, PDL, not RMS)
    first = tl.program_id(0) * BM
    token = (first + tl.arange(0, BM)).to(tl.int64)[None, :]
    p = part * P + tl.arange(0, P)[:, None]
    i, j = _dimension(p, 0, dim, rotary), _dimension(p, 1, dim, rotary)
    keep = (token < M) & (p < dim // 2)
    turns = keep & (p < rotary // 2)
    if not WIDE:
        angles = _angles(cos, sin, token * ROTARY, i, turns)
    slot = tl.load(slots + token, mask=token < M, other=0)
    if bias is not None:
        bias_a = tl.load(bias + base + i, mask=p < dim // 2, other=0.0).to(tl.float32)
        bias_b = tl.load(bias + base + j, mask=p < dim // 2, other=0.0).to(tl.float32)
    a, b = _product(
        x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
        K, ROWS, BM, DEPTH, WARPS, BLOCK, WIDE, PDL, RMS,
    )  # fmt: skip
    if bias is not None:
        a, b = a + bias_a, b + bias_b
    if WIDE:
        angles = _angles(cos, sin, token * ROTARY, i, turns)
    _place(
        a, b, angles, i, j, keep, token, slot, values, head, value_scale, q, k_cache, k_row, k_head, v_cache, v_row,
        v_head, HEADS, QK_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def place_kernel(
    y, cos, sin, value_scale, q, k_cache, k_row, k_head, v_cache, v_row, v_head, slots, M,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr,
    WIDTH: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The end of `qkv_kernel` for products y [M, WIDTH] that are a tensor of their own. P: 2^n, half a head or more."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values, head, _, dim, rotary, base = _unit(tl.program_id(1), P, HEADS, KV_HEADS, QK_DIM, V_DIM, ROTARY)
    token = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[None, :]
    p = tl.arange(0, P)[:, None]
    i, j = _dimension(p, 0, dim, rotary), _dimension(p, 1, dim, rotary)
    keep = (token < M) & (p < dim // 2)
    angles = _angles(cos, sin, token * ROTARY, i, keep & (p < rotary // 2))
    slot = tl.load(slots + token, mask=token < M, other=0)
    a = tl.load(y + token * WIDTH + base + i, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(y + token * WIDTH + base + j, mask=keep, other=0.0).to(tl.float32)
    _place(
        a, b, angles, i, j, keep, token, slot, values, head, value_scale, q, k_cache, k_row, k_head, v_cache, v_row,
        v_head, HEADS, QK_DIM,
    )  # fmt: skip
