"""How the products of kernels/dense.py are cut up.

Every CTA also reads its tokens, from L2: per weight byte, 1 / rows + 1 / tokens of a tile, times the tokens there are. L2
gives not quite twice what memory gives, so from 32 tokens on tiles must grow (`many`), at the price of fewer CTAs.
"""

from dataclasses import dataclass, replace
from typing import Any, final

from mtp_engine.kernels.launch import SMS, cdiv, hopper, warpgroups

PREFETCH = 8 << 20  # bytes of a weight that are asked for before the input is there: 2.7 us at 3 TB/s


@final
@dataclass(frozen=True)
class Tile:
    """What a CTA takes at a time. `depth` and `warps` set the order of additions along K, the others do not."""

    rows: int  # of W
    depth: int  # of K, per warp and step; at least 64 where there is a bf16 norm, or its loads are not pipelined
    warps: int
    stages: int
    tokens: int = 0  # of x; 0: 16 or 32, see `_launch`
    wide: int = 0  # so many warps take one slice of K after another; 0: every warp its own
    registers: int = 0  # a thread may have; 0: as many as it wants
    boxes: bool = False  # of a wide one: the copy engine fetches x and W
    apart: bool = False  # of a wide one with boxes: a slice of K has CTAs of its own, and another kernel adds up
    teams: int = 0  # so many teams of four warps with 64 rows each: kernels/dense_teams.py; `rows` says nothing then


def tile_for(rows: int, k: int, itemsize: int, exact: bool) -> Tile:
    """The tile of a weight [rows, k]: 100 CTAs or more, all at once on the chip, with 5 MB or more in flight.

    itemsize: of the weight in bytes; exact: the product is in fp32, without tensor cores.
    """
    if exact:
        return Tile(16 if rows < 4096 else 32, 32, 4, 3)
    if rows < 3200:
        return Tile(16, 64, 4, 4 if k <= 768 else 6)
    if rows <= 8192:
        return Tile(16, 64, 4, 5) if rows > k else Tile(16 if itemsize == 2 else 32, 128, 4, 4)
    if itemsize == 1:
        return Tile(64, 64, 4, 4)
    return Tile(32, 64, 4, 3) if rows <= 65536 else Tile(64, 64, 2, 4)


def _sliced(rows: int, tokens: int, stages: int) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "stages": stages}


def _wide(rows: int, tokens: int, warps: int, stages: int, **more: int) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "wide": warps, "stages": stages, **more}


def _teams(teams: int, tokens: int, stages: int) -> dict[str, Any]:
    # registers of 65,536: what the first team and the warp that fetches leave
    return {"teams": teams, "tokens": tokens, "stages": stages, "registers": 240 if teams == 2 else 160}


_COUNTS = (32, 64, 128, 256)  # of tokens, at most
_SWEPT = (  # more rows of the weight than, as many columns as, and the fastest tile for each of _COUNTS (an H100, bench/LOG.md)
    (65536, 2048, (_sliced(32, 32, 3), _wide(128, 64, 4, 3, boxes=True), _wide(64, 128, 8, 4), _teams(2, 128, 6))),
    (8192, 2048, (_wide(64, 32, 4, 6), _wide(64, 64, 4, 3), _wide(128, 64, 4, 3, registers=168, boxes=True),
                  _teams(3, 128, 5))),
    (4096, 2048, (_wide(64, 32, 4, 8), _wide(64, 64, 4, 8), _wide(64, 128, 8, 6), _wide(128, 128, 8, 6))),
    (0, 8192, (_sliced(32, 32, 4), _wide(64, 64, 4, 6, apart=True), _wide(64, 64, 4, 8), _wide(128, 256, 8, 4, apart=True))),
    (3199, 2048, (_sliced(32, 32, 4), _sliced(32, 64, 3), _wide(64, 64, 4, 8), _wide(64, 128, 8, 6))),
    (0, 2048, (_wide(64, 32, 4, 6), _wide(64, 64, 4, 8), _wide(64, 64, 4, 8), _wide(64, 128, 8, 6))),  # parts of ranks
    (8192, 0, (_wide(64, 32, 4, 4), _wide(64, 64, 4, 4), _wide(128, 64, 4, 3, registers=168, boxes=True),
               _wide(128, 128, 8, 4))),
    (0, 0, (_wide(64, 32, 4, 4), _wide(64, 64, 4, 4), _wide(64, 128, 8, 4), _wide(128, 128, 8, 4))),
)  # fmt: skip


def many(tile: Tile, rows: int, k: int, m: int) -> Tile:
    """The tile of a bf16 weight [rows, k] for m tokens whose tile for few is `tile`: the same sums in the same order."""
    if m <= 16:
        return tile
    if rows * k * 2 <= PREFETCH:  # bound by latency: as many CTAs as there can be
        if m <= 32:
            return tile
        few = m <= 64 or (rows < 2048 and m <= 256)
        given = _sliced(32, 32, 3) if few else _wide(64, 64, 4, 4) if m <= 128 else _wide(64, 128, 8, 4)
    elif m <= _COUNTS[-1]:
        tiles = next(tiles for above, least, tiles in _SWEPT if rows > above and k >= least)
        given = next(each for each, most in zip(tiles, _COUNTS, strict=True) if m <= most)
    elif rows > 4096 >= k:
        given = _teams(3, 128, 5) if rows > 8192 else _teams(2, 128, 6)
    else:
        large, small = (cdiv(cdiv(rows, 128) * cdiv(m, tokens), SMS) for tokens in (256, 128))  # rounds of CTAs
        fewer = large <= 0.58 * small  # a small one takes 0.58 as long
        given = _wide(128, 256, 8, 3, boxes=True) if fewer else _wide(128, 128, 8, 4, boxes=True)
    # gate's rows and up's by eights, and something in each slice
    whole = warpgroups() and rows % 16 == k % tile.depth == 0 and k >= tile.depth * tile.warps
    if {"boxes", "apart", "teams"} & given.keys() and (not hopper() or k % 8 or ("teams" in given and not whole)):
        given = _wide(128, 128, 8, 4)
    return replace(tile, **given)


def many_fp8(tile: Tile, rows: int, k: int, m: int) -> Tile:
    """As `many`, of an FP8 weight. What is read again for each tile of tokens is also widened again."""
    if m <= 32:
        return tile
    if tile.depth > 64:
        return replace(tile, tokens=32 if m <= 128 else 64, stages=2)
    if rows * k <= PREFETCH and m <= 128:
        return replace(tile, tokens=64, stages=3)
    return replace(tile, rows=64, tokens=32, stages=3)
