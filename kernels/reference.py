"""Torch twins of the kernels: exact, readable, on any device."""

import torch
from torch import Tensor


def visible_bias(visible: Tensor, group: int) -> Tensor:
    """What `attend` adds to its scores: 0 where a row sees a key, -inf elsewhere. Every row must see some key.

    visible: [B, N, S] bool; group: query heads per key head. Returns [B, N * group, S] fp32.
    """
    bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device).masked_fill_(~visible, -float("inf"))
    return bias.repeat_interleave(group, dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """Softmax attention with grouped heads and an optional sink, in fp32.

    q: [B, N, Hq, Dk]; k: [B, S, Hkv, Dk]; v: [B, S, Hkv, Dv]; bias: [B, N * Hq / Hkv, S] from `visible_bias`;
    sink: [Hq] logits that join the softmax denominator and carry no value. Returns [B, N, Hq, Dv] in q's dtype.
    """
    batch, nodes, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    rows = nodes * heads // kv_heads  # the queries of a group share their keys: fold them into rows
    folded = q.view(batch, nodes, kv_heads, -1, dim).transpose(1, 2).reshape(batch * kv_heads, rows, dim).float()
    keys_t = k.permute(0, 2, 3, 1).reshape(batch * kv_heads, dim, keys).float()
    offset = bias if batch == 1 else bias.repeat_interleave(kv_heads, 0)
    scores = torch.baddbmm(offset, folded, keys_t, alpha=scale)
    if sink is not None:
        weights = torch.cat([scores, _sink_column(sink, batch, nodes, kv_heads)], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = torch.bmm(weights, v.transpose(1, 2).reshape(batch * kv_heads, keys, -1).float())
    return (
        out.view(batch, kv_heads, nodes, heads // kv_heads, -1)
        .transpose(1, 2)
        .reshape(batch, nodes, heads, -1)
        .to(q.dtype)
    )


def _sink_column(sink: Tensor, batch: int, nodes: int, kv_heads: int) -> Tensor:
    """[Hq] -> [B * Hkv, N * G, 1], in the row order of `attend`."""
    per_group = sink.float().view(1, kv_heads, 1, -1)
    return per_group.expand(batch, -1, nodes, -1).reshape(batch * kv_heads, -1, 1)


def write_rows(storage: Tensor, rows: Tensor, values: Tensor) -> None:
    """storage [R, H, D]; rows [...] int64; values [..., H, D]: storage[rows] = values."""
    storage.index_copy_(0, rows.flatten(), values.flatten(0, -3).to(storage.dtype))


def move_rows(storage: Tensor, source: Tensor, target: Tensor) -> None:
    """storage [L, R, H, D]; source, target [M] int64, read all before writing any: storage[:, target] = storage[:, source]."""
    storage.index_copy_(1, target, storage.index_select(1, source))


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias with weights rounded to 8 bits, a scale per output row, and x to up to 16, a scale per row: the twin of
    cpu.calls.PackedLinear, bit for bit. x: [M, K]; weight: [O, K]; bias: [O] -> [M, O] fp32.

    A sum of K products of 127 with the largest x fits 32 bits, and so each sum is exact; fp64 holds it too.
    """
    peaks, largest = weight.abs().amax(1), x.abs().amax(1)
    most = torch.tensor(
        [127.0, min(32767, (2**31 - 1) // (127 * weight.shape[1]))]
    )  # a number over a tensor rounds twice
    whole = (weight * (most[0] / peaks).nan_to_num(posinf=0.0)[:, None]).round().double()
    narrow = (x * (most[1] / largest).nan_to_num(posinf=0.0)[:, None]).round().double()
    y = (narrow @ whole.T).float() * ((peaks / most[0]) * (largest / most[1])[:, None])
    return y if bias is None else y + bias
