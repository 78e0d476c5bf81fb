"""The Triton kernels of kernels/dense.py: y = f(rmsnorm(x) W^T) for few rows of x.

A CTA takes some rows of W and walks along all of K. Weights are the M operand of the tensor core (`mma.m16n8k16`) and
tokens the N operand, and every warp takes its own slice of each step along K. A token's result is then the same bits
whatever the number of tokens: the order of additions depends on K and on `depth` and `warps` of the tile, which depend
on the weight alone, and the tile being three-dimensional keeps Triton from ever choosing wgmma. The sum of squares of
the RMS norm goes through the tensor core too (a product with ones), so it has the same property.

For many tokens (WIDE) all warps share one slice of K after another, and add the slices up as above. Tiles can then be as
large as arithmetic wants, and are wgmma's where they have 64 rows of W or more: on Hopper it adds 16 products at a time
as mma.m16n8k16 does, and tests on the device hold it to that. The norm is a kernel of its own there, `norm_kernel`. The
largest tiles (BOXES) come through Hopper's copy engine. FP8 weights have no such tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(acc, WARPS: tl.constexpr, P: tl.constexpr, BM: tl.constexpr):
    """Adds the warps' shares, the first one first, and parts the rows: [WARPS, 2P, BM] -> two of [P, BM]."""
    acc = tl.permute(tl.reshape(acc, [WARPS, 2, P, BM]), 2, 3, 1, 0)
    if WARPS == 4:
        even, odd = tl.split(tl.reshape(acc, [P, BM, 2, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        acc = ((first + second) + third) + fourth
    elif WARPS == 2:
        first, second = tl.split(acc)
        acc = first + second
    return tl.split(tl.reshape(acc, [P, BM, 2]))


@triton.jit
def _begin(
    weight, w_stride, row, ahead, ROWS: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr, WAIT: tl.constexpr
):
    """Asks for the first bytes of the weight rows and waits for the previous kernel. PDL: see launch.overlap.

    row: [ROWS] int64; ahead: bytes per piece, a multiple of 16, or 0; PIECES: of a row, 0: ask for nothing; WAIT: or
    `_scaled` waits.
    """
    if PDL:
        if PDL == 1:
            tl.extra.cuda.gdc_launch_dependents()
        if PIECES:  # noqa: SIM102  what Triton compiles
            if ahead > 0:
                address = (weight + row * w_stride).to(tl.int64)[:, None] + tl.arange(0, PIECES)[None, :] * ahead
                size = tl.zeros([ROWS, PIECES], tl.int32) + ahead
                asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;"
                tl.inline_asm_elementwise(asm, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)
        if WAIT:
            tl.extra.cuda.gdc_wait()
        if PDL == 2:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _add_squares(ones, wide, squares):
    """squares + ones times the squares of `wide`, which are bf16 numbers unless `ones` is fp32. [WARPS, 16, BM]"""
    square = wide * wide
    if ones.dtype == tl.float32:
        squares = tl.dot(ones, tl.trans(square, 0, 2, 1), squares, input_precision="ieee")
    else:  # the square of a bf16 number has 16 significant bits: two bf16 numbers hold it exactly
        high = (square.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        squares = tl.dot(ones, tl.trans(high.to(ones.dtype), 0, 2, 1), squares)
        squares = tl.dot(ones, tl.trans((square - high).to(ones.dtype), 0, 2, 1), squares)
    return squares


@triton.jit
def _ones_of_bytes(weight, ones):
    """Still ones, but made from some byte: Triton lays out the operands of a product by the narrowest type that was loaded for
    it, and x must have one layout in both products of FP8 weights, or its loads are not pipelined."""
    byte = tl.load((weight + tl.arange(0, ones.shape[2])[None, None, :]).to(tl.pointer_type(tl.int8)))
    return tl.broadcast_to(((byte | 1) & 1).to(tl.float32).to(ones.dtype), ones.shape)


@triton.jit
def _inverse_rms(squares, eps, K: tl.constexpr, WARPS: tl.constexpr, BM: tl.constexpr):
    """1 / rms of BM tokens from the sums of `_add_squares`."""
    total, _ = _halves(squares, WARPS, 8, BM)
    return tl.rsqrt(tl.max(total, 0) / K + eps)


@triton.jit
def _sliced_product(
    x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `row` ([ROWS] int64) of W times tokens first..first+BM-1 of rmsnorm(x): two of [ROWS / 2, BM] fp32."""
    STEP: tl.constexpr = DEPTH * WARPS
    EVEN: tl.constexpr = K % STEP == 0
    kind: tl.constexpr = x.dtype.element_ty if scale is not None else weight.dtype.element_ty
    warp = tl.arange(0, WARPS)
    k = (warp * DEPTH)[:, None, None] + tl.arange(0, DEPTH)[None, None, :]
    token = (first + tl.arange(0, BM))[None, :, None]
    w_at = weight + row[None, :, None] * w_stride + k
    x_at = x + token.to(tl.int64) * x_stride + k
    acc = tl.zeros([WARPS, ROWS, BM], tl.float32)
    squares = tl.zeros([WARPS, 16, BM], tl.float32)  # 16 equal rows
    ones = tl.full([WARPS, 16, DEPTH], 1.0, tl.float32).to(kind)
    if scale is not None:
        scale_at = scale + tl.load(table + row)[None, :] * scale_stride
        if norm is not None:
            ones = _ones_of_bytes(weight, ones)
    for start in range(0, K, STEP):
        inside = k < K - start
        if EVEN:
            w = tl.load(w_at + start)
            values = tl.load(x_at + start, mask=token < M, other=0.0)
        else:
            w = tl.load(w_at + start, mask=inside, other=0.0)
            values = tl.load(x_at + start, mask=(token < M) & inside, other=0.0)
        if norm is not None:
            if EVEN:
                factor = tl.load(norm + start + k)
            else:
                factor = tl.load(norm + start + k, mask=inside, other=0.0)
            wide = values.to(tl.float32)
            squares = _add_squares(ones, wide, squares)
            values = wide * factor.to(tl.float32)
        values = tl.trans(values.to(kind), 0, 2, 1)
        if scale is not None:
            block = tl.minimum((start + warp * DEPTH) // BLOCK, (K - 1) // BLOCK)
            share = tl.load(scale_at + block[:, None])
            # fp8 -> fp16 -> fp32 -> bf16 is exact, and faster than fp8 -> bf16, which Triton sends through a slow unit
            exact = w.to(tl.float16).to(tl.float32).to(kind)
            acc += tl.dot(exact, values, input_precision="ieee") * share[:, :, None]
        else:
            acc = tl.dot(w, values, acc, input_precision="ieee")
    a, b = _halves(acc, WARPS, ROWS // 2, BM)
    if norm is not None:
        rms = _inverse_rms(squares, eps, K, WARPS, BM)[None, :]
        a, b = a * rms, b * rms
    return a, b


@triton.jit
def _step(i, K: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, STEP: tl.constexpr):
    """Step i on the way through all slices of K, one after the other: where it begins, and whether it is its slice's last."""
    PARTS: tl.constexpr = DEPTH // STEP
    CHUNKS: tl.constexpr = (K + DEPTH - 1) // DEPTH
    LONG: tl.constexpr = CHUNKS // SLICES + 1  # chunks of each of the first slices, and of those after them
    SHORT: tl.constexpr = max(CHUNKS // SLICES, 1)
    MORE: tl.constexpr = CHUNKS % SLICES
    chunk, part = i // PARTS, i % PARTS
    behind = chunk - MORE * LONG
    s = tl.where(behind < 0, chunk // LONG, MORE + behind // SHORT)
    c = tl.where(behind < 0, chunk % LONG, behind % SHORT)
    last = (c == tl.where(behind < 0, LONG, SHORT) - 1) & (part == PARTS - 1)
    return (c * SLICES + s) * DEPTH + part * STEP, last


@triton.jit
def _wide_product(
    x, x_stride, rms, weight, w_stride, row, first, M,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_sliced_product`, with all warps in one slice of K at a time. x, rms: of `scale_kernel` and `rms_kernel`, if there
    is a norm. One loop over all slices, so that loads do not run dry where one ends."""
    STEP: tl.constexpr = min(DEPTH, 64)
    k = tl.arange(0, STEP)[None, :]
    token = first + tl.arange(0, BM)
    w_at = weight + row[:, None] * w_stride + k
    x_at = x + token.to(tl.int64)[:, None] * x_stride + k
    there = (token < M)[:, None]
    total, acc = tl.zeros([ROWS, BM], tl.float32), tl.zeros([ROWS, BM], tl.float32)
    for i in range((K + DEPTH - 1) // DEPTH * (DEPTH // STEP)):
        start, last = _step(i, K, DEPTH, SLICES, STEP)
        if K % DEPTH == 0:
            w = tl.load(w_at + start)
            values = tl.load(x_at + start, mask=there, other=0.0)
        else:
            w = tl.load(w_at + start, mask=k < K - start, other=0.0)
            values = tl.load(x_at + start, mask=there & (k < K - start), other=0.0)
        acc = tl.dot(w, tl.trans(values), acc, input_precision="ieee")
        if last:
            total += acc
            acc = tl.zeros([ROWS, BM], tl.float32)
    a, b = tl.split(tl.permute(tl.reshape(total, [2, ROWS // 2, BM]), 1, 2, 0))
    return _scaled(a, b, rms, token, M, PDL)


@triton.jit
def _scaled(a, b, rms, token, M, PDL: tl.constexpr):
    """Sums are done: lets the next kernel start, and where there is a norm waits for the one before, which has the factors."""
    if PDL == 3:
        tl.extra.cuda.gdc_launch_dependents()
    if rms is not None:
        if PDL:
            tl.extra.cuda.gdc_wait()
        factor = tl.load(rms + token, mask=token < M, other=0.0)[None, :]
        a, b = a * factor, b * factor
    return a, b


@triton.jit
def _box_product(
    x, rms, weight, row_a, row_b, first, M, K: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr, BOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_wide_product`, with x and weight as tensor descriptors of [BM, STEP] and [P, STEP]: the copy engine fetches them.

    The rows are row_a.., P of them, and BOTH: row_b.., too; else the second result means nothing. A loop for each slice:
    in one over all, ptxas would let two accumulators wait for each other.
    """
    STEP: tl.constexpr = min(DEPTH, 64)
    PARTS: tl.constexpr = DEPTH // STEP
    total_a, total_b = tl.zeros([P, BM], tl.float32), tl.zeros([P, BM], tl.float32)
    for s in range(SLICES):
        a, b = tl.zeros([P, BM], tl.float32), tl.zeros([P, BM], tl.float32)
        for i in range(s * PARTS, (s + tl.cdiv(K - s * DEPTH, SLICES * DEPTH)) * PARTS):
            start = ((i // PARTS - s) * SLICES + s) * DEPTH + i % PARTS * STEP
            values = tl.trans(x.load([first, start]))
            a = tl.dot(weight.load([row_a, start]), values, a)
            if BOTH:
                b = tl.dot(weight.load([row_b, start]), values, b)
        total_a += a
        total_b += b
    return _scaled(total_a, total_b, rms, first + tl.arange(0, BM), M, PDL)


@triton.jit
def _product(
    x, x_stride, norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
    K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """norm: of the RMS norm or, RMS, the factors of `rms_kernel`, where x has been multiplied with the norm already."""
    if WIDE:
        a, b = _wide_product(x, x_stride, norm, weight, w_stride, row, first, M, K, ROWS, BM, DEPTH, WARPS, PDL)
    else:
        a, b = _sliced_product(
            x, x_stride, None if RMS else norm, eps, weight, w_stride, scale, table, scale_stride, row, first, M,
            K, ROWS, BM, DEPTH, WARPS, BLOCK,
        )  # fmt: skip
        a, b = _scaled(a, b, norm if RMS else None, first + tl.arange(0, BM), M, PDL)
    return a, b


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
