"""The whole cache of a model: layers grouped by kind, pages for full attention and a ring per window size."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache.paged import PagedKV
from mtp_engine.cache.window import WindowKV
from mtp_engine.config import AttentionConfig
from mtp_engine.tree import VerifyResult

NO_LIMIT = 1 << 60  # tokens


@final
class HybridKV:
    """Keys and values of every layer. `place[layer]` is (group, index within the group)."""

    def __init__(
        self,
        layers: Sequence[AttentionConfig],
        *,
        slots: int,
        tokens: int,
        page_size: int,
        max_nodes: int,
        ring_page: int = 1,
        kernels: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """tokens: capacity of the paged layers over all slots. max_nodes: rows a step may append to a ring.
        ring_page: rings are rounded up to a multiple of this. kernels: move rows with Triton, a launch per group."""
        self._kernels = kernels
        kinds: dict[tuple[int | None, int, int, int], list[int]] = {}
        for number, layer in enumerate(layers):
            kinds.setdefault((layer.window, layer.kv_heads, layer.qk_dim, layer.v_dim), []).append(number)
        self.groups: list[PagedKV | WindowKV] = []
        self.place: dict[int, tuple[int, int]] = {}
        for (window, kv_heads, qk_dim, v_dim), members in kinds.items():
            self.place.update({number: (len(self.groups), index) for index, number in enumerate(members)})
            if window is None:
                pages = -(-tokens // page_size)
                self.groups.append(
                    PagedKV(
                        layers=len(members), kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, slots=slots, pages=pages,
                        page_size=page_size, dtype=dtype, device=device,
                    )
                )  # fmt: skip
            else:
                self.groups.append(
                    WindowKV(
                        layers=len(members), kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, slots=slots, window=window,
                        max_nodes=max_nodes, page_size=ring_page, dtype=dtype, device=device,
                    )
                )  # fmt: skip

    @property
    def paged(self) -> list[PagedKV]:
        return [group for group in self.groups if isinstance(group, PagedKV)]

    @property
    def room(self) -> int:
        """Tokens for which memory is free; without paged layers there is no limit."""
        return min((group.room for group in self.paged), default=NO_LIMIT)

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for `tokens` positions of `slot`. The paged groups have equal capacity, so all fit or none does."""
        return all(group.reserve(slot, tokens) for group in self.paged)

    def release(self, slot: int) -> None:
        for group in self.paged:
            group.release(slot)

    def commit(self, slots: Tensor, lengths: Tensor, result: VerifyResult) -> None:
        """Move node path[b, i] to row lengths[b] + i for i < counts[b]. slots, lengths: [B] int64."""
        if result.path.shape[1] == 1:
            return  # the root stands where it belongs
        if self._kernels:
            from mtp_engine.kernels.kv import move_kept

            for group in self.groups:
                pages, wrap = group.device_pages, group.device_pages.shape[1]
                move_kept(
                    group.k, group.v, pages, lengths, result.path, result.counts, group.page_size, wrap, requests=slots
                )
            return
        steps = torch.arange(result.path.shape[1], device=result.path.device)
        target = lengths[:, None] + steps
        # past the kept nodes a row moves onto itself
        source = torch.where(steps < result.counts[:, None], lengths[:, None] + result.path, target)
        for group in self.groups:
            group.move(group.rows(slots, source).flatten(), group.rows(slots, target).flatten())

    def check(self) -> None:
        for group in self.paged:
            group.check()
