"""What is done to weights before they become integers. All of it is exact algebra but for the rounding itself.

Norm weights go into the matrices behind them. The residual stream is rotated (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456): RMSNorm without weights does not notice, and a row that has a few large columns becomes one that has none.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_engine.models.onnx.compensate import compensated

Matrix = NDArray[Any]  # float64 while it is worked on


def turn(rows: Matrix) -> Matrix:
    """rows @ Q for an orthogonal Q [n, n] with entries of at most sqrt(2 / n). rows: [..., n], float64 or less -> float64.

    Signs at random, then the Hartley transform: O(n log n), and defined for every n.
    """
    size = rows.shape[-1]
    signs = np.random.default_rng(size).integers(0, 2, size) * 2 - 1
    spectrum = np.fft.fft(rows * signs, axis=-1)
    turned: Matrix = (spectrum.real - spectrum.imag) / np.sqrt(size)
    return turned


@final
@dataclass(frozen=True)
class Rounded:
    """A matrix as integers, weight[out, in] = values[in, out] * scale[out]."""

    values: NDArray[np.int8]
    scale: Matrix

    @property
    def weight(self) -> Matrix:
        """[out, in] float64."""
        return (self.values * self.scale).T

    @classmethod
    def of(cls, weight: Matrix, bits: int, second: Tensor | None = None) -> "Rounded":
        """weight: [out, in]. bits: 8, or 7 for processors whose products of 8 bits saturate. second: see compensate.py."""
        most = (1 << (bits - 1)) - 1
        scale = np.maximum(np.abs(weight).max(1), 1e-30) / most
        if second is None:
            values = np.rint(weight / scale[:, None]).astype(np.int8)
        else:
            single = torch.from_numpy(weight).float(), torch.from_numpy(scale)
            values = compensated(*single, most, second).numpy()
        return cls(np.ascontiguousarray(values.T), scale)


@final
@dataclass(frozen=True)
class Units:
    """What an integer of queries, keys and values stands for, such that no sum of attention rounds.

    query [heads], key [kv_heads], value [kv_heads * v_dim]; a score is the product of integers times 2**-shift.
    """

    query: Matrix
    key: Matrix
    value: Matrix
    shift: int


_EXACT = float(1 << 24)  # integers up to here are exact in fp32
WEIGHT_SUM = float(1 << 13)  # what the integers of a row's attention weights add up to, nearly
_ROUNDED_UP = 1.0 + 1e-6  # for the functions whose last bit may be wrong


def coarse_unit(context: int) -> float:
    """What stands for the largest attention weight of a row where weights are rounded up and `context` of them added exactly."""
    return float(1 << max(24 - max(context - 1, 1).bit_length(), 2)) * (1 - 1e-3)


def most_value(context: int) -> int:
    """How large an integer value may be for all sums of weight * value over `context` keys to be exact.

    Weights add up to at most WEIGHT_SUM before they are rounded; rounding adds at most a half to each that is a half or
    more.
    """
    total = WEIGHT_SUM * _ROUNDED_UP
    return int(_EXACT / (total + min(context / 2, total)))


def norm_bound(weight: Matrix, bias: Matrix | None, longest: float) -> float:
    """The largest length of weight @ x + bias for |x| <= longest. weight: [dim, in]."""
    added = 0.0 if bias is None else float(np.linalg.norm(bias))
    squared = float(np.linalg.eigvalsh(weight @ weight.T)[-1])
    return float(np.sqrt(max(squared, 0.0))) * longest * (1 + 1e-5) + added


def units(
    q: Matrix, k: Matrix, v: Matrix, biases: tuple[Matrix, Matrix, Matrix] | None, *, heads: int, kv_heads: int,
    scale: float, longest: float, context: int, spread: float,
) -> Units:  # fmt: skip
    """q: [heads * dim, in], k: [kv_heads * dim, in], v: [kv_heads * v_dim, in], as they will be multiplied.

    longest: the length of no input is above this. spread: values beyond so many standard deviations are cut.
    The length of integer queries times that of integer keys is at most 2**24. By Cauchy-Schwarz no sum of their
    products is larger, in whatever order it is formed; rotary positions change no length.
    """
    dim = q.shape[0] // heads
    qb, kb, vb = biases or (None, None, None)

    def bounds(weight: Matrix, bias: Matrix | None, count: int) -> Matrix:
        parts = weight.reshape(count, dim, -1)
        shifts = [None] * count if bias is None else list(bias.reshape(count, dim))
        return np.array([norm_bound(part, shift, longest) for part, shift in zip(parts, shifts, strict=True)])

    keys = bounds(k, kb, kv_heads)
    queries = bounds(q, qb, heads).reshape(kv_heads, -1).max(1)
    half = np.sqrt(dim) / 2 + 1  # what rounding adds to a length
    for shift in range(40, -40, -1):
        product = 2.0**-shift / scale  # of the two units
        key = np.sqrt(product * keys / queries)
        query = product / key
        if np.all((queries / query + half) * (keys / key + half) <= _EXACT):
            break
    else:
        raise AssertionError("queries and keys are too large")
    size = np.linalg.norm(v, axis=1) * spread + (0.0 if vb is None else np.abs(vb))
    value = np.maximum(size, 1e-30) / most_value(context)
    return Units(np.repeat(query, heads // kv_heads), key, value, shift)
