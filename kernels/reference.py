"""Torch twins of the kernels: exact, readable, on any device."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """Softmax attention with grouped heads and an optional sink, in fp32.

    q: [B, N, Hq, Dk]; k: [B, S, Hkv, Dk]; v: [B, S, Hkv, Dv]; visible: [B, N, S] bool; sink: [Hq] logits that join the
    softmax denominator and carry no value. A query that sees nothing and has no sink gets zeros.
    Returns [B, N, Hq, Dv] in q's dtype.
    """
    batch, nodes, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # the queries of a group share their keys: fold them into rows, [B, Hkv, G*N, Dk]
    rows = q.view(batch, nodes, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * nodes, dim)
    scores = torch.matmul(rows.float() * scale, k.permute(0, 2, 3, 1).float())
    scores = scores.view(batch, kv_heads, group, nodes, -1).masked_fill_(~visible[:, None, None], -float("inf"))
    if sink is not None:
        extra = sink.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, nodes, -1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
        # padding and rows before the sequence's start may see nothing: 0/0 becomes 0
        weights = torch.where(visible.any(-1)[:, None, None, :, None], weights, 0.0)
    out = torch.matmul(weights.reshape(batch, kv_heads, group * nodes, -1), v.permute(0, 2, 1, 3).float())
    out = out.view(batch, kv_heads, group, nodes, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, nodes, heads, -1).to(q.dtype)


def write_rows(storage: Tensor, rows: Tensor, values: Tensor) -> None:
    """storage [R, H, D]; rows [...] int64; values [..., H, D]: storage[rows] = values."""
    storage.index_copy_(0, rows.reshape(-1), values.reshape(-1, *storage.shape[1:]).to(storage.dtype))


def move_rows(storage: Tensor, source: Tensor, target: Tensor) -> None:
    """storage [L, R, H, D]; source, target [M] int64, read all before writing any: storage[:, target] = storage[:, source]."""
    storage.index_copy_(1, target, storage.index_select(1, source))
