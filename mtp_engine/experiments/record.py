"""Recording: decode plainly, and note what the MTP layers would draft at every position.

Two things are noted, from which `ask` answers for any tree.

The true path. Row n of layer d, which a step computes anyway once token n is known, is the very row that a step begun d
tokens earlier would have computed for its node at depth d, had it drafted the true tokens (drafters/mtp.py). So at every
position each layer's distribution over the next token is known as it would be along the true text: the true token's
rank and probability, within each of several draft vocabularies.

The rivals. Whether tree:N holds a true token depends on the scores of all other nodes. So the layers grow a wide tree in
every step, which holds all nodes of tree:1 to tree:63. It is not verified: the step is that of plain decoding, of one node.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor

from mtp_engine.assemble import make_loop
from mtp_engine.config import EngineConfig
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, TorchDraftOps
from mtp_engine.drafters.expand import BEAM, DraftOps
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import Encoded
from mtp_engine.experiments.rows import Done, request_row
from mtp_engine.experiments.wide import ROOM, WIDEST, WideOps, in_columns
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention, Verifier
from mtp_engine.runtime.step import EagerRunner
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.sampler import gumbel, truncate
from mtp_engine.training.data import in_loop
from mtp_engine.tree import DraftTree, VerifyResult

_SMALLEST_VOCAB = 1024


def vocabularies(ids: Tensor) -> list[int]:
    """Sizes of draft vocabularies that a recording answers for: powers of two, and that of `ids` [n], the tokens that the
    layers may propose, the most frequent first. Where they are in no such order, only their own."""
    tokens = len(ids)
    if bool((ids == torch.arange(tokens, device=ids.device)).all()):
        return [tokens]
    return [*(size for size in (_SMALLEST_VOCAB << power for power in range(20)) if size < tokens), tokens]


def record(engine: Engine, case: Case, prompts: Sequence[Encoded]) -> Iterator[Done]:
    """Yield each request as it ends: its row, and a row per position. Raises EngineError where one fails."""
    recorder, running = recording(engine)
    params = [case.params(each.index) for each in prompts]
    for chunk in running.stream([each.tokens for each in prompts], params):
        if answer := chunk.finished:
            own = prompts[chunk.index]
            if answer.error:
                raise EngineError(f"prompt {own.item.id} of {case.prompts} failed: {answer.error}")
            notes = recorder.take(answer.stats.seed)[: len(answer.token_ids)]
            assert len(notes) == len(answer.token_ids)
            loops = in_loop(answer.token_ids)
            for at, (note, token) in enumerate(zip(notes, answer.token_ids, strict=True)):
                note |= {"prompt": own.index, "at": at, "token": token, "loop": loops[at]}
            steps = [{"emitted": 1, "loop": loop} for loop in loops]
            about = {"vocabularies": vocabularies(recorder.probe.draft_ids), "missing": recorder.ops.missing}
            yield request_row(own, answer, steps) | about, notes


def recording(engine: Engine) -> tuple["Recorder", Engine]:
    """An engine over the same weights that decodes plainly, with its MTP layers watched. Raises EngineError for layers
    that cannot be."""
    drafter = engine.loop.work.drafter
    if not isinstance(drafter, (MTPDrafter, LazyMTPDrafter)):
        raise EngineError("only MTP layers are recorded: choose a model that has some, or --mtp")
    if drafter.module.config.reused:
        raise EngineError("these MTP layers serve several depths each, which cannot be recorded: use --mode run")
    config = replace(engine.config, tree=WIDEST, prefix_cache=False, verifier="match", candidates="auto")
    probe = Probe(drafter.module)
    on_cpu = drafter.module.draft_ids.device.type == "cpu"
    ops = WideOps(drafter.module.config.depth, engine.backend.ops("noise") if on_cpu else TorchDraftOps("noise"))
    wide = watched(engine, probe, config, ops, ROOM)
    backend = replace(engine.backend, runner=lambda slots: EagerRunner, in_flight=1)
    loop = make_loop(engine.model, wide, config, backend, slots=config.max_batch, tokenizer=engine.tokenizer)
    recorder = Recorder(loop.work.verifier, probe, ops)
    loop.work.verifier = recorder
    return recorder, Engine(engine.model, loop, engine.tokenizer, config, engine.backend)


def watched(
    engine: Engine, module: Any, config: EngineConfig, ops: DraftOps | None = None, beam: int = BEAM
) -> MTPDrafter:
    """A drafter that runs an engine's layers one by one, so that what wraps them as `module` sees every row."""
    assert config.tree is not None
    backend = engine.backend
    return MTPDrafter(
        cast(MTPModule, module), config.tree, slots=config.max_batch + 1, beam=beam, attention=backend.attention,
        ops=ops or backend.ops("noise"), ring_page=backend.ring_page, ring_rows=backend.ring_rows,
    )  # fmt: skip


@final
@dataclass
class Probe:
    """MTP layers (an MTPModule) that keep what they said of the newest committed row of a step."""

    module: MTPModule
    outputs: dict[int, Tensor] = field(default_factory=dict)  # by level, [B, H]

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def layers(self) -> Any:
        return self.module.layers

    @property
    def embedding(self) -> Tensor:
        return self.module.embedding

    @property
    def draft_ids(self) -> Tensor:
        return self.module.draft_ids

    def main_hidden(self, hidden: Tensor) -> Tensor:
        return self.module.main_hidden(hidden)

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """A step of plain decoding has one committed row, its first."""
        output = self.module.forward(level, embedded, hidden, positions, attention)
        self.outputs[level] = output[:, 0]
        return output

    def logits(self, level: int, output: Tensor) -> Tensor:
        return self.module.logits(level, output)

    def along_the_text(self, first: Tensor) -> Tensor:
        """Each layer's logits after the newest token, [B, depth, n] fp32. first: those of the first layer, [B, n], from
        which the tree was begun."""
        deeper = [self.module.logits(level, self.outputs[level]) for level in sorted(self.outputs) if level]
        return torch.stack([first, *deeper], 1)


@final
@dataclass
class Recorder:
    """The verifier of a recording: it verifies as `inner` does and notes each request's position, by the request's seed."""

    inner: Verifier
    probe: Probe
    ops: WideOps
    notes: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def take(self, seed: int) -> list[dict[str, Any]]:
        """What was noted of a request, which is over."""
        return self.notes.pop(seed, [])

    @cached_property
    def columns(self) -> Tensor:
        """[V] int64: where a token stands in the drafter's scores, -1 where it does not."""
        ids = self.probe.draft_ids
        columns = torch.full((len(self.probe.embedding),), -1, device=ids.device)
        columns[ids] = torch.arange(len(ids), device=ids.device)
        return columns

    @property
    def picks(self) -> bool:
        return False  # it is asked once a step

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        result = self.inner.verify(tree, logits, batch)
        if self.ops.tree is not None:
            self._note(logits[:, 0], result.tokens[:, 0], batch)
            self.ops.tree = None
        return result

    def _note(self, logits: Tensor, tokens: Tensor, batch: Batch) -> None:
        """logits: [B, V] of the main model; tokens: [B], what it chose."""
        tree = self.ops.tree
        assert tree is not None
        drafted = self.probe.along_the_text(self.ops.first)
        noise, best, q = true_ranks(drafted, self.columns[tokens], batch, self.probe.draft_ids)
        p, entropy = true_probability(logits, tokens, batch)
        values = {
            "rank": noise.flatten(1).int(), "rank_best": best.flatten(1).int(), "q": q.flatten(1), "p": p,
            "entropy": entropy, **in_columns(tree, drafted.shape[1]),
        }  # fmt: skip
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        for row, seed in enumerate(batch.sampling.seed.tolist()):
            self.notes.setdefault(seed, []).append({name: array[row] for name, array in arrays.items()})


def true_ranks(drafted: Tensor, columns: Tensor, batch: Batch, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the drafter ranks the true token: at every depth and within every vocabulary of `vocabularies`.

    drafted: [B, D, n] fp32 logits; columns: [B] where the true token stands in them, or -1. Returns three of [B, D, W]:
    its rank by probability and noise, its rank by probability, and the log of its probability at the request's
    temperature (at 1 where that is 0). Rank -1 and -inf: it is not in the vocabulary.
    """
    sizes = vocabularies(ids)
    temperature = batch.sampling.temperature.view(-1, 1, 1)
    known = columns.clamp(min=0).view(-1, 1, 1).expand(-1, drafted.shape[1], 1)
    inside = columns.view(-1, 1, 1) < torch.tensor(sizes, device=columns.device)
    inside = (inside & (columns >= 0).view(-1, 1, 1)).expand(-1, drafted.shape[1], -1)
    scaled = torch.where(temperature > 0, drafted / temperature.clamp(min=1e-6), drafted)

    def rank(scores: Tensor) -> Tensor:
        better = scores > scores.gather(-1, known)
        counts = torch.stack([part.sum(-1) for part in torch.split(better, _gaps(sizes), -1)], -1).cumsum(-1)
        return torch.where(inside, counts, -1)

    parts = torch.stack([part.logsumexp(-1) for part in torch.split(scaled, _gaps(sizes), -1)], -1)
    q = torch.where(inside, scaled.gather(-1, known) - parts.logcumsumexp(-1), -float("inf"))
    best = rank(scaled)
    if batch.sampling.greedy:
        return best, best, q
    noise = gumbel(batch.sampling.seed, (batch.lengths + 1)[:, None], ids) * (temperature > 0)
    return rank(scaled + noise), best, q


def _gaps(sizes: Sequence[int]) -> list[int]:
    return [size - before for before, size in zip([0, *sizes], sizes, strict=False)]


def true_probability(logits: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the main model, [B] each: the log of the true token's probability at the request's temperature (at 1 where that
    is 0), truncation included, and the entropy in nats of its distribution at temperature 1."""
    temperature = batch.sampling.temperature[:, None]
    whole = logits.log_softmax(-1)
    entropy = -(whole.exp() * whole).sum(-1)
    if batch.sampling.greedy:
        return whole.gather(1, tokens[:, None])[:, 0], entropy
    allowed = truncate(logits[:, None], batch.sampling)[:, 0]
    scaled = (torch.where(temperature > 0, allowed / temperature.clamp(min=1e-6), logits)).log_softmax(-1)
    return scaled.gather(1, tokens[:, None])[:, 0], entropy
