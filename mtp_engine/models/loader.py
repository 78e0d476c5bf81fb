"""From a folder to a model: which family it is, its main model, and its MTP layers."""

from pathlib import Path
from typing import Any

import torch

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig, RopeConfig
from mtp_engine.errors import EngineError
from mtp_engine.kernels.linear import Linear
from mtp_engine.models import llama
from mtp_engine.models.checkpoint import Checkpoint, read_json
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import RMSNorm
from mtp_engine.models.mtp import MTPLayer, MTPModule
from mtp_engine.protocols import Progress

_FAMILIES = {"LlamaForCausalLM": llama}


def read_config(folder: Path) -> ModelConfig:
    """config.json of a main model. Raises EngineError for a family the engine does not know."""
    raw = read_json(folder / "config.json")
    names = raw.get("architectures") or ["(none named)"]
    if names[0] not in _FAMILIES:
        raise EngineError(
            f"{folder / 'config.json'}: architecture {names[0]} is not supported; known: {', '.join(_FAMILIES)}"
        )
    config: ModelConfig = _FAMILIES[names[0]].parse(raw)
    return config


def load_main(folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress) -> Decoder:
    """The main model of a Hugging Face folder."""
    return llama.build(Checkpoint(folder, dtype, device), read_config(folder), progress)


def read_mtp_config(folder: Path) -> MTPConfig:
    """The `mtp` object of our config.json beside a set of MTP layers; its keys are the fields of MTPConfig."""
    raw: dict[str, Any] = read_json(folder / "config.json").get("mtp", {})
    try:
        attention = dict(raw["attention"])
        rope = RopeConfig(attention.pop("rope_dim"), float(attention.pop("rope_theta")))
        layer = LayerConfig(AttentionConfig(rope=rope, **attention), raw["intermediate_size"])
        switches = {key: raw[key] for key in ("depth", "chained", "reused", "hidden", "concat", "own_norm")}
        return MTPConfig(layer=layer, **switches)
    except KeyError as missing:
        raise EngineError(f"{folder / 'config.json'}: the field mtp.{missing.args[0]} is missing") from None
    except TypeError as error:
        raise EngineError(f"{folder / 'config.json'}: mtp.attention is wrong: {error}") from None


def load_mtp(folder: Path, main: Decoder, draft_vocab: int, progress: Progress) -> MTPModule:
    """MTP layers with the hub's names (model.mtp.layers.{k}...), sharing the main model's embedding and head.

    draft_vocab: how many of the most frequent tokens they may propose (`draft_token_ids` lists them); 0 means all.
    """
    config = read_mtp_config(folder)
    hidden, eps = main.config.hidden_size, main.config.norm_eps
    checkpoint = Checkpoint(folder, main.embedding.dtype, main.embedding.device)

    def layer(k: int) -> MTPLayer:
        prefix = f"model.mtp.layers.{k}"
        progress("loading MTP layers", k + 1, config.depth)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(checkpoint.get(f"{prefix}.{name}.weight", hidden), eps)

        return MTPLayer(
            embedding_norm=norm("enorm"),
            hidden_norm=norm("hnorm"),
            projection=Linear(checkpoint.get(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)),
            block=llama.block(checkpoint, prefix, config.layer, hidden, eps, "pre_mlp_layernorm"),
            final_norm=norm("final_layernorm") if config.own_norm else main.norm,
        )

    draft_ids = _draft_ids(checkpoint, main, draft_vocab)
    full = len(draft_ids) == main.config.vocab_size
    return MTPModule(
        config=config,
        layers=[layer(k) for k in range(1 if config.reused else config.depth)],
        embedding=main.embedding,
        main_norm=main.norm,
        head=main.head if full else Linear(main.head_weight[draft_ids]),
        draft_ids=draft_ids,
    )


def _draft_ids(checkpoint: Checkpoint, main: Decoder, wanted: int) -> torch.Tensor:
    """The tokens the draft head covers, [n] int64. Without a list of frequent tokens, all of them."""
    vocab = main.config.vocab_size
    if wanted and "draft_token_ids" in checkpoint:
        ids = checkpoint.raw("draft_token_ids", checkpoint.shape("draft_token_ids"))[:wanted].long()
        if not bool(((ids >= 0) & (ids < vocab)).all()):
            raise EngineError(f"{checkpoint.folder}: draft_token_ids names tokens outside the vocabulary of {vocab}")
        return ids.to(checkpoint.device)
    return torch.arange(vocab, device=checkpoint.device)
