"""What the Triton kernels of kernels/dense.py have in common: products of a few rows of W with tokens of rmsnorm(x).

A CTA takes some rows of W and walks along all of K. Weights are the M operand of the tensor core (`mma.m16n8k16`) and
tokens the N operand, and every warp takes its own slice of each step along K. A token's result is then the same bits
whatever the number of tokens: the order of additions depends on K and on `depth` and `warps` of the tile, which depend
on the weight alone, and the tile being three-dimensional keeps Triton from ever choosing wgmma. The sum of squares of
the RMS norm goes through the tensor core too (a product with ones), so it has the same property.

For many tokens (WIDE) all warps share one slice of K after another, and add the slices up as above. Tiles can then be as
large as arithmetic wants, and are wgmma's where they have 64 rows of W or more: on Hopper it adds 16 products at a time
as mma.m16n8k16 does, and tests on the device hold it to that. The largest tiles (BOXES) come through Hopper's copy
engine. FP8 weights have no such tiles.
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
