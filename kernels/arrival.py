"""What the small kernels of a step share: the noise, an order on floats, and who comes last.

Their kernels end in "the last program to arrive does the rest": programs leave partial results in scratch memory and
count themselves in; the last one reduces them and goes on to the next, small, stage. So what would be two to four
launches is one. Counters are int32 zeros that the caller keeps (`arrivals`) and the kernels leave zero again, so one
buffer serves all launches of a stream. Which program comes last is chance, what it computes is not: maxima are exact,
and sums of exponentials are split at absolute indices and added in a fixed order. No result depends on the other
requests or nodes of the call. Scores may differ from the twins' by some ulp; ties go to the lowest index. Small int
tensors must be contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-(1 << 31))  # ranks below every float's
LARGEST = tl.constexpr((1 << 31) - 1)


def check_contiguous(*values: Tensor) -> None:
    assert all(value.is_contiguous() for value in values)


# ---- noise: sampler.gumbel in uint32 --------------------------------------------------------------------------------


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def feistel(left, right, first: tl.constexpr, second: tl.constexpr, third: tl.constexpr, fourth: tl.constexpr):
    """sampler._feistel on uint32."""
    left = left ^ mix(right ^ first)
    right = right ^ mix(left ^ second)
    left = left ^ mix(right ^ third)
    return left, right ^ mix(left ^ fourth)


@triton.jit
def noise_key(seed, position):
    """sampler.noise_key: two uint32. seed, position: int64."""
    left, right = feistel(
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F
    )  # fmt: skip
    left, right = left ^ position.to(tl.uint32), right ^ (position >> 32).to(tl.uint32)
    return feistel(left, right, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@triton.jit
def noise_bits(first, second, token):
    """sampler._bits of a key for uint32 tokens."""
    return mix(mix(token ^ first) ^ second)


@triton.jit
def step_key(seed, length, purpose: tl.constexpr):
    """sampler.step_seed: int64. seed, length: int64."""
    left, right = noise_key(seed, length)
    left, right = feistel(left ^ purpose, right, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
    return left.to(tl.int64) | ((right & 0x7FFFFFFF).to(tl.int64) << 32)


@triton.jit
def unit_of(bits):
    """sampler._open_unit on uint32."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355225)


@triton.jit
def gumbel_of(first, second, token):
    """sampler.gumbel, from the two halves of `noise_key`; token: uint32."""
    v = unit_of(noise_bits(first, second, token))
    w = 1.0 - v
    # -log1p(-v) is -log(w) and what rounding took from w, which is all there is where v is tiny
    return -tl.log((v - (1.0 - w)) - tl.log(w))


# ---- order and arrival ----------------------------------------------------------------------------------------------


@triton.jit
def rank_of(x):
    """fp32 -> int32 in the same order; 0.0 and -0.0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(rank):
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(rank, index):
    """An int64 that is larger for a larger rank, and for a lower index among equal ranks."""
    return (rank.to(tl.int64) << 32) + (LARGEST - index)


@triton.jit
def unpack_index(packed):
    return LARGEST - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def arrives_last(arrivals, expected):
    """Whether this program is the last of `expected`; if so it sees what the others stored (load it with .cg)."""
    tl.debug_barrier()  # the atomic below releases what every thread has stored, not only its own thread
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(arrivals, 0)
    return last
