"""What the decode loop asks of its parts."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from mtp_engine.cache import HybridKV, Pages
from mtp_engine.sampling.batch import Batch, Chunk, Extent, Plan
from mtp_engine.tree import DraftTree, VerifyResult


class Attention(Protocol):
    """One step's attention: called once per layer, it caches the new keys and values and attends over them."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor: ...  # [B, N, Hq, Dk], [B, N, Hkv, Dk], [B, N, Hkv, Dv] -> [B, N, Hq, Dv]


class DeviceAttention(Attention, Protocol):
    """Attention whose two halves the fused kernels call apart, layer by layer: first `destination`, then `attend`."""

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the step's keys and values go: storage [R, Hkv, Dk] and [R, Hkv, Dv], and its rows, [B * N] int64."""

    def attend(self, layer: int, q: Tensor, *, scale: float, sink: Tensor | None) -> Tensor:
        """q: [B, N, Hq, Dk] -> [B, N, Hq, Dv], once keys and values are written."""


class TargetModel(Protocol):
    """The main model, whose choices decide."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions: [B, N] int64 -> hidden [B, N, H], the residual stream before the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] pre-norm hidden -> [..., V] fp32 logits."""

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Those of this rank's tokens, where several ranks share the model: [..., V / ranks]."""


class PromptReader(Protocol):
    """What a drafter makes of chunks of prompts, of several at once: tensor operations, which a CUDA graph can hold."""

    def keep(self, slots: Tensor, positions: Tensor, stops: Tensor, hidden: Tensor) -> Tensor:
        """The main model read rows: of each its slot, its position, and where its chunk stops, [N] int64; hidden:
        [1, N, H], or with features more. A chunk's rows stand in one run. Returns what `read` wants of them, [N, H]."""

    def outline(self, chunks: Sequence[Chunk]) -> list[tuple[int, ...]]:
        """What is to be done for each of the chunks for which anything is; the last number says how many rows."""

    def nothing(self, slot: int, position: int) -> tuple[int, ...]:
        """An entry of an outline without rows, that stands for nobody: it may change what the slot holds."""

    def read(self, outline: Tensor, extent: Extent, tokens: Tensor, states: Tensor) -> None:
        """Do what an outline says, [C, B] int64, an entry a column. tokens: [N] int64 of the pass; states: from `keep`."""

    @property
    def loads(self) -> Sequence[int]: ...  # numbers of rows that `load` runs often

    def reload(self, extent: tuple[int, int]) -> None:
        """What `load` runs, over tensors that stay, as a graph can hold it: so many rows, where nobody has more tokens than the
        second number says."""

    def record(self, run: Callable[[int, int], None], slot: int) -> None:
        """From now on `load` calls `run` in place of `reload`, which runs for this slot until something is loaded."""


class Drafter(Protocol):
    """Proposes trees. All its state is per slot."""

    @property
    def max_nodes(self) -> int: ...  # nodes of its largest tree, root included

    @property
    def depth(self) -> int: ...  # of its deepest tree

    @property
    def cache(self) -> HybridKV | None: ...  # of its own layers, once it is attached

    @property
    def scratch_rows(self) -> int: ...  # that a draft may append to its cache

    @property
    def history(self) -> int: ...  # tokens of a prompt's end that it reads

    @property
    def reread(self) -> int: ...  # tokens that `load` runs through its layers once more, where their rows were saved

    @property
    def prompts(self) -> PromptReader | None: ...  # None: `observe` is shown every chunk

    def attach(self, pages: Pages, behind: int) -> None:
        """Make its cache in a loop's pages. behind: see HybridKV."""

    def release(self, slot: int) -> None:
        """Forget what a slot holds: another request takes it."""

    def draft(self, batch: Batch) -> DraftTree: ...

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        """A step was kept. hidden: [B, N, H] of all its nodes, of which result.path names those kept.

        Without `prompts` a prompt comes in the same way, chunk by chunk (batch.prompt_left): a chain of known tokens that
        is kept whole.
        """

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        """Copies of what it needs to go on behind the slot's first `tokens` tokens: besides its cache's rows, or, lean,
        without them. The slot may be ahead of that by as much as `behind` says."""

    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None:
        """Go on in a slot from what `save` gave there or elsewhere; the cache's rows that belong to it are in place.

        known: all tokens up to the next tree's root, one more than were saved. left: tokens to read behind them until its
        rows must be there.
        """


class TreePlanner(Protocol):
    """Cuts a step's trees to what pays (runtime.planner.Planner)."""

    def drafts(self, slots: Sequence[int]) -> bool:
        """Whether to draft in this step, for the requests in `slots`."""

    def grown(self, promises: Sequence[Sequence[float]]) -> int:
        """A level was grown, with these joint draft probabilities, by request. Returns how many nodes of it to keep."""

    def deeper(self) -> bool:
        """Whether to grow another level."""

    def nodes(self) -> int:
        """How many drafted nodes to verify, the best ones of each request."""

    def late(self, rows: int) -> None:
        """Drafting ran so many rows that earlier steps had left out: what they cost is not this tree's."""

    def learn(self, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """How many drafts of each request's tree were accepted."""

    def timed(self, nodes: int, batch: int, draft_s: float, verify_s: float) -> None:
        """A step with trees of so many nodes, roots included, took so long."""

    def release(self, slot: int) -> None:
        """Another request may take it."""


class StepPlanner(Protocol):
    """Chooses a step's shape, one for all its requests, before it is launched (runtime.shapes.ShapePlanner)."""

    def plans(self, batch: int) -> Sequence[Plan]:
        """Among which it chooses for so many requests: plain decoding, others, of which the last but one is taken where a
        request wants a smaller tree, and at last the one for who is late."""

    def choose(self, slots: Sequence[int], bound: int, *, limited: bool, speculates: bool) -> Plan:
        """For a step of the requests in `slots`, which is launched next. bound: none of them has more tokens.
        limited: one wants a smaller tree. speculates: whether one wants any."""

    def learn(self, plan: Plan, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """How many drafts of each request's tree were accepted."""

    def timed(self, plan: Plan, batch: int, bound: int, step_s: float, host_s: float | None) -> None:
        """A step took the device so long, and the host beside it, where that is known."""

    def rows(self) -> int | None:
        """How many rows of prompts to read behind a step, so that it does not take twice as long; None: any."""

    def release(self, slot: int) -> None:
        """Another request may take it."""


class Verifier(Protocol):
    @property
    def picks(self) -> bool: ...  # the token behind a node by its logits alone, as the one that comes first among them

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32 of the main model at every node."""


Progress = Callable[[str, int, int | None], None]
"""Called with what is going on, how much is done, and of how much (None where unknown)."""
