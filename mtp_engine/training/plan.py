"""What a run will take, from the configurations alone."""

from dataclasses import dataclass
from typing import final

import torch

from mtp_engine.config import LayerConfig, ModelConfig, MTPConfig
from mtp_engine.models.build import MTPNames
from mtp_engine.models.tensors import main_tensors, mtp_tensors
from mtp_engine.training.trainer import TrainSettings

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (SXM)."""
_UTILISATION = 0.25  # of the peak; what training the default model's layers reached on an H100 (bench/LOG.md)
_LOGITS = 3 << 30  # bytes: two matrices of logits of about a GiB, and what their products need
_OPTIMISED = 2 + 4 + 4 + 2 + 4  # bytes per trained weight: leaf, master, momentum, gradient, gradient in fp32


@final
@dataclass(frozen=True)
class RunPlan:
    """parameters: trained; flops: per token of a row; memory: bytes on a device; seconds: None where the device's peak is
    not known."""

    parameters: int
    flops: int
    tokens: int
    memory: int
    seconds: float | None


def plan_run(
    model: ModelConfig, mtp: MTPConfig, settings: TrainSettings, world: int, device: str, ranks: int = 1
) -> RunPlan:
    """device: its name, as torch.cuda gives it. ranks: how many share the main model, if not each of `world` has it whole."""
    steps, step_tokens = settings.steps, settings.tokens
    trained = sum(t.size for t in mtp_tensors(model, mtp, MTPNames()) if t.is_parameter)
    stored = sum(t.size for t in main_tensors(model) if t.is_parameter)
    head, hidden = 2 * model.vocab_size * model.hidden_size, model.hidden_size
    draft_head = 2 * min(settings.objective.drafted or model.vocab_size, model.vocab_size) * hidden
    # forward of the main model and its head; forward and backward of the layers; their heads are frozen, so two products
    flops = sum(2 * _active(layer, hidden) for layer in model.layers) + head + 6 * trained + mtp.depth * 2 * draft_head
    wide = mtp.depth * (12 * hidden + 4 * mtp.layer.intermediate)  # activations kept, per token
    held = stored if ranks == 1 else stored // ranks + 2 * model.vocab_size * hidden  # embedding and head are whole
    memory = 2 * held + _OPTIMISED * trained + _LOGITS + 2 * wide * step_tokens // world
    peak = next((value for name, value in PEAK_BF16.items() if name in device), None)
    tokens = steps * step_tokens
    seconds = flops * tokens / (peak * _UTILISATION * world) if peak else None
    return RunPlan(trained, flops, tokens, memory, seconds)


def _active(layer: LayerConfig, hidden: int) -> int:
    """Weights that one token goes through."""
    a = layer.attention
    attention = hidden * ((a.heads + a.kv_heads) * a.qk_dim + (a.heads + a.kv_heads) * a.v_dim)
    return attention + 3 * hidden * layer.intermediate * (layer.moe.per_token if layer.moe else 1)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else device
