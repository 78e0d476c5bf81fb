"""What a rank of bench/full_size.py checks besides its steps: the bits of exchanges, single layers, and texts."""

import random
import time
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from layers import measure_layers, seconds
from loops import build
from shapes import Model
from torch import Tensor

from mtp_engine import EngineConfig, SamplingParams
from mtp_engine.kernels.exchange import reduce
from mtp_engine.parallel.device import DeviceExchange
from mtp_engine.parallel.group import Group, joined, ordered_sum

_WIDTH = 4096
_ROWS = (1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 128, 200, 513, 2048)


def drawn(seed: int, *shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def exchanges(group: Group, device: torch.device, rounds: int) -> dict[str, Any]:
    """Sums, with and without residual, and gatherings against their twins over numbers that every rank can draw for all;
    while ranks come late by chance, at once and as graphs. How many were right of how many."""
    chance, late = random.Random(0), random.Random(group.shard.rank)
    tried, right = 0, 0
    for number in range(rounds):
        rows, join = chance.choice(_ROWS), chance.random() < 0.5
        parts = torch.stack([drawn(number * 16 + rank, rows, _WIDTH, device=device) for rank in range(group.size)])
        residual = drawn(number * 16 + 15, rows, _WIDTH, device=device).bfloat16() if number % 3 else None
        own = parts[group.shard.rank].contiguous()
        if late.random() < 0.2:
            torch.cuda.synchronize(device)
            time.sleep(0.005 * late.random())
        total = group.sum(own, torch.bfloat16, residual)
        few = own[:, : rows % 97 + 1].contiguous()
        got = group.join(few) if join else group.gather(few)
        expected = parts[:, :, : rows % 97 + 1]
        right += torch.equal(total, ordered_sum(parts, torch.bfloat16, residual))
        right += torch.equal(got, joined(expected) if join else expected)
        tried += 2
    replayed = _replayed(group, device, 200)
    return {"right": right, "of": tried, "replays_right": replayed, "of_replays": 200}


def _replayed(group: Group, device: torch.device, replays: int) -> int:
    """A graph of sums of several sizes, one made of the other, replayed; the twin works out the same at once."""
    x = [drawn(900 + rank, 64, _WIDTH, device=device) for rank in range(group.size)]
    held, residual = x[group.shard.rank].clone(), drawn(999, 64, _WIDTH, device=device).bfloat16()

    def chain(sums: Any, given: Tensor) -> Tensor:
        y = sums(given, residual)
        for rows in (64, 1, 16, 4):
            y = torch.cat([sums(given[:rows] * 0.5 + y[:rows].float(), y[:rows].contiguous()), y[rows:]])
        return y

    def ours(given: Tensor, added: Tensor) -> Tensor:
        return group.sum(given, torch.bfloat16, added)

    chain(ours, held)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        out = chain(ours, held)
    right = 0
    for number in range(replays):
        scale = 1.0 + number / 7
        held.copy_(x[group.shard.rank] * scale)
        graph.replay()
        if number % 50 == 0:
            scaled = [each * scale for each in x]
            expected = ordered_sum(torch.stack(scaled), torch.bfloat16, residual)
            for rows in (64, 1, 16, 4):
                parts = torch.stack([each[:rows] * 0.5 + expected[:rows].float() for each in scaled])
                expected = torch.cat([ordered_sum(parts, torch.bfloat16, expected[:rows]), expected[rows:]])
            kept = expected, out.clone()
            right += 50 * torch.equal(*kept)
    return right


def kernels(group: Group, device: torch.device) -> dict[str, Any]:
    """Microseconds of one of 20 back to back in a graph: both ways to sum, by the size of the result in bf16, and a gathering
    of one number of 64 bits a row."""
    assert isinstance(group.exchange, DeviceExchange), "of GPUs"
    boxes, found = group.exchange.boxes, dict[str, Any]()
    residual = torch.zeros(256, _WIDTH, dtype=torch.bfloat16, device=device)
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        partial = torch.randn(rows, _WIDTH, device=device)

        def sums(few: int, x: Tensor = partial) -> None:
            for _ in range(20):
                reduce(x, boxes, torch.bfloat16, residual[: len(x)], few=few)

        timed = {"few": 1 << 30, "many": 0} if rows > 1 else {"few": 1 << 30}
        found[f"{rows * 8} KB"] = {
            name: round(seconds(lambda few=few: sums(few), device) / 20 * 1e6, 2) for name, few in timed.items()
        }
    large = torch.randn(2048, _WIDTH, device=device)
    found["16 MB"] = round(seconds(lambda: reduce(large, boxes, torch.bfloat16), device) * 1e6, 1)
    numbers = torch.zeros(16, dtype=torch.int64, device=device)

    def gathers() -> None:
        for _ in range(20):
            group.gather(numbers)

    found["gather of 16 numbers"] = round(seconds(gathers, device) / 20 * 1e6, 2)
    return found


def layers(model: Model, config: EngineConfig, bandwidth: float) -> dict[str, Any]:
    """Sliding MoE layers, sums over ranks included, against this rank's bytes; at 1, 4, 16 and 64 rows."""
    return {"layers": measure_layers(model, config, (1, 4, 16, 64), 1024, bandwidth)}


def texts(model: Model, config: EngineConfig, prompts: int, tokens: int) -> dict[str, Any]:
    """Drafted texts that are plain decoding's, token for token, of requests of random tokens that join and leave, every other
    one at temperature 0.8; and whether all ranks said the same."""
    chance, vocab = random.Random(0), model.main.vocab_size
    asked = [[chance.randrange(vocab) for _ in range(chance.randrange(3, 90))] for _ in range(prompts)]
    params = [
        SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        for number in range(prompts)
    ]
    found, ways = dict[str, list[list[int]]](), {"plain": (None, 1), "chain:3": ("chain:3", 8), "tree:7": ("tree:7", 8)}
    for name, (tree, batch) in ways.items():
        bench = build(model, tree, max(batch, 8 if name == "plain" else 1), 256, replace(config, prefill_chunk=64))
        requests = [bench.loop.add(prompt, each) for prompt, each in zip(asked, params, strict=True)]
        while bench.loop.requests:
            bench.loop.step()
        found[name] = [request.output for request in requests]
        errors = [request.error for request in requests if request.error]
        assert not errors, errors[0]
    plain = found.pop("plain")
    equal = {name: sum(a == b for a, b in zip(said, plain, strict=True)) for name, said in found.items()}
    sums = torch.tensor([crc32(repr((plain, found)).encode())], device=model.main.embedding.device)
    return {"as_plain": equal, "of": prompts, "ranks_alike": len(model.main.group.gather(sums).unique()) == 1}
