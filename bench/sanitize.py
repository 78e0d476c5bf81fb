"""Kernels for Hopper in small shapes, for compute-sanitizer; that their bits are those of the kernels that have a twin in the
interpreter is checked along the way.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all python bench/sanitize.py
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import click
import torch
from common import ROOT, conditions, require_commit, run

from mtp_engine.errors import EngineError
from mtp_engine.kernels import moe
from mtp_engine.kernels.dense import gated, linear
from mtp_engine.kernels.dense_tiles import Tile
from mtp_engine.kernels.tree_attention import Plan, tree_attention

sys.path.append(str(ROOT / "tests"))

import test_chain_attention as chains
import test_dense as dense
import test_moe_kernels as experts
import test_tree_attention as trees

PAGE, FEW, WIDTH = 64, Tile(16, 64, 4, 5), 1344
BF16 = torch.bfloat16
TEAMS = [(1, 64, 4), (1, 128, 4), (2, 64, 6), (2, 128, 6), (3, 64, 6), (3, 128, 4), (2, 256, 4)]
"""Teams of warps, tokens of a tile, stages."""


def products() -> Iterator[str]:
    """Teams' products, dense in bf16."""
    w = dense.matrix(432, WIDTH, BF16, False)
    x, norm = dense.randn(300, WIDTH, dtype=BF16), dense.randn(WIDTH, dtype=BF16, seed=2)
    added = {"bias": dense.randn(432, dtype=BF16, seed=3), "residual": dense.randn(300, 432, dtype=BF16, seed=3)}
    calls: list[Any] = [
        partial(linear, norm=norm, eps=1e-5, out_dtype=torch.float32), partial(linear, **added), gated,
        partial(gated, norm=norm, eps=1e-5),
    ]  # fmt: skip
    for teams, tokens, stages in TEAMS:
        registers = {1: 0, 2: 240, 3: 160}[teams]
        tile = replace(FEW, teams=teams, tokens=tokens, stages=stages, registers=registers)
        for call in calls:
            assert torch.equal(call(x, w, tile=tile), call(x, w, tile=FEW))
        apart = partial(linear, norm=norm, eps=1e-5)
        assert torch.equal(apart(x, w, tile=replace(tile, apart=True)), apart(x, w, tile=FEW))
        yield f"{teams} teams, {tokens} tokens, {stages} stages"


def fp8() -> Iterator[str]:
    """Products of many rows in FP8."""
    for rows, k, count in ((512, 512, 300), (656, 1024, 70), (1536, 512, 2048)):
        x, w = dense.randn(count, k, dtype=BF16), dense.matrix(rows, k, BF16, True, 128)
        norm = {"norm": dense.randn(k, dtype=BF16, seed=2), "eps": 1e-6}
        assert torch.equal(linear(x[3:4], w, **norm), linear(x, w, **norm)[3:4])
        gated(x, w, **norm)
        yield f"{rows} x {k}, {count} rows"


def routed() -> Iterator[str]:
    """Router and experts."""
    for shape in (experts.Shape(64, 8, 1024, 256, 128), experts.Shape(256, 8, 512, 128, 128)):
        for kind in ("fp8", "bf16", "int4"):
            one, x = experts.layer(shape, kind), experts.rows(shape, 300)
            together = experts.ffn(x, one, shape)
            for tokens in (1, 5, 16, 33, 129):
                assert torch.equal(experts.ffn(x[:tokens].contiguous(), one, shape), together[:tokens])
            y, routing = moe.route(x, one.norm, experts.EPS, one.router, one.bias, shape.per_token, True, 1.0)
            moe.add_up(moe.products(moe.gate_up(y, routing, one.gate_up), routing, one.down), routing.weights, x)
            yield f"{shape.experts} of {kind}"


def attention() -> Iterator[str]:
    """Attention of chains with a warp that fetches: few and many requests, rows in one tile and in two."""
    trees.PAGE = PAGE
    for heads in (trees.Heads(128, 128, 32, 8), trees.Heads(64, 64, 9, 3), trees.Heads(64, 128, 16, 4)):
        for nodes in (1, 4, 16):
            for lengths in ([0, 1, 63, 64, 127, 130, 600], [61 + 7 * i for i in range(40)]):
                call = trees.make(heads, chains.straight(nodes, len(lengths)), lengths, dtype=BF16, seed=nodes)
                for splits in (trees.SPLITS, Plan.default(BF16, 1, heads.kv, heads.qk).splits):
                    call["plan"] = replace(call["plan"], splits=splits)
                    y = chains.chain(call)
                    assert torch.equal(y, chains.chain(call, teams=False))
                    assert torch.equal(y, tree_attention(**call))
            yield f"{heads.qk}/{heads.v}, {heads.query} over {heads.kv} heads, {nodes} nodes"


PARTS = {"products": products, "fp8": fp8, "experts": routed, "attention": attention}


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice([*PARTS]), default=[*PARTS], show_default=True)
def main(parts: tuple[str, ...]) -> None:
    commit = require_commit()
    if not torch.cuda.is_available():
        raise EngineError("compute-sanitizer looks at kernels on a GPU, and there is none here")
    begin, passed = time.perf_counter(), dict[str, int]()
    for part in parts:
        passed[part] = 0
        for what in PARTS[part]():
            torch.cuda.synchronize()
            passed[part] += 1
            click.echo(f"{time.perf_counter() - begin:6.1f} s  {part}: {what}", err=True)
    click.echo(json.dumps({"bench": "sanitize", "passed": passed, **conditions(commit, "cuda")}))


if __name__ == "__main__":
    run(main)
