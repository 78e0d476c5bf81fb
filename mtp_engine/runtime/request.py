"""Requests on their way, and those of one step together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from mtp_engine.config import MAX_TREE_NODES, SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.batch import Plan, SamplingBatch, to_device, upload
from mtp_engine.sampling.logprobs import Notes, TokenLogprob
from mtp_engine.sampling.masks import Guide
from mtp_engine.sampling.processors import NO_TOKEN
from mtp_engine.sampling.stops import FinishReason, Trail
from mtp_engine.tree import DraftTree

NOTHING_ALLOWED = (
    "no token is left that its parameters allow: structure, bad_words, allowed_token_ids, logit_bias and min_tokens "
    "contradict each other here"
)


@final
@dataclass(eq=False)
class Request:
    """A prompt on its way: waiting, reading its prompt, decoding, or ended.

    `prompt`, `seed` and `output` say all there is to know of its text; everything else can be made again from them, and
    is when a request is interrupted (`rewind`).
    """

    prompt: list[int]
    params: SamplingParams
    seed: int
    new_trail: Callable[[], Trail]
    stats: GenerationStats
    limit: int  # tokens it may emit
    deadline: float = float("inf")  # of the scheduler's clock
    sink: "Callable[[StepOutput], None] | None" = None  # called with everything that is emitted
    others: "tuple[Request, ...]" = ()  # the further answers to the same prompt, where n > 1
    number: int = 0  # in order of arrival
    arrived: float = 0.0  # on the loop's clock
    skipped: float = 0.0  # seconds that the clock had left out by then
    slot: int = -1  # its row in caches and tables while it runs
    read: int = 0  # tokens of prompt and output whose chunk was launched
    decoding: bool = False  # all of them are
    marks: "list[Mark]" = field(default_factory=list)  # where reading stops to keep its state; the last: all is read
    in_flight: int = 0  # steps that it has a part in and that have not landed
    failures: int = 0  # steps in a row that broke off with it
    output: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per output token: an accepted draft, not the main model's own
    logprobs: list[TokenLogprob] = field(default_factory=list)  # per output token, where they were asked for
    text: str = ""  # of the answer, as it may be shown: without special tokens, cut before a stop string
    finish_reason: FinishReason | None = None
    error: str = ""  # what went wrong, where finish_reason is "error"
    _seen: int = 0  # tokens and characters that `emit` has given
    _shown: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self.trail = self.new_trail()

    @property
    def length(self) -> int:
        """Tokens whose KV is cached once the prompt is read: all but the last."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def last(self) -> int:
        """The newest token: the root of the next tree."""
        return (self.output or self.prompt)[-1]

    def known(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop-1 of prompt and output. Never all of them: a long prompt is asked for chunk by chunk."""
        said = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - said, 0) : max(stop - said, 0)]

    def take(self, tokens: list[int], failed: Mapping[tuple[int, ...], str]) -> int:
        """Add what a step emitted, all but the last being accepted drafts. Returns how many belong to the answer.

        NO_TOKEN stands where its parameters left nothing to choose, or its structure failed (`failed` says how, by the
        tokens in front); there the request ends with an error.
        """
        said = tokens[: tokens.index(NO_TOKEN)] if NO_TOKEN in tokens else tokens
        kept, reason, text, error = self.trail.follow(said)
        if not error and len(said) < len(tokens):
            error = failed.get(tuple(said), NOTHING_ALLOWED)
        self.output += kept
        self.drafted += [True] * min(len(kept), len(tokens) - 1) + [False] * (len(kept) == len(tokens))
        if self.logprobs:
            del self.logprobs[len(self.output) :]
        self.text += text
        if reason is None and error:
            self.end("error", error)
        else:
            self.finish_reason = reason
        return len(kept)

    def end(self, reason: FinishReason, error: str = "") -> None:
        """End it between two steps, with what it has said so far."""
        if self.trail.visible:
            with suppress(Exception):  # the text failed before; the tokens are right
                self.text += self.trail.visible.push([], ended=True)
        del self.logprobs[len(self.output) :]
        self.finish_reason, self.error = reason, error

    def rewind(self) -> None:
        """Back to before it ran, with what it has said: `output` is right, whatever else was interrupted is not.

        Ends it with an error where its structure or its text cannot be made again.
        """
        self.slot, self.read, self.decoding, self.in_flight = -1, 0, False, 0
        self.drafted = [*self.drafted, *[False] * len(self.output)][: len(self.output)]
        del self.logprobs[len(self.output) :]
        try:
            trail = self.new_trail()
            again = trail.follow(self.output)
            error = again.error
        except Exception as failure:
            error = str(failure) or type(failure).__name__
        if error:
            self.end("error", error)
        else:
            self.trail, self.finish_reason, self.text = trail, again.reason, again.text

    def emit(self, outputs: "list[StepOutput]") -> None:
        """Hand what has come since the last call, the end included, to whoever listens, and put it into `outputs`."""
        begin, seen, shown, reason, sink = self._seen, len(self.output), len(self.text), self.finish_reason, self.sink
        if self._closed or not (begin < seen or reason):
            return
        logprobs = tuple(self.logprobs[begin:seen]) if self.logprobs else ()
        text = self.text[self._shown :]
        output = StepOutput(self, self.output[begin:], self.drafted[begin:], text, reason, logprobs)
        if sink:
            outputs.append(output)
        take = sink or outputs.append
        # Ctrl-C comes between two calls only, so what is marked as seen is handed out
        self._seen, self._shown, self._closed = seen, shown, reason is not None
        take(output)

    def resume(self, said: Sequence[int]) -> None:
        """Go on, before it is queued, from tokens that it has said elsewhere: only what follows is emitted.

        Raises EngineError if they had ended the answer there.
        """
        self.output = list(map(int, said))
        self.logprobs = [TokenLogprob(token, 0.0, 0, ()) for token in self.output]  # not known any more
        self.rewind()
        if self.finish_reason:
            raise EngineError(self.error or "the tokens to go on from are a whole answer: nothing is left to say")
        self._seen, self._shown = len(self.output), len(self.text)


@final
class StepOutput(NamedTuple):
    """What one step emitted for one request. `finish_reason` comes with its last one, which may have no tokens."""

    request: Request
    tokens: list[int]
    drafted: list[bool]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token where they were asked for


@final
@dataclass(frozen=True)
class PromptChunk:
    """Tokens start..stop-1 of prompt and output, read up to their last token: that is the root of the first tree."""

    request: Request
    start: int
    stop: int
    left: int  # tokens to read behind the chunk until the drafter's rows must be there
    mark: "Mark | None"  # that it stops at


@final
@dataclass(frozen=True)
class Mark:
    """A number of tokens of which a request's state is kept when it has read them.

    spare: in case somebody needs it (see PrefixCache.add). lean: of the drafter only what its rows can be made from again,
    which is worth it where it would have to read for this mark alone.
    """

    tokens: int
    spare: bool = False
    lean: bool = False


@final
@dataclass(frozen=True)
class TreeLimits:
    """What each request of a batch lets be verified of its tree."""

    widths: Tensor  # [B, MAX_TREE_NODES] int64, children per node at depth 0, 1, ...
    nodes: Tensor  # [B] int64, drafted nodes in all
    most: int  # nodes of the largest tree that any request allows, root included; known on the host

    @classmethod
    def build(cls, params: Sequence[SamplingParams], device: torch.device) -> "TreeLimits | None":
        """None where nobody asks for less than the engine's tree."""
        if all(p.speculate and p.tree is None for p in params):
            return None
        widths = torch.full((len(params), MAX_TREE_NODES), MAX_TREE_NODES)
        nodes, most = [], 1
        for row, p in enumerate(params):
            if p.tree and p.tree.widths:
                widths[row] = torch.tensor([*p.tree.widths, *[0] * (MAX_TREE_NODES - len(p.tree.widths))])
            nodes.append(0 if not p.speculate else p.tree.max_nodes - 1 if p.tree else MAX_TREE_NODES)
            most = max(most, min(nodes[-1] + 1, MAX_TREE_NODES))
        return cls(upload(widths, device), to_device(nodes, torch.int64, device), most)

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "TreeLimits":
        """Limits that leave every tree as it is."""
        widths = torch.full((batch, MAX_TREE_NODES), MAX_TREE_NODES, device=device)
        return cls(widths, widths[:, 0].clone(), MAX_TREE_NODES)

    def apply(self, tree: DraftTree) -> DraftTree:
        """The tree without what is over the limits, cut to as many nodes as some request may have.

        Of too many nodes those with the best joint score stay. Where candidates were drawn (tree.draft) the first ones
        stay instead, level by level, siblings in the order in which they were drawn: a rule that rejects is lossless
        only if the tree's shape does not depend on what was drawn, and a score does.
        """
        index = torch.arange(tree.nodes, device=tree.tokens.device)
        siblings = (tree.parents[:, :, None] == tree.parents[:, None, :]) & tree.real[:, None, :]
        rank = (siblings & (index < index[:, None])).sum(-1)
        narrow = rank < self.widths.gather(1, (tree.depths - 1).clamp(min=0))
        narrow[:, 0] = True
        kept = (narrow[:, None, :] | ~tree.ancestors).all(-1) & tree.real
        # a node's score is at most its parent's and the sort is stable, so a kept node's ancestors are kept
        scores = tree.scores if tree.draft is None else None
        scores = -index.float().expand_as(kept) if scores is None else scores
        order = torch.where(kept, scores, -float("inf")).index_fill(1, index[:1], float("inf"))
        standing = order.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        kept &= standing <= self.nodes[:, None]
        front = kept.sort(dim=1, descending=True, stable=True).indices  # kept nodes first, in their order
        number = front.argsort(1)
        front = front[:, : self.most]  # what lies behind is padding in every request
        parents = tree.parents.gather(1, front)
        return replace(
            tree,
            tokens=tree.tokens.gather(1, front),
            parents=torch.where(parents < 0, parents, number.gather(1, parents.clamp(min=0))),
            depths=tree.depths.gather(1, front),
            size=kept.sum(1),
            max_depth=min(tree.max_depth, self.most - 1),
            scores=None if tree.scores is None else tree.scores.gather(1, front),
            draft=None
            if tree.draft is None
            else tree.draft.gather(1, front[..., None].expand(-1, -1, tree.draft.shape[2])),
        )


@final
@dataclass(frozen=True)
class Members:
    """The requests that decode together, until one joins or leaves."""

    requests: tuple[Request, ...]
    trails: tuple[Trail, ...]  # theirs; a request that was queued again has another one, and another slot
    slots: Tensor  # [B] int64
    sampling: SamplingBatch
    guide: Guide | None = None
    limits: TreeLimits | None = None
    speculates: bool = True  # False: nobody wants drafts, so nothing is drafted and one row each is verified
    plan: Plan | None = None  # of the step, where steps are planned

    @classmethod
    def of(cls, requests: tuple[Request, ...], before: "Sequence[Members]", device: torch.device) -> "Members | None":
        """Of the next step, which are those of a step before it where nobody joined or left; None where there are none."""
        trails = tuple([request.trail for request in requests])
        for members in before:
            if members.requests == requests and members.trails == trails:
                return members
        return cls.build(requests, device) if requests else None

    @classmethod
    def build(cls, requests: Sequence[Request], device: torch.device) -> "Members":
        params = [request.params for request in requests]
        slots = to_device([request.slot for request in requests], torch.int64, device)
        sampling = SamplingBatch.build(params, [request.seed for request in requests], device)
        guide = Guide.build([request.trail.constraint for request in requests])
        speculates = any(each.speculate for each in params)
        limits = TreeLimits.build(params, device) if speculates else None
        trails = tuple(request.trail for request in requests)
        return cls(tuple(requests), trails, slots, sampling, guide, limits, speculates)

    @property
    def longest(self) -> int:
        return max([request.length for request in self.requests])


@final
@dataclass(frozen=True)
class Landed:
    """What came of a step. rows: per request, tokens to emit, nodes and depth of its tree, then the tokens."""

    rows: list[list[int]]
    draft_s: float
    verify_s: float
    notes: Notes | None = None  # None where nobody wants log-probabilities
    failed: Mapping[tuple[int, tuple[int, ...]], str] = field(default_factory=dict)  # see Guide


class Launched(Protocol):
    """A step that was started and may still run."""

    def wait(self) -> Landed:
        """Returns when the step is done; may be asked again."""
