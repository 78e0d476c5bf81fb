"""y = x W^T for few rows, in the layout that runs fastest on this processor.

On a CPU a decoding step reads every weight once and is bound by that, so the time should not depend on the number of
rows M. It does: MKL's plain sgemm takes 2.6 times as long for M = 4 as for M = 3. Packed once for a large M, its
weights give nearly flat times up to M = 8 (figures in bench/LOG.md, from a script that is not kept).
"""

import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

_PACK_ROWS = 128  # the row count MKL is told to expect; smaller values are slower from M = 9 on


@final
class Linear:
    """A bias-free or biased linear layer. weight: [out, in]; call with [..., in] to get [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and packed_is_faster()
        self.weight = None if packed else weight  # a packed one is not kept twice
        self._apply = _packed(weight) if packed else _plain(weight)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._apply(x)
        return y if self.bias is None else y + self.bias


def _plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    pack = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    # the op wants the unpacked weight too but reads only its shape; a view of one element keeps no second copy alive
    shape_only = torch.empty(1).expand(weight.shape)
    in_features, out_features = weight.shape[1], weight.shape[0]

    def apply(x: Tensor) -> Tensor:
        rows = x.reshape(-1, in_features)
        y: Tensor = torch.ops.mkl._mkl_linear(rows, pack, shape_only, None, rows.shape[0])
        return y.view(*x.shape[:-1], out_features)

    return apply


@final
class Int8Linear:
    """A linear layer with int8 weights, one scale per output row, and inputs rounded as they come.

    It reads a quarter of the bytes. Only for drafting: there, rounding costs a little acceptance and never the text.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to move quantised tensors to another package
            rounded = torch.quantize_per_channel(
                weight, scales, torch.zeros_like(scales, dtype=torch.int64), 0, torch.qint8
            )
        self._packed = torch.ops.quantized.linear_prepack(rounded, None)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed)
        return y if self.bias is None else y + self.bias


def rounded_linear(weight: Tensor, bias: Tensor | None = None) -> Linear | Int8Linear:
    """Int8 where this processor and this torch have it, else the weight as it is. weight: [out, in]."""
    supported = weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_int8()
    return Int8Linear(weight, bias) if supported else Linear(weight, bias)


@cache
def _has_int8() -> bool:
    """Whether the int8 product is there and right."""
    weight, x = torch.randn(64, 64), torch.randn(4, 64)
    try:
        y = Int8Linear(weight)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y - F.linear(x, weight)).norm() < 0.05 * y.norm())


@cache
def packed_is_faster() -> bool:
    """Measure both layouts, once per process, on 4 rows and a weight that no cache holds (about 60 ms)."""
    if not hasattr(torch.ops.mkl, "_mkl_linear"):
        return False
    weight, x = torch.full((16384, 576), 0.01), torch.randn(4, 576)
    packed, plain = _packed(weight), _plain(weight)
    if not torch.allclose(packed(x), plain(x), rtol=1e-4, atol=1e-4):
        return False
    times = {packed: float("inf"), plain: float("inf")}
    for _ in range(5):  # in turns, so that a busy moment hits both; the best of each counts
        for layout in times:
            start = time.perf_counter()
            layout(x)
            times[layout] = min(times[layout], time.perf_counter() - start)
    # noise must not cost a factor of two: plain has to win clearly, as it would where packing does not help at all
    return times[packed] < 1.25 * times[plain]
