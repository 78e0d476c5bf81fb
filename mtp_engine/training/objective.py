"""What MTP layers are trained for: at every depth, the frozen main model's next-token distribution."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.kernels import distill_reference
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Head
from mtp_engine.models.mtp import MTPModule
from mtp_engine.training.attention import SequenceAttention, sequence_hidden
from mtp_engine.training.data import ANSWER
from mtp_engine.training.processes import mean_over_processes

_LOGIT_BYTES = 1 << 30  # of one matrix of logits


@final
@dataclass(frozen=True)
class Objective:
    """sum over depths k of decay^k * (KL(p || q_k) - acceptance * log sum(min(p, breadth * q_k))), p at `temperature`.

    breadth: candidates a node of the trees to be drafted; with more than one, less likely ones count too.

    A row counts for what the path before it is worth: `reach` mixes 1 with the probability that all drafts of smaller
    depth were accepted, since otherwise the row is never used. The latter is the drafter's own, as in training on its own
    outputs (HASS, EAGLE-3), without the cost of drafting. given, looped: what tokens that the model did not write, and
    those in its loops, count beside the answers' 1. drafted: q is over so many tokens, the head's first; 0 is all.
    """

    decay: float = 0.8
    temperature: float = 1.0
    acceptance: float = 0.0
    reach: float = 0.0
    breadth: float = 1.0
    given: float = 0.1
    looped: float = 0.1
    drafted: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(value := getattr(self, field.name)):
                raise EngineError(f"the objective's {field.name} is {value}; it must be a finite number")

    def token_weights(self, kinds: Tensor) -> Tensor:
        """kinds: [B, L] uint8 of training.data -> [B, L] fp32."""
        values = torch.tensor([0.0, self.given, 1.0, self.looped], device=kinds.device)
        return values[kinds.long()]


@final
@dataclass(frozen=True)
class Measures:
    """Sums over rows of depth k, [depth, 4] fp32: weighted loss, answer rows, of these the accepted and the matching ones
    with all smaller depths too. `length` makes accepted lengths of them."""

    sums: Tensor
    weight: Tensor  # [depth], sum of the rows' weights

    @property
    def loss(self) -> Tensor:
        """[depth] mean loss."""
        return self.sums[:, 0] / self.weight.clamp(min=1e-9)

    def length(self, *, greedy: bool) -> Tensor:
        """Expected accepted length of a chain, bonus token included, when drafting anew at every answer token; [depth],
        of the first k + 1 layers. greedy: drafts are accepted if they are the main model's first choice."""
        column = 3 if greedy else 2
        return 1 + (self.sums[:, column] / self.sums[:, 1].clamp(min=1)).cumsum(0)


@final
@dataclass(frozen=True)
class Lesson:
    """A batch and what the main model says of it, from which any number of sets of layers may learn."""

    tokens: Tensor  # [B, L] int64
    kinds: Tensor  # [B, L] uint8
    positions: Tensor  # [B, L] int64
    features: tuple[int, ...]  # layers whose outputs stand before the last one's in `hidden`
    hidden: Tensor  # [B, L, (F + 1) * H]
    normed: Tensor  # [B, L, H], after the final norm
    head: Tensor  # [V, H]; of the first objective.drafted rows' tokens the layers learn to draft
    logits: Tensor | None = None  # [B, L, V], where they are kept

    def states(self, features: Sequence[int]) -> Tensor:
        """`hidden` for layers that read these features only. [B, L, (f + 1) * H]."""
        return chosen(self.hidden, self.features, features)

    def target(self, span: slice) -> Tensor:
        """The main model's logits for some of the sequences, [b * L, V]."""
        found = F.linear(self.normed[span], self.head) if self.logits is None else self.logits[span]
        return found.view(-1, len(self.head))


def chosen(hidden: Tensor, there: Sequence[int], features: Sequence[int]) -> Tensor:
    """Of hidden states with features `there` before them those with `features`. [..., (F + 1) * H] -> [..., (f + 1) * H]."""
    if tuple(features) == tuple(there):
        return hidden
    parts = hidden.chunk(len(there) + 1, -1)
    return torch.cat([*(parts[there.index(each)] for each in features), parts[-1]], -1)


@torch.no_grad()
def teach(
    main: Decoder, tokens: Tensor, kinds: Tensor, head: Tensor, features: tuple[int, ...] = (), *,
    hidden: Tensor | None = None, keep: bool = False,
) -> Lesson:  # fmt: skip
    """tokens: [B, L] int64; kinds: [B, L] uint8; head: the main model's, its tokens in any order. hidden: the model's states
    with these features, if they are known. keep: the logits, of 2 B L V bytes, for several sets of layers."""
    if hidden is None:
        hidden = sequence_hidden(replace(main, features=features), tokens)[0]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    normed = main.norm(hidden[..., -main.config.hidden_size :].contiguous())
    logits = F.linear(normed, head) if keep else None
    return Lesson(tokens, kinds, positions, features, hidden, normed, head, logits)


def distill_step(
    module: MTPModule, lesson: Lesson, objective: Objective, mean: Callable[[Tensor], Tensor] = mean_over_processes, *,
    scale: float = 1.0,
) -> Measures:  # fmt: skip
    """Forward and backward over rows of tokens; the gradients are added to the module's parameters, times `scale`.
    mean: of a tensor over all processes.

    Row j of depth k predicts token j + k + 2, of which the main model's distribution stands at position j + k + 1. Logits of
    the layers exist for a few sequences at a time only.
    """
    tokens, head = lesson.tokens, lesson.head
    batch, length = tokens.shape
    states = module.main_hidden(lesson.states(module.config.features))
    normed = layer_outputs(module, tokens, states, lesson.positions)
    leaves = [each.detach() for each in normed]
    grads = [torch.empty_like(each) for each in leaves]
    weights = objective.token_weights(lesson.kinds)
    total = mean(weights[:, 2:].sum()).clamp(min=1.0)
    depth = len(normed)
    sums, mass = torch.zeros(depth, 4, device=tokens.device), torch.zeros(depth, device=tokens.device)
    rows = max(1, _LOGIT_BYTES // (length * len(head) * head.element_size()))
    loss_of = _loss_for(tokens.device)
    with torch.no_grad():
        for start in range(0, batch, rows):
            span = slice(start, start + rows)
            part = _Part(
                head[: objective.drafted or None], [x[span] for x in leaves], [g[span] for g in grads], weights[span],
                lesson.kinds[span] == ANSWER,
            )  # fmt: skip
            part.run(lesson.target(span), objective, scale / total, loss_of, sums, mass)
    torch.autograd.backward(normed, grads)
    return Measures(sums, mass)


def layer_outputs(
    module: MTPModule, tokens: Tensor, states: Tensor, positions: Tensor, depth: int | None = None
) -> list[Tensor]:
    """Per depth the layer's output after its final norm, [B, L, H]. The last k + 1 rows of depth k lack their token.

    depth: how many of the layers run; None is all.
    """
    config = module.config
    attention = SequenceAttention([config.layer.attention.window] * config.depth)
    passed, normed = states, []
    for k, layer in enumerate(module.layers[:depth]):
        later = F.pad(tokens[:, k + 1 :], (0, k + 1))
        out = module.forward(k, F.embedding(later, module.embedding), passed, positions, attention)
        passed = out if config.chained else states
        normed.append(cast(Head, layer.head).norm(out))
    return normed


@final
@dataclass(frozen=True)
class _Loss:
    """The functions of kernels.distill, or of its twin."""

    survey: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    distill: Callable[..., tuple[Tensor, Tensor, Tensor]]


@final
@dataclass(frozen=True)
class _Part:
    """Some sequences of a batch, whose logits fit in memory."""

    head: Tensor  # [n, H]
    leaves: Sequence[Tensor]  # per depth [b, L, H]
    grads: Sequence[Tensor]  # filled
    weights: Tensor  # [b, L] of tokens
    answers: Tensor  # [b, L] bool

    def run(
        self, target: Tensor, objective: Objective, scale: Tensor, loss_of: _Loss, sums: Tensor, mass: Tensor
    ) -> None:
        """target: [b * L, V], the main model's logits."""
        length = self.weights.shape[1]
        known = loss_of.survey(target, objective.temperature)
        path = matched = torch.ones_like(self.weights)  # per row: all smaller depths were accepted, or matched
        for k, (leaf, grad) in enumerate(zip(self.leaves, self.grads, strict=True)):
            shift = k + 1
            ahead = shift + 1  # the token that a row predicts
            counted = F.pad(self.weights[:, ahead:], (0, ahead)) * objective.decay**k
            row = counted * (1 - objective.reach + objective.reach * path)
            draft = F.linear(leaf, self.head).view(-1, len(self.head))
            settings = {name: getattr(objective, name) for name in ("temperature", "acceptance", "breadth")}
            figures = loss_of.distill(draft, target, known, (row * scale).flatten(), shift, **settings)
            loss, accept, match = (x.view(-1, length) for x in figures)
            grad.copy_((draft @ self.head).view(leaf.shape))
            path, matched = path * accept, matched * match
            answer = F.pad(self.answers[:, ahead:], (0, ahead))
            kept = [(loss * row).sum(), answer.sum(), (path * answer).sum(), (matched * answer).sum()]
            sums[k] += torch.stack([x.float() for x in kept])
            mass[k] += row.sum()


def _loss_for(device: torch.device) -> _Loss:
    if device.type != "cuda":
        return _Loss(distill_reference.survey, distill_reference.distill)
    from mtp_engine.kernels.distill import distill, survey

    return _Loss(survey, distill)
