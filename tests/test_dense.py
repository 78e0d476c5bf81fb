"""The dense kernels of a decoding step against their twins, and that a row's result does not depend on its neighbours."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

from mtp_engine.kernels.dense import Weight, gated, linear, qkv  # noqa: E402
from mtp_engine.kernels.dense_reference import gated_twin, linear_twin, qkv_twin  # noqa: E402
from mtp_engine.kernels.dense_tiles import Tile, many, many_fp8, tile_for  # noqa: E402
from mtp_engine.kernels.fp8 import BlockMatrix, fused_rows, fused_sizes, plain_rows, quantise_blocks  # noqa: E402
from mtp_engine.kernels.launch import pdl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# of the norm; x * norm and the result are rounded to bf16, which the interpreter does towards zero
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2}
TILES = [None, Tile(16, 16, 1, 2), Tile(32, 16, 4, 3)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrix(rows: int, k: int, dtype: torch.dtype, fp8: bool, block: int = 16) -> Weight:
    """A slice of the columns of a wider matrix, or one in FP8."""
    weight = randn(rows, 2 * k, seed=1) * k**-0.5
    return quantised(weight[:, :k], plain_rows([rows], block), block) if fp8 else weight.to(dtype)[:, k:]


def quantised(weight: Tensor, table: Tensor, block: int) -> BlockMatrix:
    data, scale = quantise_blocks(weight.cpu(), table, int(table.max()) + 1, block)
    return BlockMatrix(data.to(DEVICE), scale.to(DEVICE), table.to(DEVICE), block)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < ERROR[dtype], error


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 16, 17, 40])
def test_linear(m: int, dtype: torch.dtype, fp8: bool) -> None:
    x = randn(m, 64, dtype=dtype)[:, 8:56]  # rows apart
    weight = matrix(40, 48, dtype, fp8)
    norm, bias, residual = randn(48, dtype=dtype, seed=2), randn(40, dtype=dtype, seed=3), randn(m, 40, dtype=dtype)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5, "bias": bias, "residual": residual}
    check(linear(x, weight, **options), linear_twin(x, weight, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_linear_without_extras(dtype: torch.dtype, tile: Tile | None) -> None:
    x, weight = randn(3, 48, dtype=dtype), matrix(40, 48, dtype, False)
    expected = linear_twin(x, weight, out_dtype=torch.float32)
    check(linear(x, weight, out_dtype=torch.float32, tile=tile), expected, dtype)


# the tile for few tokens, columns, and tiles for many
MANY = [
    (Tile(16, 16, 4, 3), 96, [Tile(64, 16, 4, 3, 64), Tile(32, 16, 4, 4, 64, 4)]),
    (Tile(32, 16, 2, 3), 40, [Tile(32, 16, 2, 3, 32), Tile(64, 16, 2, 3, 128, 8)]),
    (Tile(16, 128, 4, 3), 640, [Tile(64, 128, 4, 3, 64, 4)]),
    (Tile(16, 16, 4, 3), 96, [Tile(16, 16, 4, 3, 64, 4, boxes=True), Tile(16, 16, 4, 3, 64, 4, apart=True)]),
]


@pytest.mark.parametrize(("few", "k", "tiles"), MANY)
def test_many_tokens_add_up_as_few(few: Tile, k: int, tiles: list[Tile]) -> None:
    """The slices of K are of different lengths here, and 40 ends within one."""
    x, residual = randn(133, k, dtype=torch.bfloat16), randn(133, 76, dtype=torch.bfloat16, seed=3)
    weight, norm = matrix(76, k, torch.bfloat16, False), randn(k, dtype=torch.bfloat16, seed=2)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5}
    case = attention_case(133, torch.bfloat16, 8, weight, (3, 2, 12, 8))
    caches = case["k_cache"], case["v_cache"]

    def results(m: int, tile: Tile) -> list[Tensor]:
        part = {name: case[name][:m] for name in ("x", "cos", "sin", "rows")}
        for cache in caches:
            cache.zero_()
        found = [
            linear(x[:m], weight, **options, residual=residual[:m], tile=tile), linear(x[:m], weight, tile=tile),
            qkv(**case | part, tile=tile), gated(x[:m], weight, **options, tile=few if tile.apart else tile),
        ]  # fmt: skip
        return found + [cache[part["rows"]] for cache in caches]

    expected = results(16, few)
    for tile in tiles:
        for found, alone in zip(results(133, tile), expected, strict=True):
            assert torch.equal(found[:16], alone), tile
        check(linear(x, weight, **options, tile=tile), linear_twin(x, weight, **options), torch.bfloat16)


@pytest.mark.parametrize(("rows", "k"), [(960, 576), (4096, 4096), (6144, 4096), (22016, 4096), (151680, 4096)])
def test_tiles_for_many_keep_the_order_of_additions(rows: int, k: int) -> None:
    few = tile_for(rows, k, 2, False)
    for m in (1, 16, 17, 64, 65, 256):
        tile = many(few, rows, k, m)
        assert (tile.depth, tile.warps) == (few.depth, few.warps)
        assert m > 16 or tile == few


@pytest.mark.parametrize(("rows", "k"), [(1856, 4096), (14848, 4096), (4096, 8192), (64, 128)])
def test_tiles_for_many_in_fp8_keep_the_order_of_additions(rows: int, k: int) -> None:
    few = tile_for(rows, k, 1, False)
    tiles = [many_fp8(few, rows, k, m) for m in (1, 16, 32, 33, 64, 128, 129, 2048)]
    assert {(tile.depth, tile.warps, tile.wide, tile.teams) for tile in tiles} == {(few.depth, few.warps, 0, 0)}
    assert tiles[2] == few
    assert tiles[3] != few


def test_teams_only_where_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, and where the columns are whole steps and gate's rows whole eights: elsewhere tiles of the same sums."""
    few = tile_for(22016, 4096, 2, False)
    monkeypatch.setattr("mtp_engine.kernels.dense_tiles.hopper", lambda: True)
    monkeypatch.setattr("mtp_engine.kernels.dense_tiles.warpgroups", lambda: False)
    assert not many(few, 22016, 4096, 256).teams
    monkeypatch.setattr("mtp_engine.kernels.dense_tiles.warpgroups", lambda: True)
    assert many(few, 22016, 4096, 256).teams
    for rows, k in ((22024, 4096), (22016, 4104)):
        tile = many(few, rows, k, 256)
        assert not tile.teams
        assert (tile.depth, tile.warps) == (few.depth, few.warps)


@pytest.mark.parametrize("m", [64, 256])
def test_linear_of_many_tokens(m: int) -> None:
    """What `many` itself chooses, for small weights and for large ones."""
    x, norm = randn(m, 48, dtype=torch.bfloat16), randn(48, dtype=torch.bfloat16, seed=2)
    weight = matrix(40, 48, torch.bfloat16, False)
    expected = linear_twin(x, weight, norm=norm, eps=1e-5)
    check(linear(x, weight, norm=norm, eps=1e-5), expected, torch.bfloat16)
    large = many(Tile(16, 16, 4, 3), 4096, 4096, m)
    check(linear(x, weight, norm=norm, eps=1e-5, tile=large), expected, torch.bfloat16)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 17])
def test_gated(m: int, dtype: torch.dtype, fp8: bool) -> None:
    x, weight, norm = randn(m, 48, dtype=dtype), matrix(80, 48, dtype, fp8), randn(48, dtype=dtype, seed=2)
    for tile in (None, Tile(16, 16, 2, 3)):
        found = gated(x, weight, norm=norm, eps=1e-5, tile=tile)
        check(found, gated_twin(x, weight, norm=norm, eps=1e-5), dtype)
    check(gated(x, weight), gated_twin(x, weight), dtype)


def test_norm_of_large_and_small_rows() -> None:
    """The sum of squares is in fp32: no overflow, and one large value among small ones keeps its weight."""
    x = randn(4, 48, dtype=torch.bfloat16)
    x[1] *= 1e15
    x[2] *= 1e-12
    x[3, 7] = 3001.0
    weight, norm = matrix(40, 48, torch.bfloat16, False), randn(48, dtype=torch.bfloat16, seed=2)
    found, expected = linear(x, weight, norm=norm, eps=1e-30), linear_twin(x, weight, norm=norm, eps=1e-30)
    for row in range(4):
        check(found[row], expected[row], torch.bfloat16)


def attention_case(m: int, dtype: torch.dtype, rotary: int, weight: Weight, shape: tuple[int, ...]) -> dict[str, Any]:
    """shape: heads, kv_heads, qk_dim, v_dim. The cache is a layer's slice of storage with other strides."""
    heads, kv_heads, qk_dim, v_dim = shape
    rows = (heads + kv_heads) * qk_dim + kv_heads * v_dim
    k = (weight.data if isinstance(weight, BlockMatrix) else weight).shape[1]
    angles = randn(m, rotary // 2, seed=4)
    cos, sin = angles.cos().repeat(1, 2), angles.sin()
    return {
        "x": randn(m, k, dtype=dtype), "weight": weight, "norm": randn(k, dtype=dtype, seed=2), "eps": 1e-5,
        "bias": randn(rows, dtype=dtype, seed=3), "cos": cos, "sin": torch.cat([-sin, sin], 1), "heads": heads,
        "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim, "value_scale": 0.707,
        "k_cache": torch.zeros(2 * m + 3, kv_heads + 1, qk_dim, dtype=dtype, device=DEVICE)[:, 1:],
        "v_cache": torch.zeros(2, 2 * m + 3, kv_heads, v_dim, dtype=dtype, device=DEVICE)[1],
        "rows": torch.randperm(2 * m + 3, generator=torch.Generator().manual_seed(5))[:m].to(DEVICE),
    }  # fmt: skip


def compare_qkv(case: dict[str, Any], dtype: torch.dtype, tile: Tile | None = None) -> None:
    """Both sets of results, the caches whole: what was not to be written has stayed zero."""
    other = case | {name: case[name].clone() for name in ("k_cache", "v_cache")}
    q, expected = qkv(**case, tile=tile), qkv_twin(**other)
    check(q, expected, dtype)
    for name in ("k_cache", "v_cache"):
        check(case[name], other[name], dtype)
        assert torch.equal(case[name] == 0, other[name] == 0)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "rotary"), [(1, 12), (3, 4), (17, 8)])
def test_qkv(m: int, rotary: int, dtype: torch.dtype, fp8: bool) -> None:
    """Heads of 12 and values of 8: no multiple of a tile; all, a third and two thirds of a head rotate."""
    shape = (3, 2, 12, 8)
    case = attention_case(m, dtype, rotary, matrix(76, 48, dtype, fp8), shape)
    compare_qkv(case, dtype)
    compare_qkv(case | {"bias": None, "norm": None}, dtype, Tile(16, 16, 2, 2))


def test_qkv_with_fused_scales() -> None:
    """MiMo-V2-Flash's global layers: the blocks of scales restart within q, k and v."""
    heads, kv_heads, qk_dim, v_dim = 4, 2, 24, 16
    table = fused_rows(kv_heads, heads * qk_dim // kv_heads, qk_dim, v_dim, 16)
    assert int(table.max()) + 1 == kv_heads * sum(fused_sizes(heads * qk_dim // kv_heads, qk_dim, v_dim, 16))
    weight = quantised(randn(len(table), 64, seed=1) / 8, table, 16)
    compare_qkv(attention_case(3, torch.float32, 8, weight, (heads, kv_heads, qk_dim, v_dim)), torch.float32)


REAL = [  # rows, columns, FP8: the default model, MiMo-7B, MiMo-V2-Flash
    (960, 576, False), (3072, 576, False), (576, 1536, False), (6144, 4096, False), (4096, 4096, False),
    (22016, 4096, False), (4096, 11008, False), (14848, 4096, True), (4096, 16384, True),
]  # fmt: skip


MOST = 2048
PARTS = [(0, 1), (5, 6), (0, 3), (16, 32), (3, 20), (0, 33), (6, 70), (0, 100), (40, 256), (255, 256), (1, 300), (7, 600),
         (0, 1000), (1000, 2048), (2047, 2048)]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "k", "fp8"), REAL)
def test_real_shapes(rows: int, k: int, fp8: bool) -> None:
    """A row's result is right, and the same bits with any number of neighbours and at any place among them."""
    x, weight = randn(MOST, k, dtype=torch.bfloat16), matrix(rows, k, torch.bfloat16, fp8, 128)
    norm, residual = randn(k, dtype=torch.bfloat16, seed=2), randn(MOST, rows, dtype=torch.bfloat16, seed=3)
    full, half = linear(x, weight, norm=norm, eps=1e-6, residual=residual), gated(x, weight, norm=norm, eps=1e-6)
    plain = linear(x, weight)
    check(full, linear_twin(x, weight, norm=norm, eps=1e-6, residual=residual), torch.bfloat16)
    check(half, gated_twin(x, weight, norm=norm, eps=1e-6), torch.bfloat16)
    check(plain, linear_twin(x, weight), torch.bfloat16)
    for first, last in PARTS:
        part = slice(first, last)
        alone = linear(x[part], weight, norm=norm, eps=1e-6, residual=residual[part])
        assert torch.equal(alone, full[part]), (first, last)
        assert torch.equal(gated(x[part], weight, norm=norm, eps=1e-6), half[part]), (first, last)
        assert torch.equal(linear(x[part], weight), plain[part]), (first, last)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("teams", "tokens", "stages"),
    [(1, 64, 4), (1, 128, 4), (2, 64, 6), (2, 128, 6), (3, 64, 6), (3, 128, 4), (2, 256, 4)],
)
@pytest.mark.parametrize(("few", "k"), [(Tile(16, 64, 4, 5), 1344), (Tile(16, 128, 4, 4), 1408)])
def test_teams_add_up_as_few(few: Tile, k: int, teams: int, tokens: int, stages: int) -> None:
    """Slices of different lengths; neither rows nor tokens fill their last tile; more units than programs, and fewer."""
    tile = dataclasses.replace(few, teams=teams, tokens=tokens, stages=stages, registers={1: 0, 2: 240, 3: 160}[teams])
    options: dict[str, Any] = {"norm": randn(k, dtype=torch.bfloat16, seed=2), "eps": 1e-5}
    for rows, m in ((4112, 300), (176, 700)):
        x, weight = randn(m, k, dtype=torch.bfloat16), matrix(rows, k, torch.bfloat16, False)
        bias, residual = (randn(*shape, dtype=torch.bfloat16, seed=3) for shape in ((rows,), (m, rows)))
        added: dict[str, Any] = {"bias": bias, "residual": residual}
        for call in (
            functools.partial(linear, **options, out_dtype=torch.float32), functools.partial(linear, **added), gated,
            functools.partial(gated, **options), functools.partial(linear, **options, bias=bias),
        ):  # fmt: skip
            assert torch.equal(call(x, weight, tile=tile), call(x, weight, tile=few)), call
        apart = dataclasses.replace(tile, apart=True)
        for extras in (options, added):
            assert torch.equal(linear(x, weight, **extras, tile=apart), linear(x, weight, **extras, tile=few))


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "k", "fp8"), [(4096, 4096, False), (6144, 4096, False), (4096, 16384, True)])
@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, MOST - 1), count=st.integers(1, MOST))
def test_a_row_in_calls_of_any_size(rows: int, k: int, fp8: bool, first: int, count: int) -> None:
    x, weight, norm, full = whole_call(rows, k, fp8)
    part = slice(first, first + count)
    assert torch.equal(linear(x[part], weight, norm=norm, eps=1e-6), full[part])


@functools.cache
def whole_call(rows: int, k: int, fp8: bool) -> tuple[Tensor, Weight, Tensor, Tensor]:
    x, weight = randn(MOST, k, dtype=torch.bfloat16), matrix(rows, k, torch.bfloat16, fp8, 128)
    norm = randn(k, dtype=torch.bfloat16, seed=2)
    return x, weight, norm, linear(x, weight, norm=norm, eps=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("shape", "k", "rotary", "fp8"),
    [((9, 3, 64, 64), 576, 64, False), ((32, 8, 128, 128), 4096, 128, False), ((64, 8, 192, 128), 4096, 64, True)],
)
def test_real_attention(shape: tuple[int, ...], k: int, rotary: int, fp8: bool) -> None:
    heads, kv_heads, qk_dim, v_dim = shape
    rows = (heads + kv_heads) * qk_dim + kv_heads * v_dim
    case = attention_case(1000, torch.bfloat16, rotary, matrix(rows, k, torch.bfloat16, fp8, 128), shape)
    compare_qkv(case, torch.bfloat16)
    q, caches = qkv(**case), [case["k_cache"].clone(), case["v_cache"].clone()]
    for m in (1, 16, 33, 64, 100, 256, 257):
        few = case | {name: case[name][:m] for name in ("x", "cos", "sin", "rows")}
        few["k_cache"], few["v_cache"] = torch.zeros_like(caches[0]), torch.zeros_like(caches[1])
        assert torch.equal(qkv(**few), q[:m])
        for name, whole in zip(("k_cache", "v_cache"), caches, strict=True):
            assert torch.equal(few[name][few["rows"]], whole[few["rows"]])


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [8, 64, 300])
def test_chain_in_a_graph(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that start early wait for their inputs: a captured chain gives what single calls give, every time."""
    k, inner, layers = 576, 1536, 12
    weights = [(randn(2 * inner, k, seed=i) / 24, randn(k, inner, seed=-i - 1) / 39) for i in range(layers)]
    pairs = [(a.bfloat16(), b.bfloat16()) for a, b in weights]
    norm, x = torch.ones(k, dtype=torch.bfloat16, device=DEVICE), randn(rows, k, dtype=torch.bfloat16)

    def chain(y: Tensor) -> Tensor:
        for up, down in pairs:
            y = linear(gated(y, up, norm=norm, eps=1e-6), down, residual=y)
        return y

    with monkeypatch.context() as off:
        off.setattr("mtp_engine.kernels.dense.overlap", lambda rows: False)
        expected = chain(x)
    assert pdl()
    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
