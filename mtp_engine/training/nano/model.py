"""MiMo-V2-Flash in small, under training: its configuration, its first values, and one step's loss and gradients.

The model is put together by models.build as for inference. Of the mixtures of experts only the computation is another.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtp_engine.config import ModelConfig, MTPConfig
from mtp_engine.kernels.experts import PlainStack, route
from mtp_engine.models import build, mimo_v2_flash
from mtp_engine.models.export import fp8_settings
from mtp_engine.models.fields import Fields
from mtp_engine.models.layers import Block
from mtp_engine.models.moe import MoE
from mtp_engine.training.attention import sequence_hidden
from mtp_engine.training.heads import build_heads
from mtp_engine.training.objective import layer_outputs
from mtp_engine.training.trainable import TrainableWeights, named_noise

MTP_LAYERS = 3
_BLOCK = 32  # keys have 1.5 blocks of rows, values 1: as in the real model, a block of a global layer spans both
_LOGITS = 1 << 27  # that exist at a time
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN knows no such shapes


def nano_fields(vocab: int, eos: int, pad: int, **changes: Any) -> dict[str, Any]:
    """config.json of mimo-nano: the real one's structure, every kind of layer and every trap, at 15 M parameters."""
    return {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "hidden_act": "silu",
        "vocab_size": vocab, "tie_word_embeddings": False, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": "bfloat16", "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 256,
        "num_hidden_layers": 6, "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 48, "v_head_dim": 32,
        "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 48, "swa_v_head_dim": 32,
        "partial_rotary_factor": 0.334, "rope_theta": 5000000, "swa_rope_theta": 10000,
        "sliding_window": 128, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707, "attention_bias": False, "layernorm_epsilon": 1e-5,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": None, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": None, "max_position_embeddings": 2048, "quantization_config": fp8_settings(_BLOCK),
        **changes,
    }  # fmt: skip


def parse(raw: Mapping[str, Any]) -> tuple[ModelConfig, MTPConfig]:
    """The model that such a config.json describes, and its MTP layers."""
    names = [f"{mimo_v2_flash.MTP_NAMES.prefix}.{k}." for k in range(MTP_LAYERS)]
    mtp = mimo_v2_flash.parse_mtp(Fields(raw), names)
    assert mtp is not None
    return mimo_v2_flash.parse(Fields(raw)), mtp


@final
@dataclass(frozen=True)
class FirstValues:
    """What training begins with; depends on seed and name only. layers: of the main model, whose outputs add up."""

    layers: int
    seed: int = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith("bias"):  # the sinks, and what balances the experts
            return torch.zeros(shape)
        values = named_noise(name, shape, self.seed)
        if "embed_tokens" in name:
            return values * 0.3
        if "lm_head" in name:
            return values * 0.01
        gain = (2 * self.layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
        return values * (gain / math.sqrt(shape[1]))


@final
@dataclass(frozen=True)
class DenseMoE:
    """models.moe.MoE for training: every expert sees every token, and those that were not chosen count nothing.

    That is E / k times the FFN's arithmetic, but two large products and no gathering, sorting or waiting for the host.
    """

    moe: MoE
    load: Tensor  # [E] fp32, tokens per expert; added up

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        moe, c, flat = self.moe, self.moe.config, x.flatten(0, -2)
        weights, chosen = route(flat, moe.router, moe.bias, c.per_token, c.normalise, c.scale)
        shares = weights.new_zeros(len(flat), c.experts).scatter(1, chosen, weights)  # [T, E]
        with torch.no_grad():
            self.load.add_((shares > 0).sum(0))
        gate_up, down = cast(PlainStack, moe.gate_up).weight, cast(PlainStack, moe.down).weight
        wide = down.shape[2]
        gate = F.linear(flat, gate_up[:, :wide].flatten(0, 1)).view(-1, c.experts, wide)
        up = F.linear(flat, gate_up[:, wide:].flatten(0, 1)).view(-1, c.experts, wide)
        inner = F.silu(gate) * up * shares.to(x.dtype)[..., None]
        return F.linear(inner.flatten(1), down.transpose(0, 1).flatten(1)).view(x.shape)


@final
class NanoModel:
    """The main model and its MTP layers, all trainable."""

    def __init__(self, raw: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.config, self.mtp = parse(raw)
        self.weights = TrainableWeights(FirstValues(len(self.config.layers), seed), dtype, device)
        main = build.decoder(self.weights, self.config, lambda *_: None)
        self.loads = torch.zeros(
            sum(layer.moe is not None for layer in self.config.layers), _experts(self.config), device=device
        )
        self._mixtures: list[MoE] = []
        self.main = replace(main, blocks=[self._trained(cast(Block, block)) for block in main.blocks])
        self.module = build_heads(self.mtp, self.main, self.weights)

    def _trained(self, block: Block) -> Block:
        if not isinstance(block.ffn, MoE):
            return block
        self._mixtures.append(block.ffn)
        return replace(block, ffn=DenseMoE(block.ffn, self.loads[len(self._mixtures) - 1]))

    def step(self, tokens: Tensor, depth: int, mtp_weight: float) -> Tensor:
        """Leaves the gradients of L_main + mtp_weight * mean of the MTP layers' losses (DeepSeek-V3 report, eq. 25).

        tokens: [B, L] int64; depth: how many of the MTP layers take part. Returns [1 + depth] fp32, the mean
        cross-entropies in nats; the last tokens of a row have nothing to predict.
        """
        outputs = self._outputs(tokens, depth)
        leaves = [each.detach().flatten(0, 1) for each in outputs]
        grads, losses = [], []
        head = self.main.head_weight
        head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for ahead, leaf in enumerate(leaves, 1):
            labels = F.pad(tokens[:, ahead:], (0, ahead), value=-1).flatten()
            count = len(tokens) * (tokens.shape[1] - ahead)
            weight = 1.0 if ahead == 1 else mtp_weight / depth
            loss, grad = cross_entropy(leaf, head.detach(), labels, weight / count, head_grad)
            losses.append(loss / count)
            grads.append(grad.view_as(outputs[0]))
        torch.autograd.backward(outputs, grads)
        head.grad = head_grad.to(head.dtype)
        return torch.stack(losses)

    def _outputs(self, tokens: Tensor, depth: int) -> list[Tensor]:
        """Of the main model and of `depth` MTP layers, after their final norms, [B, L, H] each. Row j of layer k joins
        token j + 1 + k with the main model's hidden state j."""
        with sdpa_kernel(_BACKENDS):
            hidden, positions = sequence_hidden(self.main, tokens)
            states = self.module.main_hidden(hidden)
            return [self.main.norm(hidden), *layer_outputs(self.module, tokens, states, positions, depth)]

    @torch.no_grad()
    def balance(self, rate: float) -> Tensor:
        """Experts that had more than their share get a lower bias, the others a higher one (DeepSeek-V3 report, section
        2.1.2: no gradient, no auxiliary loss). Returns the load since the last call, [layers, E], as shares."""
        means = self.loads.mean(1, keepdim=True)
        for moe, move in zip(self._mixtures, rate * (means - self.loads).sign(), strict=True):
            moe.bias.add_(move)
        shares = self.loads / self.loads.sum(1, keepdim=True).clamp(min=1)
        self.loads.zero_()
        return shares

    @torch.no_grad()
    def replicate(self) -> None:
        """The first MTP layer's weights become those of the others, too."""
        prefix, named = mimo_v2_flash.MTP_NAMES.prefix, self.weights.named()
        for name, master in named.items():
            if name.startswith(f"{prefix}.0."):
                for k in range(1, MTP_LAYERS):
                    named[name.replace(f"{prefix}.0.", f"{prefix}.{k}.", 1)].copy_(master)
        self.weights.refresh()


@torch.no_grad()
def cross_entropy(x: Tensor, head: Tensor, labels: Tensor, scale: float, head_grad: Tensor) -> tuple[Tensor, Tensor]:
    """sum over rows of -log softmax(x head^T)[label], and its gradient by x, times `scale`; head's is added to head_grad.

    x: [T, H]; head: [V, H]; labels: [T] int64, -1 where a row does not count; head_grad: [V, H] fp32. Few rows' logits
    exist at a time.
    """
    total, grad = torch.zeros((), device=x.device), torch.empty_like(x)
    rows = max(1, _LOGITS // len(head))
    for start in range(0, len(x), rows):
        part, label = x[start : start + rows], labels[start : start + rows, None]
        counted, index = label >= 0, label.clamp(min=0)
        logits = part @ head.T
        p = F.softmax(logits, -1, dtype=torch.float32)
        total -= (p.gather(1, index).clamp(min=1e-37).log() * counted).sum()
        p.scatter_add_(1, index, p.new_full(index.shape, -1.0))
        torch.mul(p, counted * scale, out=logits)  # rounds to the dtype of training
        grad[start : start + rows] = logits @ head
        head_grad += logits.T @ part
    return total, grad


def _experts(config: ModelConfig) -> int:
    return next((layer.moe.experts for layer in config.layers if layer.moe), 0)
