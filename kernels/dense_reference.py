"""Torch twins of kernels/dense.py: in fp32, rounded where a kernel's result is stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.kernels.fp8 import BlockMatrix


def _product(x: Tensor, weight: Tensor | BlockMatrix, norm: Tensor | None, eps: float) -> Tensor:
    """rmsnorm(x) W^T: [M, K] and [N, K] -> [M, N] fp32."""
    rows = weight.part(0, len(weight.rows), torch.float32) if isinstance(weight, BlockMatrix) else weight.float()
    wide = x.float()
    return F.linear(wide if norm is None else F.rms_norm(wide, norm.shape, norm.float(), eps), rows)


def linear_twin(
    x: Tensor,
    weight: Tensor | BlockMatrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    y = _product(x, weight, norm, eps)
    y = y if bias is None else y + bias
    return (y if residual is None else y + residual).to(out_dtype or x.dtype)


def gated_twin(x: Tensor, weight: Tensor | BlockMatrix, *, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    gate, up = _product(x, weight, norm, eps).chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def qkv_twin(
    x: Tensor,
    weight: Tensor | BlockMatrix,
    *,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    qk_dim: int,
    v_dim: int,
    value_scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
) -> Tensor:
    y = linear_twin(x, weight, norm=norm, eps=eps, bias=bias)
    qk, v = y.tensor_split([(heads + kv_heads) * qk_dim], -1)
    qk, rotary = qk.reshape(len(x), heads + kv_heads, qk_dim), cos.shape[1]
    turned = qk[..., :rotary].float()
    turned = turned * cos[:, None] + turned.roll(rotary // 2, -1) * sin[:, None]
    qk = torch.cat([turned.to(x.dtype), qk[..., rotary:]], -1)
    k_cache[rows] = qk[:, heads:]
    v_cache[rows] = v.reshape(len(x), kv_heads, v_dim) * value_scale
    return qk[:, :heads]
