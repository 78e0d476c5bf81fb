"""What experts in 4 bits cost in quality: mimo-nano, beside the same with its experts as they are stored.

    python bench/experts.py --prompts 48

nats: the divergence of the next token's distribution, by texts that the stored model draws at T = 1 from held-out prompts of
its own domain: how much less probable they are, per token, with 95% of an interval; for groups of several sizes. Accepted
length: chain:3, T = 0, loops left out, each model of its own answers.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import torch
from common import SOME, conditions, require_commit, run
from int8 import read
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.hub import hub
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.int4 import dequantise, quantise
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.moe import MoE
from mtp_engine.training.evaluate import outside_loops
from mtp_engine.training.nano.prompts import is_held_out, prompts


def rounded(model: Decoder, group: int) -> Decoder:
    """With experts that have been in 4 bits, in fp32 again."""

    def stack(experts: ExpertStack) -> PlainStack:
        assert isinstance(experts, PlainStack)
        return PlainStack(dequantise(*quantise(experts.weight, group)))

    def changed(block: Any) -> Any:
        ffn = block.ffn
        if not isinstance(ffn, MoE):
            return block
        return replace(block, ffn=replace(ffn, gate_up=stack(ffn.gate_up), down=stack(ffn.down)))

    return replace(model, blocks=[changed(block) for block in model.blocks])


def losses(model: Decoder, engine: Engine, texts: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Nats of every token of the answers, and whether it is the likeliest one. [2, tokens]."""
    found = []
    for prompt, answer in texts:
        tokens = torch.tensor(prompt + answer)
        logits = model.logits(read(model, engine, TorchAttention, tokens[:-1], 64))[len(prompt) - 1 :].log_softmax(-1)
        found.append(torch.stack([-logits.gather(1, tokens[len(prompt) :, None])[:, 0], logits.argmax(-1).float()]))
    return torch.cat(found, 1)


@click.command()
@click.option("--prompts", "count", default=48, show_default=True, type=SOME)
@click.option("--tokens", default=96, show_default=True, type=SOME)
@click.option("--threads", default=2, show_default=True, type=SOME)
def main(count: int, tokens: int, threads: int) -> None:
    commit = require_commit()
    config = EngineConfig(device="cpu", dtype="fp32", threads=threads, dequantize=True, max_context=512,
                          tree=TreeShape.parse("chain:3"))  # fmt: skip
    chats = [[{"role": "user", "content": p}] for p in prompts(100 * count, 7) if is_held_out(p)][:count]
    result: dict[str, Any] = {"bench": "experts", "model": hub.NANO, "prompts": len(chats), "groups": {}}
    with torch.inference_mode(), Engine.load(hub.NANO, config) as engine:
        drawn = engine.generate(chats, SamplingParams(max_tokens=tokens, temperature=1.0, seed=0))
        texts = [(engine.encode(chat), answer.token_ids) for chat, answer in zip(chats, drawn, strict=True)]
        before = losses(engine.model, engine, texts)
        result |= {"tokens": before.shape[1], "nats_as_stored": round(before[0].mean().item(), 4)}
        for group in (32, 64, 128):
            after = losses(rounded(engine.model, group), engine, texts)
            more = after[0] - before[0]
            result["groups"][group] = {
                "bits": 4 + 16 / group, "nats_more": round(more.mean().item(), 4),
                "interval": round(1.96 * more.std().item() / len(more) ** 0.5, 4),
                "likeliest_same": round((after[1] == before[1]).float().mean().item(), 4),
            }  # fmt: skip
        params = SamplingParams(max_tokens=tokens)
        result["accepted_length"] = {"as stored": round(outside_loops(engine, chats, params)[0], 3)}
    with torch.inference_mode(), Engine.load(hub.NANO, replace(config, dequantize=False, experts="int4")) as engine:
        result["accepted_length"]["int4"] = round(outside_loops(engine, chats, params)[0], 3)
    click.echo(json.dumps(result | conditions(commit)))


if __name__ == "__main__":
    run(main)
