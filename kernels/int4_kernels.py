"""The Triton side of kernels/int4.py: what the kernels of a mixture of experts call for weights in 4 bits."""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _unpack(packed):
    """The low and the high four bits of every byte, less 8, in bf16.

    Four bytes at a time, by packed instructions: a number in the low bits of bf16 128 (0x4300) adds itself to it, and 1.0 * that
    - 136 is exact.
    """
    if _INTERPRETED:
        low = (packed & 15).to(tl.float32) - 8
        high = (packed >> 4).to(tl.float32) - 8
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 l, h, one, less;
            and.b32 l, $4, 0x0F0F0F0F;
            shr.u32 h, $4, 4;
            and.b32 h, h, 0x0F0F0F0F;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            prmt.b32 $0, l, 0x43434343, 0x4140;
            prmt.b32 $1, l, 0x43434343, 0x4342;
            prmt.b32 $2, h, 0x43434343, 0x4140;
            prmt.b32 $3, h, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            }""",
            "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    return low.to(tl.bfloat16), high.to(tl.bfloat16)


@triton.jit
def _fetch(at):
    """tl.load of int32, in whatever layout the result is wanted: a load has its own, and the way out of it two barriers."""
    if _INTERPRETED:
        value = tl.load(at)
    else:
        value = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
        )
    return value


@triton.jit
def product_int4(x, rows, live, w, first, scale, C: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """w[first] @ x[rows].T, [len(first), len(rows)] fp32, in ascending blocks of WIDTH columns. x: [., C]; w: [., C / 2], two
    groups in WIDTH / 2 bytes; scale: [., C / WIDTH], their two bf16 scales in each int32."""
    k = tl.arange(0, WIDTH // 2)
    x_at = x + rows[:, None] * C + k
    w_at = w + first[:, None] * (C // 2) + k
    scale_at = scale + first * (C // WIDTH)
    total = tl.zeros([first.shape[0], rows.shape[0]], tl.float32)
    ahead = _fetch(scale_at)
    for block in tl.range(0, C // WIDTH, loop_unroll_factor=UNROLL):
        low, high = _unpack(tl.load(w_at + block * (WIDTH // 2)))
        part0 = tl.load(x_at + block * WIDTH, live[:, None], other=0.0)
        part1 = tl.load(x_at + block * WIDTH + WIDTH // 2, live[:, None], other=0.0)
        both = ahead
        ahead = _fetch(scale_at + tl.minimum(block + 1, C // WIDTH - 1))  # a block early: it is not waited for
        total += tl.dot(low, part0.T) * (both << 16).to(tl.float32, bitcast=True)[:, None]
        total += tl.dot(high, part1.T) * (both & -65536).to(tl.float32, bitcast=True)[:, None]
    return total
