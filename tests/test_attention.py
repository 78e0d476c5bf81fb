"""Attention over a cache and a tree, against a loop over heads and rows that sees a whole dense sequence."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import lineage, random_tree
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import AttentionConfig, RopeConfig
from mtp_engine.kernels.reference import attend, visible_bias
from mtp_engine.tree import DraftTree

HEADS, KV_HEADS, QK_DIM, V_DIM, SCALE = 4, 2, 6, 3, 0.4
CPU = torch.device("cpu")


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """q: [N, Hq, Dk]; k: [S, Hkv, Dk]; v: [S, Hkv, Dv]; visible: [N, S] bool; sink: [Hq] -> [N, Hq, Dv] fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for row in range(len(q)):
            seen = visible[row].nonzero().flatten()
            weights = (k[seen, head // group] @ q[row, head] * scale).exp()
            rest = 0.0 if sink is None else sink[head].double().exp()
            out[row, head] = weights @ v[seen, head // group] / (weights.sum() + rest)
    return out


def layer(window: int | None, kv_heads: int = KV_HEADS) -> AttentionConfig:
    return AttentionConfig(HEADS, kv_heads, QK_DIM, V_DIM, RopeConfig(QK_DIM, 1e4), window)


def hybrid(windows: Sequence[int | None], *, max_nodes: int, slots: int = 3, page_size: int = 4) -> HybridKV:
    pages = Pages(slots=slots, tokens=slots * 96, page_size=page_size, device=CPU)
    return HybridKV([layer(w) for w in windows], pages, max_nodes=max_nodes, dtype=torch.float32)


def tree_rows(tree: DraftTree, slots: list[int], lengths: list[int], first: list[int] | None = None) -> StepRows:
    start = torch.tensor(lengths)
    return StepRows(
        slots=torch.tensor(slots),
        lengths=start,
        positions=start[:, None] + tree.depths,
        parents=tree.parents,
        depth=tree.max_depth,
        bound=max(lengths) + tree.nodes,
        first=None if first is None else torch.tensor(first),
    )


def causal_rows(slot: int, start: int, count: int) -> StepRows:
    return StepRows.prompt(slot, start, count, CPU)


def dense_visible(parents: list[int], size: int, length: int, window: int | None, first: int = 0) -> Tensor:
    """[size, length + size] bool: what each real node of a tree behind `length` tokens sees."""
    visible = torch.zeros(size, length + size, dtype=torch.bool)
    for node in range(size):
        path = lineage(parents, node)
        position = length + len(path) - 1
        reach = position - window if window else -1  # the newest position out of sight
        visible[node, :length] = (torch.arange(length) > reach) & (torch.arange(length) >= first)
        for up, ancestor in enumerate(path):
            inside = window is None or up < window
            visible[node, length + ancestor] = up == 0 or (inside and position - up >= first)
    return visible


# ---- the reference kernel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "qk_dim", "v_dim"), [(1, 1, 4, 4), (4, 4, 8, 8), (6, 2, 8, 5), (4, 1, 3, 7)]
)
def test_attend_equals_a_loop(heads: int, kv_heads: int, qk_dim: int, v_dim: int, sink: bool) -> None:
    g = torch.Generator().manual_seed(heads * qk_dim)
    q, k, v = draw(g, 3, 5, heads, qk_dim), draw(g, 3, 9, kv_heads, qk_dim), draw(g, 3, 9, kv_heads, v_dim)
    visible = torch.rand(3, 5, 9, generator=g) < 0.5
    visible[..., 4] = True
    sinks = draw(g, heads) * 3 if sink else None
    out = attend(q, k, v, visible_bias(visible, heads // kv_heads), 0.3, sinks)
    for b in range(3):
        torch.testing.assert_close(
            out[b].double(), naive(q[b], k[b], v[b], visible[b], 0.3, sinks), rtol=1e-5, atol=1e-5
        )


def test_attend_works_in_fp32_on_bf16() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (draw(g, 1, n, h, 8).bfloat16() for n, h in ((4, 4), (300, 2), (300, 2)))
    visible, sink = torch.ones(1, 4, 300, dtype=torch.bool), draw(g, 4).bfloat16()
    out = attend(q, k, v, visible_bias(visible, 2), 0.5, sink)
    assert out.dtype == torch.bfloat16
    exact = naive(q[0], k[0], v[0], visible[0], 0.5, sink)
    assert torch.equal(out[0], exact.bfloat16()), "only the last rounding may lose anything"


def test_a_sink_takes_weight_and_gives_no_value() -> None:
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 2)
    bias = visible_bias(torch.ones(1, 1, 3, dtype=torch.bool), 1)
    torch.testing.assert_close(attend(q, k, v, bias, 1.0, torch.zeros(1)), torch.full((1, 1, 1, 2), 0.75))


# ---- the plan of a step -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 2, 3, 6, 30]),
    nodes=st.integers(1, 8),
    sink=st.booleans(),
    bounded=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_trees_behind_prefixes(
    lengths: list[int], window: int | None, nodes: int, sink: bool, bounded: bool, seed: int
) -> None:
    """Any batch, prefix lengths from 0 on, windows smaller than the tree is deep, and keys before `first` hidden."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [rng.randint(1, nodes) for _ in lengths]
    tree = random_tree(rng, sizes, nodes, 3)
    slots = rng.sample(range(3), len(lengths))
    cache, prefixes = hybrid([None, window], max_nodes=nodes), {}
    sinks = draw(g, HEADS) * 2 if sink else None
    for slot, length in zip(slots, lengths, strict=True):
        cache.pages.reserve(slot, length + nodes)
        prefixes[slot] = draw(g, length, KV_HEADS, QK_DIM), draw(g, length, KV_HEADS, V_DIM)
        if length:
            prefill = TorchAttention(cache, causal_rows(slot, 0, length))
            prefill(1, draw(g, 1, length, HEADS, QK_DIM), *(x[None] for x in prefixes[slot]), scale=SCALE)
    first = [rng.randint(0, length + 2) for length in lengths] if bounded else None
    attention = TorchAttention(cache, tree_rows(tree, slots, lengths, first))
    q, k = draw(g, len(sizes), nodes, HEADS, QK_DIM), draw(g, len(sizes), nodes, KV_HEADS, QK_DIM)
    v = draw(g, len(sizes), nodes, KV_HEADS, V_DIM)
    out = attention(1, q, k, v, scale=SCALE, sink=sinks)
    assert bool(out.isfinite().all()), "padding too, lest a NaN spread"
    for b, (slot, length, size) in enumerate(zip(slots, lengths, sizes, strict=True)):
        visible = dense_visible(tree.parents[b].tolist(), size, length, window, first[b] if first else 0)
        keys, values = (torch.cat([old, new[b, :size]]) for old, new in zip(prefixes[slot], (k, v), strict=True))
        expected = naive(q[b, :size], keys, values, visible, SCALE, sinks)
        torch.testing.assert_close(out[b, :size].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_a_prompt_in_chunks_sees_what_the_whole_sees(window: int | None, chunk: int) -> None:
    """Chunks longer than the ring too: their start must still see what their end overwrites."""
    g = torch.Generator().manual_seed(chunk)
    total = 40
    q, k, v = draw(g, total, HEADS, QK_DIM), draw(g, total, KV_HEADS, QK_DIM), draw(g, total, KV_HEADS, V_DIM)
    cache = hybrid([window], max_nodes=2)
    cache.pages.reserve(1, total)
    out = []
    for start in range(0, total, chunk):
        part = slice(start, min(start + chunk, total))
        attention = TorchAttention(cache, causal_rows(1, start, part.stop - start))
        out.append(attention(0, q[None, part], k[None, part], v[None, part], scale=SCALE)[0])
    distance = torch.arange(total)[:, None] - torch.arange(total)
    visible = (distance >= 0) & (distance < (window or total))
    torch.testing.assert_close(torch.cat(out).double(), naive(q, k, v, visible, SCALE, None), rtol=1e-4, atol=1e-5)


def test_layers_of_one_group_keep_to_themselves() -> None:
    """Four layers, two kinds: each reads the keys it wrote, through its own head sizes."""
    g = torch.Generator().manual_seed(1)
    layers = [layer(None), layer(5, kv_heads=1), layer(None), layer(5, kv_heads=1)]
    cache = HybridKV(layers, Pages(slots=1, tokens=32, page_size=4, device=CPU), max_nodes=2, dtype=torch.float32)
    assert len(cache.groups) == 2
    cache.pages.reserve(0, 12)
    parts = [
        (draw(g, 1, 11, HEADS, QK_DIM), draw(g, 1, 11, c.kv_heads, QK_DIM), draw(g, 1, 11, c.kv_heads, V_DIM))
        for c in layers
    ]
    for start, stop in ((0, 7), (7, 11)):
        attention = TorchAttention(cache, causal_rows(0, start, stop - start))
        outs = [attention(i, *(x[:, start:stop] for x in part), scale=SCALE) for i, part in enumerate(parts)]
    distance = torch.arange(11)[:, None] - torch.arange(11)
    for config, part, out in zip(layers, parts, outs, strict=True):
        visible = (distance >= 0) & (distance < (config.window or 99))
        expected = naive(*(x[0] for x in part), visible, SCALE, None)[7:]
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-4, atol=1e-5)
