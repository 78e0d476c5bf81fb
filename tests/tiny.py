"""Tiny random models on disk, and slow dense references that share no code with the engine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_engine.cache import Pages
from mtp_engine.config import SamplingParams
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter
from mtp_engine.protocols import Drafter
from mtp_engine.runtime.request import Members, Request
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.batch import Batch, Chunk, Extent, SamplingBatch
from mtp_engine.sampling.stops import Ends, Trail
from mtp_engine.tree import VerifyResult

AnyMTP = TypeVar("AnyMTP", MTPDrafter, LazyMTPDrafter)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "hidden_act": "silu",
}
MTP = {
    "depth": 3,
    "chained": True,
    "reused": False,
    "hidden": "pre_norm",
    "concat": "embedding_first",
    "own_norm": True,
    "intermediate_size": 48,
    "attention": {
        "heads": 4, "kv_heads": 2, "qk_dim": 8, "v_dim": 8, "rope_dim": 8, "rope_theta": 10000.0, "window": 7, "sink": False,
    },
}  # fmt: skip


def _block(prefix: str, c: dict[str, Any], hidden: int, ffn_norm: str, draw: Any) -> dict[str, Tensor]:
    heads, kv, qk, v, wide = c["heads"], c["kv_heads"], c["qk_dim"], c["v_dim"], c["intermediate"]
    shapes = {
        "self_attn.q_proj": (heads * qk, hidden), "self_attn.k_proj": (kv * qk, hidden), "self_attn.v_proj": (kv * v, hidden),
        "self_attn.o_proj": (hidden, heads * v), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    weights = {f"{prefix}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    for name in ("input_layernorm", ffn_norm):
        weights[f"{prefix}.{name}.weight"] = 1 + 0.3 * draw(hidden)
    return weights


def write_llama(folder: Path, seed: int = 0, scale: float = 0.3, **changes: Any) -> Path:
    """A random Llama in hub format; large weights, so that its choices are far from ties."""
    config = {**LLAMA, **changes}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden, dim = config["hidden_size"], config["head_dim"]
    c = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"], "qk_dim": dim, "v_dim": dim,
         "intermediate": config["intermediate_size"]}  # fmt: skip
    weights = {"model.embed_tokens.weight": draw(config["vocab_size"], hidden), "model.norm.weight": 1 + draw(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        weights |= _block(f"model.layers.{i}", c, hidden, "post_attention_layernorm", draw)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_mtp(folder: Path, seed: int = 1, scale: float = 0.3, width: int = 32, **changes: Any) -> Path:
    """Random MTP layers with the hub's names."""
    config = {**MTP, **changes}
    a = config["attention"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights: dict[str, Tensor] = {}
    for k in range(1 if config["reused"] else config["depth"]):
        prefix = f"model.mtp.layers.{k}"
        weights |= _block(prefix, {**a, "intermediate": config["intermediate_size"]}, width, "pre_mlp_layernorm", draw)
        weights[f"{prefix}.eh_proj.weight"] = draw(width, 2 * width)
        for name in ("enorm", "hnorm", *(["final_layernorm"] if config["own_norm"] else [])):
            weights[f"{prefix}.{name}.weight"] = 1 + draw(width)
        if a.get("sink"):
            weights[f"{prefix}.self_attn.attention_sink_bias"] = draw(a["heads"]) * 3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "mtp.safetensors")
    (folder / "config.json").write_text(json.dumps({"mtp": config}))
    return folder


def batch_of(requests: list[Request]) -> Batch:
    """The requests as one step sees them, from what they have emitted so far."""
    members = Members.build(requests, torch.device("cpu"))
    lengths = torch.tensor([request.length for request in requests])
    tokens = torch.tensor([(request.output or request.prompt)[-1] for request in requests])
    return Batch(members.slots, tokens, lengths, int(lengths.max()), members.sampling, members.guide)


def new_request(slot: int, prompt: list[int]) -> Request:
    """A request that runs in `slot` and never ends."""
    stats = GenerationStats()
    request = Request(prompt, SamplingParams(), 0, lambda: Trail(Ends(1000, frozenset())), stats, limit=1000)
    request.slot = slot
    return request


def attached(drafter: AnyMTP, slots: int = 3, tokens: int = 600, page_size: int = 8, behind: int = 0) -> AnyMTP:
    """With pages of its own, all of which its slots have in equal parts."""
    pages = Pages(slots=slots, tokens=tokens, page_size=page_size, device=torch.device("cpu"))
    drafter.attach(pages, behind)
    for slot in range(slots):
        assert pages.reserve(slot, tokens // slots // page_size * page_size)
    return drafter


def show_prompt(drafter: Drafter, slot: int, prompt: list[int], hidden: Tensor, chunk: int = 1 << 20) -> None:
    """What the loop shows a drafter of a prompt, chunk by chunk. hidden: [len(prompt) - 1, H]."""
    last = len(prompt) - 1
    for start in range(0, last, chunk):
        stop = min(start + chunk, last)
        if drafter.prompts:
            index = torch.arange(start, stop)
            at = torch.full_like(index, slot), index, torch.full_like(index, stop)
            states = drafter.prompts.keep(*at, hidden[None, start:stop])
            if entries := drafter.prompts.outline([Chunk(slot, start, stop, last - stop, prompt[stop], 0)]):
                extent = Extent(entries[0][-1], stop + 1)
                drafter.prompts.read(torch.tensor(entries).T, extent, torch.tensor(prompt[start:stop]), states)
            continue
        sampling = SamplingBatch.build([SamplingParams()], [0], torch.device("cpu"))
        at = torch.tensor([slot]), torch.tensor([prompt[start]]), torch.tensor([start])
        tokens, path = torch.tensor([prompt[start + 1 : stop + 1]]), torch.arange(stop - start)[None]
        result = VerifyResult(path, tokens, torch.tensor([stop - start]))
        drafter.observe(Batch(*at, stop, sampling, prompt_left=last - stop), result, hidden[None, start:stop])


class Sums:
    """A constraint that looks at the whole answer: a token may follow if the sum of all is not one less than 3n."""

    def __init__(self, vocab: int = 61) -> None:
        self.vocab = vocab
        self.answer: list[int] = []
        self.ahead = 0  # tokens of it that were only expected so far

    def allows(self, text: Sequence[int], token: int) -> bool:
        return (sum(text) + token) % 3 != 2

    def mask(self, path: tuple[int, ...]) -> Tensor:
        bits = [0] * (-(-self.vocab // 32))
        for token in range(self.vocab):
            if self.allows([*self.answer, *path], token):
                bits[token // 32] |= 1 << (token % 32)
        return torch.tensor([word - (1 << 32) if word >> 31 else word for word in bits], dtype=torch.int32)

    complete = True

    def forced(self, path: tuple[int, ...]) -> list[int]:
        return []

    def fits(self, path: tuple[int, ...], tokens: Sequence[int]) -> int:
        for number, token in enumerate(tokens):
            if token < 0 or not self.allows([*self.answer, *path, *tokens[:number]], token):
                return number
        return len(tokens)

    def expect(self, tokens: Sequence[int]) -> None:
        self.answer += tokens[self.ahead :]
        self.ahead = len(tokens)

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            known = len(self.answer) - self.ahead
            assert self.allows(self.answer[:known], token)
            self.answer[known:] = self.answer[known:] or [token]
            assert self.answer[known] == token
            self.ahead = max(0, self.ahead - 1)


class Recites(Sums):
    """Two tokens of every five must be certain ones, and are known before."""

    def allows(self, text: Sequence[int], token: int) -> bool:
        return token == self.certain(len(text)) if len(text) % 5 < 2 else super().allows(text, token)

    def certain(self, place: int) -> int:
        return 1 + place % 7

    def forced(self, path: tuple[int, ...]) -> list[int]:
        said = len(self.answer) + len(path)
        return [self.certain(said + ahead) for ahead in range(max(0, 2 - said % 5))]


@dataclass
class DenseMTP:
    """MTP levels as their definition says: every row at once, no cache, no tree. Sequences are 1-dimensional."""

    main: dict[str, Tensor]
    weights: dict[str, Tensor]
    config: dict[str, Any]
    eps: float = 1e-5

    @classmethod
    def load(cls, main: Path, mtp: Path) -> "DenseMTP":
        config = json.loads((mtp / "config.json").read_text())["mtp"]
        return cls(load_file(main / "model.safetensors"), load_file(mtp / "mtp.safetensors"), config)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * weight

    def _rope(self, x: Tensor, positions: Tensor) -> Tensor:  # x [rows, heads, dim]
        a = self.config["attention"]
        dim = a["rope_dim"]
        angles = positions[:, None] / a["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    def _layer(self, index: int, tokens: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        w, a = (
            {n.split(f"layers.{index}.")[1]: t for n, t in self.weights.items() if f".{index}." in n},
            self.config["attention"],
        )
        halves = [
            self._norm(self.main["model.embed_tokens.weight"][tokens], w["enorm.weight"]),
            self._norm(hidden, w["hnorm.weight"]),
        ]
        if self.config["concat"] == "hidden_first":
            halves = halves[::-1]
        x = torch.cat(halves, -1) @ w["eh_proj.weight"].T
        y = self._norm(x, w["input_layernorm.weight"])
        rows, heads, kv = len(x), a["heads"], a["kv_heads"]
        q = self._rope((y @ w["self_attn.q_proj.weight"].T).view(rows, heads, -1), positions)
        k = self._rope((y @ w["self_attn.k_proj.weight"].T).view(rows, kv, -1), positions).repeat_interleave(
            heads // kv, 1
        )
        v = (y @ w["self_attn.v_proj.weight"].T).view(rows, kv, -1).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * a["qk_dim"] ** -0.5
        distance = positions[:, None] - positions[None, :]
        seen = distance >= 0 if a["window"] is None else (distance >= 0) & (distance < a["window"])
        scores = scores.masked_fill(~seen, -float("inf"))
        if a["sink"]:
            scores = torch.cat([scores, w["self_attn.attention_sink_bias"].view(-1, 1, 1).expand(-1, rows, 1)], -1)
        v = v * a.get("value_scale", 1.0)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :rows], v).flatten(1)
        x = x + attended @ w["self_attn.o_proj.weight"].T
        y = self._norm(x, w["pre_mlp_layernorm.weight"])
        gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
        return x + (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T

    def next_logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits for the token after `tokens`, from the level that a draft would use.

        tokens: x[0..n+k], the committed ones and k drafts on a path; hidden: main model's pre-norm h[0..n-1].
        """
        known = len(hidden)
        level = len(tokens) - 1 - known
        h = self._norm(hidden, self.main["model.norm.weight"]) if self.config["hidden"] == "post_norm" else hidden
        if self.config["reused"]:
            outputs = [self._layer(0, tokens[1 : known + 1], h, torch.arange(known))[-1:]]
            for i in range(level):
                rows = torch.cat([h, *outputs])
                outputs.append(self._layer(0, tokens[1 : known + 2 + i], rows, torch.arange(known + 1 + i))[-1:])
            output = outputs[-1]
        else:
            output = h
            for k in range(level + 1):
                output = self._layer(
                    k, tokens[1 + k : 1 + k + known], output if self.config["chained"] else h, torch.arange(known)
                )
        index = 0 if self.config["reused"] else level
        norm = (
            self.weights[f"model.mtp.layers.{index}.final_layernorm.weight"]
            if self.config["own_norm"]
            else self.main["model.norm.weight"]
        )
        return self._norm(output[-1], norm) @ self.main.get("lm_head.weight", self.main["model.embed_tokens.weight"]).T
