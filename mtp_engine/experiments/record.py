"""Recording: decode plainly, and note what the MTP layers would draft at every position.

Two things are noted, from which `ask` answers for any tree.

The true path. Row n of layer d, which a step computes anyway once token n is known, is the very row that a step begun d
tokens earlier would have computed for its node at depth d, had it drafted the true tokens (drafters/mtp.py). So at every
position each layer's distribution over the next token is known as it would be along the true text: the true token's
rank and probability, within each of several draft vocabularies.

The rivals. Whether tree:N holds a true token depends on the scores of all other nodes. So the layers grow a wide tree in
every step, which holds the nodes of tree:1 to tree:32, and the best others beside them. It is not verified: the step is
that of plain decoding, of one node.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor

from mtp_engine.assemble import make_loop
from mtp_engine.config import TreeShape
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, TorchDraftOps
from mtp_engine.drafters.candidates import Candidates
from mtp_engine.drafters.expand import Growth, Level, LevelRows, level_sizes
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import Encoded
from mtp_engine.experiments.rows import Done, request_row
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention, Verifier
from mtp_engine.runtime.step import EagerRunner
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.sampler import gumbel, truncate
from mtp_engine.training.data import in_loop
from mtp_engine.tree import DraftTree, VerifyResult

WIDEST = TreeShape(best=63)  # what the layers grow
EXACT = 32  # the nodes of tree:1 to tree:32 are all among it
BEAM = 8  # of MTPDrafter
_SMALLEST_VOCAB = 1024


def levels_of(tree: TreeShape, depth: int) -> list[tuple[int, int]]:
    """How a tree grows: of each level how many candidates a node has, and how many nodes are kept."""
    return level_sizes(tree, depth, BEAM)


def growths(depth: int) -> list[list[tuple[int, int]]]:
    """The different ways in which tree:1 to tree:32 grow: `level_sizes` of each."""
    found = [levels_of(TreeShape(best=nodes), depth) for nodes in range(1, EXACT + 1)]
    return list(map(list, dict.fromkeys(map(tuple, found))))


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
    ops = WideOps(drafter.module.config.depth)
    wide = MTPDrafter(
        cast(MTPModule, probe), WIDEST, slots=config.max_batch + 1, beam=BEAM, attention=engine.backend.attention,
        ops=ops, ring_page=engine.backend.ring_page, ring_rows=engine.backend.ring_rows,
    )  # fmt: skip
    backend = replace(engine.backend, runner=lambda slots: EagerRunner, in_flight=1)
    loop = make_loop(engine.model, wide, config, backend, slots=config.max_batch, tokenizer=engine.tokenizer)
    recorder = Recorder(loop.work.verifier, probe, ops)
    loop.work.verifier = recorder
    return recorder, Engine(engine.model, loop, engine.tokenizer, config, engine.backend)


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

    def along_the_text(self) -> Tensor:
        """Each layer's logits after the newest token, [B, depth, n] fp32."""
        return torch.stack([self.module.logits(level, self.outputs[level]) for level in sorted(self.outputs)], 1)


@final
class WideOps:
    """DraftOps that grow a wide tree, note it, and have nothing but the root verified."""

    def __init__(self, depth: int) -> None:
        self._inner = TorchDraftOps("noise")
        self._growths = growths(depth)
        self._candidates: Candidates | None = None
        self._members = torch.empty(0)  # [B, F, growths] bool: who has the frontier's nodes
        self.tree: Growth | None = None  # the last one
        self.missing = 0  # nodes of tree:1 to tree:32 for which there was no room, over all steps

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        self._candidates = Candidates("noise", batch, ids, vocab)
        self._members = torch.ones(
            len(batch.slots), 1, len(self._growths), dtype=torch.bool, device=batch.tokens.device
        )
        return Growth.start(batch.tokens)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        """Each growth's next level gets a place, and then the best others."""
        assert self._candidates is not None
        scores = self._candidates.rank(level.logits, tree)
        best = scores.topk(min(level.width, scores.shape[-1]), dim=-1)
        width, frontier = best.values.shape[-1], tree.frontier
        joint = (best.values + tree.scores[:, -frontier:, None]).flatten(1)  # [B, F * width]
        among = self._members.repeat_interleave(width, 1)  # [B, F * width, growths]
        members = torch.zeros_like(among)
        for number, sizes in enumerate(self._growths):
            keep = min(sizes[tree.level][1], joint.shape[1])
            top = joint.masked_fill(~among[..., number], -float("inf")).topk(keep, dim=-1)
            members[..., number].scatter_(1, top.indices, top.values > -float("inf"))
        needed = members.any(-1)
        keep = min(level.keep, joint.shape[1])
        self.missing += int((needed.sum(1) - keep).clamp(min=0).sum())
        # every joint score is below 0, so the needed ones come first
        kept = (joint.clamp(min=-1e9) + needed * 2e9).topk(keep, dim=-1).indices.sort(-1).values
        first = tree.tokens.shape[1] - frontier
        parents = (first + torch.arange(frontier, device=joint.device)).repeat_interleave(width).expand_as(joint)
        tokens = level.ids[best.indices].flatten(1)
        joint, tokens, parents = (value.gather(1, kept) for value in (joint, tokens, parents))
        self._members = members.gather(1, kept[..., None].expand(-1, -1, members.shape[2]))
        return Growth(
            torch.cat([tree.tokens, tokens], 1), torch.cat([tree.parents, parents], 1),
            torch.cat([tree.depths, torch.full_like(tokens, tree.level + 1)], 1),
            torch.cat([tree.scores, joint], 1), keep, tree.level + 1,
        )  # fmt: skip

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        self.tree = self.grow(tree, batch, level)
        return DraftTree.root(batch.tokens)

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        return self._inner.rows(tree, new, counts, start, first, shift)

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._inner.inputs(tree, tokens, embedding, hidden, above, carry, slots, counts, deeper=deeper)

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        return self._inner.last(values, counts)

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor,
    ) -> None:  # fmt: skip
        self._inner.observe(slots, lengths, result, hidden, tokens_table, hidden_table, counts_table, recent)


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
        drafted = self.probe.along_the_text()
        noise, best, q = true_ranks(drafted, self.columns[tokens], batch, self.probe.draft_ids)
        p, entropy = true_probability(logits, tokens, batch)
        values = {
            "rank": noise.flatten(1).int(), "rank_best": best.flatten(1).int(), "q": q.flatten(1), "p": p,
            "entropy": entropy, "nodes": tree.tokens[:, 1:].int(), "parents": tree.parents[:, 1:].to(torch.int16),
            "scores": tree.scores[:, 1:],
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
