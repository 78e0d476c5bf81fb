"""The Triton side of kernels/moe.py."""

import triton
import triton.language as tl

from mtp_engine.kernels.dense_products import _halves
from mtp_engine.kernels.int4_kernels import product_int4


@triton.jit
def _inverse(x, m, live, eps, H: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr):
    """1 / rms of rows m of x. WIDE columns are read at a time."""
    wide = tl.arange(0, WIDE)
    squares = tl.zeros([TOKENS, WIDE], tl.float32)
    for start in tl.static_range(0, H, WIDE):
        part = tl.load(x + m[:, None] * H + start + wide, live & (start + wide < H), other=0.0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 1) / H + eps)


@triton.jit
def _logits(w, y):
    """w @ y.T. The fp32 router is cut into three bf16 parts of 8 bits, and y is bf16: every product is exact, the sums are
    fp32."""
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    logits = tl.dot(low, y.T)
    logits = tl.dot(middle, y.T, logits)
    return tl.dot(high, y.T, logits)


@triton.jit(do_not_specialize=["M"])
def router_kernel(x, norm, router, y, partial, eps, M, H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The router logits of COLUMNS columns of y: partial [H / COLUMNS, M, E]. NORM: y = rmsnorm(x) is worked out here, else
    x is y."""
    piece = tl.program_id(1)
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(router + e[:, None] * H + columns, (e < E)[:, None] & (columns < H), other=0.0)
    gain = tl.load(norm + columns, columns < H, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    live = (m < M)[:, None]
    part = tl.load(x + m[:, None] * H + columns, live & (columns < H), other=0.0)
    if NORM:
        inverse = _inverse(x, m, live, eps, H, 4 * COLUMNS, TOKENS)
        part = (part.to(tl.float32) * inverse[:, None] * gain).to(tl.bfloat16)
        if tl.program_id(0) == 0:
            tl.store(y + m[:, None] * H + columns, part, live & (columns < H))
    tl.store(partial + (piece * M + m) * E + e[:, None], _logits(w, part), (e < E)[:, None] & (m < M))


@triton.jit(do_not_specialize=["M"])
def norm_kernel(x, norm, y, eps, M, H: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr):
    """y = rmsnorm(x) with the bits of router_kernel's."""
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live, wide = (m < M)[:, None], tl.arange(0, WIDE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inverse = _inverse(x, m, live, eps, H, WIDE, TOKENS)
    for start in tl.static_range(0, H, WIDE):
        there = live & (start + wide < H)
        part = tl.load(x + m[:, None] * H + start + wide, there, other=0.0).to(tl.float32)
        gain = tl.load(norm + start + wide, start + wide < H, other=0.0).to(tl.float32)
        tl.store(y + m[:, None] * H + start + wide, (part * inverse[:, None] * gain).to(tl.bfloat16), there)


@triton.jit
def _choose(partial, offset, weights, experts, scale, m, M, PIECES: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
            K: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """The K experts of tokens m [TOKENS] and what they weigh. offset: [E_PAD]. Returns which are taken, [TOKENS, E_PAD] int32,
    and their pairs."""
    e = tl.arange(0, E_PAD)
    live = (m < M)[:, None] & (e < E)
    logits = tl.zeros([TOKENS, E_PAD], tl.float32)
    for piece in tl.static_range(PIECES):
        logits += tl.load(partial + (piece * M + m[:, None]) * E + e, live, other=0.0)
    score = tl.sigmoid(logits)
    rank = tl.where(e < E, score + offset, -float("inf"))
    taken = tl.zeros([TOKENS, E_PAD], tl.int32)
    for _ in tl.static_range(K):
        best = e == tl.argmax(rank, 1)[:, None]  # of equals the lowest
        taken = tl.where(best, 1, taken)
        rank = tl.where(best, -float("inf"), rank)
    total = tl.sum(tl.where(taken == 1, score, 0.0), 1) + 1e-20
    share = score / total[:, None] if NORMALISE else score
    pair = m[:, None] * K + tl.cumsum(taken, 1) - taken
    taken = tl.where(live, taken, 0)
    tl.store(weights + pair, share * scale, taken == 1)
    tl.store(experts + pair, tl.broadcast_to(e[None, :], [TOKENS, E_PAD]), taken == 1)
    return taken, pair


@triton.jit
def _order(count, slots, E: tl.constexpr, E_PAD: tl.constexpr):
    """The slots of `Routing` from the number of every expert's pairs, [E_PAD] int32."""
    e = tl.arange(0, E_PAD)
    hit = (count > 0).to(tl.int32)
    before = tl.cumsum(hit, 0) - hit
    slot = tl.where(hit == 1, before, tl.sum(hit, 0) + e - before)
    tl.store(slots + slot, e + (count.to(tl.int64) << 32), e < E)


@triton.jit(do_not_specialize=["M"])
def choose_kernel(partial, bias, weights, experts, slots, pairs, scale, M, PIECES: tl.constexpr, E: tl.constexpr,
            E_PAD: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: the K experts of at most TOKENS tokens, and the pairs of every expert, as `Routing` has them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.arange(0, E_PAD)
    offset = tl.load(bias + e, e < E, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, TOKENS)
    taken, pair = _choose(partial, offset, weights, experts, scale, m, M, PIECES, E, E_PAD, K, NORMALISE, TOKENS)
    tl.store(pairs + e * M + tl.cumsum(taken, 0) - taken, pair, taken == 1)
    _order(tl.sum(taken, 0), slots, E, E_PAD)


@triton.jit(do_not_specialize=["M"])
def choose_many_kernel(partial, bias, weights, experts, scale, M, PIECES: tl.constexpr, E: tl.constexpr,
                       E_PAD: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """The K experts of TOKENS tokens."""
    e = tl.arange(0, E_PAD)
    offset = tl.load(bias + e, e < E, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    _choose(partial, offset, weights, experts, scale, m, M, PIECES, E, E_PAD, K, NORMALISE, TOKENS)


@triton.jit(do_not_specialize=["M"])
def group_kernel(experts, pairs, counts, M, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The pairs of one expert, ascending, and their number."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e, count, start = tl.program_id(0), 0, 0
    while start < M * K:
        pair = start + tl.arange(0, BLOCK)
        mine = (tl.load(experts + pair, pair < M * K, other=-1) == e).to(tl.int32)
        tl.store(pairs + e * M + count + tl.cumsum(mine, 0) - mine, pair, mine == 1)
        count += tl.sum(mine, 0)
        start += BLOCK
    tl.store(counts + e, count)


@triton.jit
def order_kernel(counts, slots, E: tl.constexpr, E_PAD: tl.constexpr, PDL: tl.constexpr):
    e = tl.arange(0, E_PAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _order(tl.load(counts + e, e < E, other=0), slots, E, E_PAD)


@triton.jit
def _widen(w, dtype: tl.constexpr):
    """e4m3 -> dtype, exactly. Directly, Triton 3.6 goes through a conversion that runs at a sixteenth of the FMA rate."""
    return w.to(tl.float16).to(tl.float32).to(dtype)


@triton.jit
def _product(x, rows, live, w, first, scale0, scale1, upper, C: tl.constexpr, WIDTH: tl.constexpr,
             SCALED: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """w[first] @ x[rows].T, [len(first), len(rows)] fp32, in ascending blocks of WIDTH columns. x, w: [., C].

    SCALED: block b's product counts scale0[b] times, or scale1[b] times in `upper` rows.
    """
    k = tl.arange(0, WIDTH)
    x_at = x + rows[:, None] * C + k
    w_at = w + first[:, None] * C + k
    total = tl.zeros([first.shape[0], rows.shape[0]], tl.float32)
    for block in tl.range(0, C // WIDTH, loop_unroll_factor=UNROLL):
        weight = tl.load(w_at + block * WIDTH)
        part = tl.load(x_at + block * WIDTH, live[:, None], other=0.0)
        if SCALED:
            factor = tl.where(upper, tl.load(scale1 + block), tl.load(scale0 + block))
            total += tl.dot(_widen(weight, part.dtype), part.T) * factor[:, None]
        else:
            total = tl.dot(weight, part.T, total)
    return total


@triton.jit
def _split_product(x, rows, live, w, first, scale_at, C: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
                   SPLIT: tl.constexpr):  # fmt: skip
    """The first and the second half of `_product`'s rows, by SPLIT warps of which each takes every SPLIT-th block, and whose
    sums are added up in their order. scale_at: [len(first)], where the scales of a row's blocks begin."""
    warp = tl.arange(0, SPLIT)
    k = (warp * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
    x_at = x + rows[None, :, None] * C + k
    w_at = w + first[None, :, None] * C + k
    share_at = scale_at[None, :] + warp[:, None]
    total = tl.zeros([SPLIT, first.shape[0], rows.shape[0]], tl.float32)
    for start in range(0, C, SPLIT * WIDTH):
        weight = tl.load(w_at + start)
        part = tl.trans(tl.load(x_at + start, live[None, :, None], other=0.0), 0, 2, 1)
        if SCALED:
            share = tl.load(share_at + start // WIDTH)
            total += tl.dot(_widen(weight, part.dtype), part) * share[:, :, None]
        else:
            total = tl.dot(weight, part, total)
    return _halves(total, SPLIT, first.shape[0] // 2, rows.shape[0])


@triton.jit(do_not_specialize=["M"])
def gate_up_kernel(y, w, scale, table, slots, pairs, h, M, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr,
             K: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
             TOKENS: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[pair] = silu(gate) * up, COLUMNS columns for all pairs of one chosen expert. y: [M, H]; h: [M * K, INNER]. SPLIT: of
    `_split_product`, 1: of `_product`."""
    n, slot = tl.program_id(0) * COLUMNS, tl.program_id(1)
    r = tl.arange(0, 2 * COLUMNS)
    upper = r >= COLUMNS
    first = tl.where(upper, INNER - COLUMNS, 0) + n + r  # gate's rows, then up's
    row0, row1 = 0, 0
    if FORMAT == "fp8":
        row0, row1 = tl.load(table + n), tl.load(table + INNER + n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    packed = tl.load(slots + slot)
    e, count = packed & 0xFFFFFFFF, packed >> 32
    scale0 = scale + (e * S + row0) * (H // WIDTH)
    scale1 = scale + (e * S + row1) * (H // WIDTH)
    start = 0
    while start < count:
        t = start + tl.arange(0, TOKENS)
        pair = tl.load(pairs + e * M + t, t < count, other=0)
        mine, live = w + e * (2 * INNER * H), t < count
        if SPLIT > 1:
            gate, up = _split_product(y, pair // K, live, mine, first, tl.where(upper, scale1, scale0), H, WIDTH,
                                      FORMAT == "fp8", SPLIT)  # fmt: skip
        else:
            if FORMAT == "int4":
                both = product_int4(y, pair // K, live, w + e * (INNER * H), first, scale + e * (2 * INNER * (H // WIDTH)), H,
                                     WIDTH, UNROLL)  # fmt: skip
            else:
                both = _product(
                    y, pair // K, live, mine, first, scale0, scale1, upper, H, WIDTH, FORMAT == "fp8", UNROLL
                )
            gate, up = tl.split(tl.permute(tl.reshape(both, [2, COLUMNS, TOKENS]), [1, 2, 0]))
        if PDL:  # not before: what `_down` then prefetches must not leave L2 again; nor may it read slots too early
            tl.extra.cuda.gdc_launch_dependents()
        value = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        at = h + pair * INNER + n + tl.arange(0, COLUMNS)[:, None]
        tl.store(at, value, tl.broadcast_to((t < count)[None, :], [COLUMNS, TOKENS]))
        start += TOKENS


@triton.jit(do_not_specialize=["M"])
def down_kernel(h, w, scale, table, slots, pairs, y, M, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr,
          FORMAT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
          UNROLL: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[pair] = down(h[pair]), COLUMNS columns for all pairs of one chosen expert. h: [M * K, INNER]; y: [M * K, H]."""
    n, slot = tl.program_id(0) * COLUMNS, tl.program_id(1)
    first = n + tl.arange(0, COLUMNS)
    row = tl.load(table + n) if FORMAT == "fp8" else 0
    LENGTH: tl.constexpr = INNER // 2 if FORMAT == "int4" else INNER  # of a row, in elements of w
    # complete before this kernel starts: `_gate_up` lets it start only after itself waiting for `_choose`
    packed = tl.load(slots + slot, cache_modifier=".cg")
    e, count = packed & 0xFFFFFFFF, packed >> 32
    if count == 0:
        return
    w += e * (H * LENGTH)
    if PDL:
        _prefetch(w + first * LENGTH, LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    scale += (e * (H if FORMAT == "int4" else S) + row) * (INNER // WIDTH)
    start = 0
    while start < count:
        t = start + tl.arange(0, TOKENS)
        pair = tl.load(pairs + e * M + t, t < count, other=0)
        if FORMAT == "int4":
            value = product_int4(h, pair, t < count, w, first, scale, INNER, WIDTH, UNROLL)
        else:
            value = _product(
                h, pair, t < count, w, first, scale, scale, first < 0, INNER, WIDTH, FORMAT == "fp8", UNROLL
            )
        tl.store(y + pair * H + first[:, None], value, tl.broadcast_to((t < count)[None, :], [COLUMNS, TOKENS]))
        start += TOKENS


@triton.jit
def _prefetch(rows, LINES: tl.constexpr):
    """Asks for the first LINES * 128 bytes at each pointer to come to L2, and does not wait for them."""
    lines = rows[:, None] + tl.arange(0, LINES) * (1024 // rows.dtype.element_ty.primitive_bitwidth)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def sum_kernel(y, weights, residual, out, H: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """out[m] = residual[m] + sum over k of weights[m, k] * y[m, k], k ascending, rounded once."""
    m = tl.program_id(1)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(weights + m * K + k) * tl.load(y + (m * K + k) * H + n, n < H, other=0.0)
    total += tl.load(residual + m * H + n, n < H, other=0.0).to(tl.float32)
    tl.store(out + m * H + n, total.to(out.dtype.element_ty), n < H)
