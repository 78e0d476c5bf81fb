"""MiMo-7B: Qwen2's logits, and one MTP layer that serves every depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mimo import Run, load, read_all
from tiny import attached, batch_of, new_request, show_prompt
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.drafters.mtp import MTPDrafter
from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import TINY, make_tiny

TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("mimo7b") / "m", family="mimo")


def qwen2(folder: Path) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    ]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    config = Qwen2Config(**{name: raw[name] for name in names}, rope_parameters=rope, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config).eval()
    weights = {name: t.float() for name, t in read_all(folder).items() if "mtp_layers" not in name}
    model.load_state_dict(weights)
    return model


def test_logits_equal_qwen2(folder: Path) -> None:
    with torch.inference_mode():
        theirs = qwen2(folder)(TOKENS[None]).logits[0]
    torch.testing.assert_close(Run(load(folder), 48).logits(TOKENS), theirs, rtol=1e-4, atol=1e-4)
    run = Run(load(folder), 48)
    pieces = [run.logits(TOKENS[:20]), *(run.logits(token[None]) for token in TOKENS[20:])]
    torch.testing.assert_close(torch.cat(pieces), theirs, rtol=1e-4, atol=1e-4)


def dense_first_draft(folder: Path, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits of the MTP layer's last row, with nothing of the engine: row j reads h[j] after the final norm, then
    E[x[j+1]]. hidden: pre-norm h[0..n-1] of tokens x[0..n]."""
    w = {name.removeprefix("model.mtp_layers.0."): tensor.float() for name, tensor in read_all(folder).items()}
    norm = lambda x, name: F.rms_norm(x, (64,), w[f"{name}.weight"], 1e-5)  # noqa: E731
    rows = len(hidden)
    embedded = norm(w["model.embed_tokens.weight"][tokens[1:]], "token_layernorm")
    x = torch.cat([norm(norm(hidden, "model.norm"), "hidden_layernorm"), embedded], -1) @ w["input_proj.weight"].T
    y = norm(x, "input_layernorm")

    def heads(name: str, turned: bool) -> Tensor:
        z = (y @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]).view(rows, -1, 8)
        if turned:
            angles = torch.arange(rows)[:, None] / 640000 ** (torch.arange(0, 8, 2) / 8)
            cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
            z = z * cos + torch.cat([-z[..., 4:], z[..., :4]], -1) * sin
        return z.transpose(0, 1).repeat_interleave(8 // z.shape[1], 0)

    attended = F.scaled_dot_product_attention(heads("q", True), heads("k", True), heads("v", False), is_causal=True)
    x = x + attended.transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm")
    y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return norm(x + y @ w["mlp.down_proj.weight"].T, "final_layernorm")[-1] @ w["lm_head.weight"].T


def test_draft_equals_a_dense_computation(folder: Path) -> None:
    main = load(folder)
    module = loader.load_mtp(folder, main, 0, lambda *_: None)
    drafter = attached(MTPDrafter(module, TreeShape.parse("3"), slots=1), slots=1)
    hidden = Run(main, 48)(TOKENS[:-1])
    show_prompt(drafter, 0, TOKENS.tolist(), hidden, 7)
    tree = drafter.draft(batch_of([new_request(0, TOKENS.tolist())]))
    expected = dense_first_draft(folder, TOKENS, hidden)
    assert tree.tokens[0, 1:].tolist() == expected.topk(3).indices.tolist()


def test_configuration(folder: Path) -> None:
    config = loader.read_mtp_config(folder)
    assert (config.reused, config.chained, config.depth) == (True, False, 3)
    assert (config.concat, config.hidden, config.layer.attention.bias) == ("hidden_first", "post_norm", True)
    assert len(loader.load_mtp(folder, load(folder), 0, lambda *_: None).layers) == 1


def test_two_layers_are_a_chain(tmp_path: Path) -> None:
    config = loader.read_mtp_config(make_tiny(tmp_path / "m", family="mimo", mtp_layers=2))
    assert (config.reused, config.chained, config.depth) == (False, True, 2)


@pytest.mark.parametrize("tree", ["chain:3", "chain:5", "2x2x1", "tree:6"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_lossless(folder: Path, tree: str, temperature: float) -> None:
    prompts = [[5, 6, 7], list(range(50, 90))]
    params = [SamplingParams(60, temperature, seed=seed, ignore_eos=True) for seed in range(2)]
    config = EngineConfig(threads=1, max_batch=2, max_context=256, tree=TreeShape.parse(tree))
    engine = Engine.load(str(folder), config)
    answers = engine.generate(prompts, params)
    assert [a.token_ids for a in answers] == [engine.plain(p, s).output for p, s in zip(prompts, params, strict=True)]
    assert max(a.stats.mean_accepted_length for a in answers) > 1.1


@pytest.mark.parametrize("field", ["attention_bias", "num_key_value_heads", "rope_theta", "rms_norm_eps", "hidden_act"])
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    raw = {key: value for key, value in TINY["mimo"].items() if key != field}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=rf"config\.json: {field} is missing"):
        loader.read_config(tmp_path)
