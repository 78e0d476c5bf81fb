"""A main model and MTP layers that run as graphs, with the interfaces of models.decoder.Decoder and models.mtp.MTPModule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, final

import torch
from torch import Tensor

from mtp_engine.config import LayerConfig, ModelConfig, MTPConfig
from mtp_engine.models.onnx.build import groups
from mtp_engine.models.onnx.session import Session, Stack
from mtp_engine.protocols import Attention


class StepKeys(Attention, Protocol):
    """Attention of a step that a graph runs: attention.graph.GraphAttention."""

    def past(self, group: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def write(self, group: int, k: Tensor, v: Tensor, first: int = 0) -> None: ...


@final
@dataclass(frozen=True, repr=False)
class GraphDecoder:
    """A TargetModel. Its hidden states are rotated (fold.turn), which GraphMTP expects; no row of what it returns depends on
    another row."""

    config: ModelConfig
    embedding: Tensor  # [V, H], rotated
    body: Session
    head: Session
    features: tuple[int, ...] = ()  # layers whose outputs `forward` returns too

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions: [B, N] int64 -> [B, N, (F + 1) * H]: F features, then the residual stream before the norm."""
        width = (len(self.features) + 1) * self.config.hidden_size
        inputs = {"x": self.embedding[tokens.reshape(1, -1)], "positions": positions.reshape(1, -1)}
        hidden = _run(self.body, self.config.layers, inputs, ("hidden", width), cast(StepKeys, attention))
        return hidden.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H], or what `forward` gave -> [..., V] fp32."""
        return _head(self.head, hidden[..., -self.config.hidden_size :], self.vocab_size)


@final
@dataclass(frozen=True, repr=False)
class GraphMTP:
    """An MTPModule; its hidden states are rotated as the main model's are."""

    config: MTPConfig
    layers: Sequence[Session]
    heads: Sequence[Session]
    embedding: Tensor  # [V, H], rotated
    draft_ids: Tensor  # [n] int64, token of each head row
    mix: Session | None  # what the layers read, if it is not the hidden state itself

    def main_hidden(self, hidden: Tensor) -> Tensor:
        """What the main model's `forward` gave [..., (F + 1) * H] -> [..., H]."""
        if self.mix is None:
            return hidden
        size = self.embedding.shape[1]
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        return self.mix({"hidden": flat}, {"mixed": (1, flat.shape[1], size)})[0].view(*hidden.shape[:-1], size)

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """As MTPModule.forward: [B, N, H] each, positions [B, N] int64 -> [B, N, H]."""
        index = 0 if self.config.reused else level
        inputs = {
            "embedded": embedded.flatten(0, 1)[None],
            "hidden": hidden.flatten(0, 1)[None],
            "positions": positions.clamp(min=0).reshape(1, -1),  # negative ones are of rows that nobody sees
        }
        output = ("hidden_out", hidden.shape[-1])
        keys = cast(StepKeys, attention)
        return _run(self.layers[index], [self.config.layer], inputs, output, keys, index).view(hidden.shape)

    def logits(self, level: int, output: Tensor) -> Tensor:
        """[..., H] -> [..., n] fp32 over the draft vocabulary."""
        return _head(self.heads[0 if self.config.reused else level], output, len(self.draft_ids))


def _run(
    session: Session, layers: Sequence[LayerConfig], inputs: dict[str, Tensor], output: tuple[str, int], keys: StepKeys,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """One call for all layers. first: the member of the cache group that the first layer is."""
    name, width = output
    rows = inputs["positions"].shape[1]
    outputs: dict[str, tuple[int, ...]] = {name: (1, rows, width)}
    kinds, stacks = groups(layers), []
    for kind, members in kinds.items():
        k, v, inputs[f"mask{kind}"] = keys.past(kind)
        inputs[f"sizes{kind}"] = torch.tensor([k.shape[1], rows])
        for side, past in (("k", k), ("v", v)):
            stacks.append(Stack([f"{side}{layer}" for layer in members], past[first : first + len(members)]))
            outputs[f"new_{side}{kind}"] = (len(members) * rows, *past.shape[2:])
    hidden, *new = session(inputs, outputs, stacks)
    for kind in kinds:
        k, v = (value.view(-1, rows, *value.shape[1:]) for value in new[2 * kind : 2 * kind + 2])
        keys.write(kind, k, v, first)
    return hidden


def _head(session: Session, hidden: Tensor, size: int) -> Tensor:
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    return session({"hidden": flat}, {"logits": (1, flat.shape[1], size)})[0].view(*hidden.shape[:-1], size)
