"""What a model is: its layers, and the MTP layers that may come with it."""

from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding over the first `dim` dimensions of a head, half-split layout.

    `scaling` is None, ("linear", factor) or ("llama3", factor, low_freq_factor, high_freq_factor, original_context).
    """

    dim: int
    theta: float
    scaling: tuple[str | float, ...] | None = None


@final
@dataclass(frozen=True)
class AttentionConfig:
    """One attention layer. `window` counts the keys a query sees, itself included; None means all."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    rope: RopeConfig
    window: int | None = None
    sink: bool = False
    value_scale: float = 1.0
    bias: bool = False

    @property
    def kv_size(self) -> int:
        """Numbers of a token's keys and values together."""
        return self.kv_heads * (self.qk_dim + self.v_dim)


@final
@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each token goes through `per_token` of `experts`, chosen by sigmoid scores plus a bias.

    The weights are the scores without the bias, divided by their sum if `normalise`, times `scale`.
    int4: the engine holds the experts in 4 bits, however they are stored.
    """

    experts: int
    per_token: int
    normalise: bool = True
    scale: float = 1.0
    int4: bool = False


@final
@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: attention and a gated FFN of width `intermediate`, or a mixture of such FFNs."""

    attention: AttentionConfig
    intermediate: int
    moe: MoEConfig | None = None


@final
@dataclass(frozen=True)
class MTPConfig:
    """The MTP layers and the switches in which published families differ.

    chained: layer k > 0 reads layer k-1's output, not the main model's hidden state.
    reused: one layer serves every depth (its rows then move one position per depth).
    hidden: the main model's hidden state is taken before or after its final norm.
    concat: order of the two halves that eh_proj reads.
    own_norm: each layer ends in its own norm; otherwise the main model's final norm is shared.
    features: layers of the main model whose outputs are mixed into the hidden state that the MTP layers read (the idea of
    EAGLE-3, Li et al. 2025, arXiv 2503.01840); none in any published MTP checkpoint.
    """

    depth: int
    layer: LayerConfig
    chained: bool = False
    reused: bool = False
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
    concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    own_norm: bool = True
    features: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class ModelConfig:
    """A main model and, if it has any, its MTP layers. fp8_block: rows and columns that share a scale, where weights
    are stored as FP8."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tied_head: bool
    max_context: int
    eos_token_ids: tuple[int, ...]
    mtp: MTPConfig | None = None
    fp8_block: int | None = None
