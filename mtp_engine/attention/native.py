"""The attention of a step that kernels.cpu runs as a whole: it only says which rows there are, and where their keys lie."""

from ctypes import Array, addressof
from typing import NoReturn, final
from weakref import WeakKeyDictionary

from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, PagedKV, WindowKV
from mtp_engine.kernels.cpu.calls import CGroup, CStep


@final
class NativeAttention:
    """One step's rows over a cache. Made like TorchAttention."""

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        assert rows.owners is None, "the library takes one prompt's chunk at a time"
        self._cache, self._rows = cache, rows

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> NoReturn:
        raise AssertionError("the library attends by itself")

    def describe(self, step: CStep) -> object:
        """Fill in what this object knows. Returns what must live until the step has run."""
        rows = self._rows
        step.batch, step.nodes = rows.positions.shape
        held = [rows.slots.contiguous(), rows.lengths.contiguous(), rows.positions.contiguous()]
        parents = rows.parents.expand(step.batch, -1).contiguous()
        first = None if rows.first is None else rows.first.contiguous()
        step.slots, step.lengths, step.positions = (table.data_ptr() for table in held)
        step.parents, step.first = parents.data_ptr(), None if first is None else first.data_ptr()
        return held, parents, first, describe_cache(self._cache, step)


_KNOWN: "WeakKeyDictionary[HybridKV, Array[CGroup]]" = WeakKeyDictionary()


def describe_cache(cache: HybridKV, step: CStep) -> object:
    """Fill in where a cache's keys and values lie, which never changes. Returns what must live until the step has run."""
    array = _KNOWN.get(cache)
    if array is None:
        array = _KNOWN[cache] = (CGroup * len(cache.groups))(*(_group(kv) for kv in cache.groups))
    step.groups, step.group_count = addressof(array), len(array)
    return array


def _group(kv: PagedKV | WindowKV) -> CGroup:
    pages, window = kv.device_pages, kv.window if isinstance(kv, WindowKV) else 0
    return CGroup(
        kv.k.data_ptr(), kv.v.data_ptr(), kv.k.stride(0), kv.v.stride(0), pages.data_ptr(), kv.page_size, pages.shape[1],
        window,
    )  # fmt: skip
