"""Ranks as threads of one process, for what is divided among them; those of tests/test_tensor_parallel.py are processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.parallel.group import Group, joined, ordered_sum, weighted
from mtp_engine.parallel.shard import Shard
from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.tree import DraftTree

T = TypeVar("T")


class Meeting:
    """What every rank brings, laid out for all to read (an Exchange for each)."""

    def __init__(self, size: int, fast: bool = False) -> None:
        self.fast = fast
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.turn: threading.Lock | None = None  # held by who computes, where only one may
        self.calls = 0

    def exchange(self, rank: int) -> "Seat":
        return Seat(self, rank)

    def wait(self) -> None:
        if self.turn:
            self.turn.release()
        try:
            self.barrier.wait()
        finally:
            if self.turn:
                self.turn.acquire()


class Seat:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank, self.fast = meeting, rank, meeting.fast

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        assert x.is_contiguous()
        self._meeting.brought[self._rank] = x
        self._meeting.wait()
        assert len({(each.shape, each.dtype) for each in self._meeting.brought}) == 1
        together = torch.stack(self._meeting.brought)
        self._meeting.calls += self._rank == 0
        self._meeting.wait()
        return joined(together) if join else together

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        return ordered_sum(self.gather(weighted(partial, weights)), dtype, residual)


def together(size: int, work: Callable[[Group], T], *, in_turns: bool = False, fast: bool = False) -> list[T]:
    """What `work` returns on every rank. in_turns: only one computes at a time, as Triton's interpreter wants it. fast: what
    their exchanges say of themselves."""
    meeting = Meeting(size, fast)
    meeting.turn = threading.Lock() if in_turns else None

    def one(rank: int) -> T:
        try:
            with torch.inference_mode(), meeting.turn or nullcontext():
                return work(Group(Shard(rank, size), meeting.exchange(rank)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


def nearly_tied() -> tuple[Tensor, DraftTree, Batch]:
    """Logits [3, 4, 64] with many ties, drafts, and requests at three temperatures."""
    torch.manual_seed(0)
    logits = (torch.randn(3, 4, 64) * 2).round()  # many ties
    logits[0, 0, [3, 40]] = 50.0
    tree = DraftTree.chain(torch.randint(64, (3, 4)), torch.tensor([4, 4, 2]))
    params = [SamplingParams(temperature=t) for t in (0.0, 0.8, 1.3)]
    sampling = SamplingBatch.build(params, [5, 6, 7], torch.device("cpu"))
    batch = Batch(torch.arange(3), tree.tokens[:, 0].contiguous(), torch.tensor([9, 4, 77]), 80, sampling)
    return logits, tree, batch
