"""Passes over chunks of prompts as CUDA graphs: one for the main model's rows and one for the drafter's, by how many there are.

Whose rows they are stands in tables on the device, so that a graph fits the chunks of any requests, padded up to its number
of rows: a row's bits do not depend on others. Rows that are padded belong to the scratch slot, and are written to its last
position. A size that comes for the first time runs operation by operation, over the same tables, and is recorded when it
comes again, as many sizes come only once; `capture` records all. Before a size's first pass its kernels are compiled
together (kernels/compiling.py). On a CPU all run operation by operation.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from mtp_engine.attention.rows import StepRows
from mtp_engine.protocols import Progress
from mtp_engine.runtime.recorded import Lane, bound_bucket, memory_errors, no_collection
from mtp_engine.runtime.request import PromptChunk
from mtp_engine.runtime.step import ModelStep, known, spans, told
from mtp_engine.sampling.batch import Extent, to_device

_LOG = logging.getLogger("mtp_engine")
_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)  # rows
_LARGE = 512  # above the last of these, a multiple of this
_FEW, _FAR = 64, 8192  # so few rows behind so many tokens are faster where their keys are split between programs

Size = int | tuple[int, int]  # rows; and of what `reload` runs, the bound of tokens
Pass = Callable[[Any], None]


def rows_bucket(rows: int) -> int:
    """The number of rows to record for so many."""
    return next((size for size in _SIZES if size >= rows), -(-rows // _LARGE) * _LARGE)


@final
class RecordedPrompts:
    """captured: graphs. replayed, slow: passes of the main model that ran as a graph, and on a GPU without one."""

    def __init__(
        self, step: ModelStep, *, scratch: int, position: int, most: int, lane: Lane | None,
        compile: Callable[[Callable[[], object]], None] = lambda run: None,
    ) -> None:  # fmt: skip
        """scratch: the slot, and `position` the one in it, that padding is written to. most: rows of a pass. compile: has
        the kernels of a pass compiled that runs for the first time."""
        self.captured = self.replayed = self.slow = 0
        self._step, self._lane, self._requests, self._most = step, lane, scratch + 1, most
        self._compile = compile
        self._scratch = scratch, position
        self._reader, self._bound = step.drafter.prompts, step.cache.pages.count * step.cache.pages.page_size
        self._nothing = self._reader.nothing(*self._scratch) if self._reader else ()
        columns, tokens = 3 + len(self._nothing), rows_bucket(most)
        table = torch.zeros(columns * self._requests + tokens, dtype=torch.int64, device=step.device)
        outline, self._tokens = torch.split(table, [columns * self._requests, tokens])
        self._spans, self._outline = torch.split(outline.view(columns, -1), [3, columns - 3])
        self._states = torch.empty(0, device=step.device)  # [tokens, H], of the main model's last pass
        self._graphs: dict[tuple[Pass, Size], torch.cuda.CUDAGraph | None] = {}
        self._refused = set[tuple[Pass, Size]]()
        if self._reader:
            self._reader.record(self._reload, scratch)

    def prepare(self, chunks: Sequence[PromptChunk], also: Callable[[], None] = lambda: None) -> None:
        """Have compiled what they need for the first time, and beside it what `also` does."""
        if new := [each for each in self._halves(chunks)[0] if each not in self._graphs]:
            self._ahead(new, also)

    def read(self, chunks: Sequence[PromptChunk]) -> None:
        """See ModelStep.read."""
        count, bound = sum(chunk.stop - chunk.start for chunk in chunks), max(chunk.stop for chunk in chunks)
        if count <= _FEW and bound > _FAR:
            self._step.read(chunks)
            return
        halves, entries = self._halves(chunks)
        self._load(known(chunks), spans(chunks), entries)
        for half, size in halves:
            self._run(half, size)
        if self._reader is None:
            self._step.show(chunks, self._states)

    def _halves(self, chunks: Sequence[PromptChunk]) -> tuple[list[tuple[Pass, Size]], list[tuple[int, ...]]]:
        """The passes that read them, with their sizes, and what the drafter's is told."""
        entries = self._reader.outline(told(chunks)) if self._reader else []
        halves: list[tuple[Pass, Size]] = [(self._main, rows_bucket(sum(chunk.stop - chunk.start for chunk in chunks)))]
        if entries:
            halves.append((self._drafter, rows_bucket(sum(entry[-1] for entry in entries))))
        return halves, entries

    def capture(self, bounds: Sequence[int], progress: Progress) -> int:
        """Record all sizes, and what kept beginnings need where nobody has more tokens than `bounds` say. Returns how many graphs
        that made. Raises torch.OutOfMemoryError."""
        halves = [self._main, self._drafter] if self._nothing else [self._main]
        sizes = sorted({rows_bucket(rows) for rows in range(1, self._most + 1)}, reverse=True)
        kinds: list[tuple[Pass, Size]] = [(half, size) for half in halves for size in sizes]
        if self._reader:
            kinds += [(self._reader.reload, (rows, bound)) for rows in self._reader.loads for bound in bounds]
        before = self.captured
        self._ahead(kinds)
        with no_collection():
            for number, (half, size) in enumerate(kinds):
                progress("capturing passes over prompts", number, len(kinds))
                self._run(half, size)
                graph = self._record(half, size) if self._lane and self._graphs[half, size] is None else None
                if graph:
                    with memory_errors():
                        graph.replay()  # see Captured.once
        progress("capturing passes over prompts", len(kinds), len(kinds))
        return self.captured - before

    def _ahead(self, kinds: Sequence[tuple[Pass, Size]], also: Callable[[], None] = lambda: None) -> None:
        """Compile what passes of these sizes need, all at once. The tables are nobody's then."""

        def run() -> None:
            for half, size in kinds:
                half(size)
            also()

        self._load([], [], [])
        self._compile(run)

    def _load(
        self, tokens: Sequence[int], chunks: Sequence[tuple[int, int, int]], entries: Sequence[tuple[int, ...]]
    ) -> None:
        """Tables of these, padded."""
        scratch, position = self._scratch
        rows = [*chunks, *[(scratch, position, 0)] * (self._requests - len(chunks))]
        outline = [*entries, *[self._nothing] * (self._requests - len(entries))]
        numbers = [each for columns in (rows, outline) for column in zip(*columns, strict=True) for each in column]
        given = to_device([*numbers, *tokens], torch.int64, self._step.device)
        table, written = torch.split(given, [len(numbers), len(tokens)])
        kinds = torch.split(table.view(-1, self._requests), [3, len(self._nothing)])
        for held, new in zip((self._spans, self._outline), kinds, strict=True):
            held.copy_(new)
        self._tokens[: len(tokens)].copy_(written)

    def _reload(self, rows: int, bound: int) -> None:
        """See PromptReader.record."""
        assert self._reader
        if rows in self._reader.loads:
            self._run(self._reader.reload, (rows, bound_bucket(bound)))
        else:
            self._reader.reload((rows, bound))

    def _main(self, rows: int) -> None:
        states = self._step.over(StepRows.prompts(self._spans, rows, self._bound, padded=True), self._tokens[:rows])
        if not len(self._states):
            self._states = states.new_zeros(len(self._tokens), states.shape[1])
        self._states[:rows].copy_(states)

    def _drafter(self, rows: int) -> None:
        assert self._reader
        self._reader.read(self._outline, Extent(rows, self._bound, padded=True), self._tokens, self._states)

    def _run(self, half: Pass, size: Size) -> None:
        first, graph = (half, size) not in self._graphs, self._graphs.setdefault((half, size), None)
        if graph is None and not first and self._lane and (half, size) not in self._refused:
            try:
                graph = self._record(half, size)
            except torch.OutOfMemoryError as error:
                self._refuse(half, size, error)
        if graph:
            graph.replay()
        else:
            half(size)
        self.replayed += graph is not None and half == self._main
        self.slow += graph is None and self._lane is not None and half == self._main

    def _record(self, half: Pass, size: Size) -> torch.cuda.CUDAGraph | None:
        """Of a size that has run before, so that its kernels are compiled. Where it cannot be captured, that is said once."""
        assert self._lane
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._step.device)
        self._lane.stream.wait_stream(before)
        try:
            with (
                memory_errors(),
                no_collection(),
                torch.cuda.graph(graph, pool=self._lane.pool, stream=self._lane.stream),
            ):
                half(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refuse(half, size, error)
            return None
        finally:
            before.wait_stream(self._lane.stream)
        self.captured += 1
        self._graphs[half, size] = graph
        return graph

    def _refuse(self, half: Pass, size: Size, error: Exception) -> None:
        self._refused.add((half, size))
        _LOG.warning("prompts of %s rows are read without CUDA graphs, which is slower: %s", size, error)
