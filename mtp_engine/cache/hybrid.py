"""The whole cache of a model: layers grouped by kind, pages for full attention and a ring per window size."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache.paged import PagedKV
from mtp_engine.cache.pages import Pages
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
        pages: Pages,
        *,
        max_nodes: int,
        behind: int = 0,
        ring_page: int = 1,
        kernels: bool = False,
        dtype: torch.dtype,
    ) -> None:
        """max_nodes: rows a step may append to a ring. behind: tokens that a slot may have gone on since the state that
        `save` is asked for. ring_page: rings are rounded up to a multiple of this. kernels: move rows with Triton, a
        launch per group."""
        self._kernels, self.pages, self.behind = kernels, pages, behind
        kinds: dict[tuple[int | None, int, int, int], list[int]] = {}
        for number, layer in enumerate(layers):
            kinds.setdefault((layer.window, layer.kv_heads, layer.qk_dim, layer.v_dim), []).append(number)
        self.groups: list[PagedKV | WindowKV] = []
        self.place: dict[int, tuple[int, int]] = {}
        for (window, kv_heads, qk_dim, v_dim), members in kinds.items():
            self.place.update({number: (len(self.groups), index) for index, number in enumerate(members)})
            if window is None:
                self.groups.append(
                    PagedKV(pages, layers=len(members), kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, dtype=dtype)
                )
            else:
                self.groups.append(
                    WindowKV(
                        layers=len(members), kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, slots=pages.slots,
                        window=window, max_nodes=max_nodes + behind, page_size=ring_page, dtype=dtype, device=pages.device,
                    )
                )  # fmt: skip

    @property
    def paged(self) -> list[PagedKV]:
        return [group for group in self.groups if isinstance(group, PagedKV)]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the paged layers."""
        return sum(group.token_bytes for group in self.paged)

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
        paths = zip(result.path.tolist(), result.counts.tolist(), strict=True)
        if all(path[:count] == list(range(count)) for path, count in paths):
            return  # chains
        steps = torch.arange(result.path.shape[1], device=result.path.device)
        target = lengths[:, None] + steps
        # past the kept nodes a row moves onto itself
        source = torch.where(steps < result.counts[:, None], lengths[:, None] + result.path, target)
        moved = (source != target).any(0)
        source, target = source[:, moved], target[:, moved]
        for group in self.groups:
            group.move(group.rows(slots, source).flatten(), group.rows(slots, target).flatten())

    # ---- entries of the prefix cache ---------------------------------------------------------------------------------

    def save(self, slot: int, start: int, stop: int, more: int = 0) -> list[Tensor]:
        """Copies of what a slot needs to go on behind its first `stop` tokens: keys and values, [layers, rows, Hkv, D]
        each, of tokens start..stop-1 in paged layers, and in windowed ones of the last window - 1 + more tokens.

        The slot may have gone on by up to `behind` tokens since it had `stop`. A few launches on a GPU, and no waiting.
        """
        saved = []
        for group in self.groups:
            spans = group.spans(slot, self._first(group, start, stop, more), stop)
            saved += [torch.cat([storage[:, span] for span in spans], 1) for storage in (group.k, group.v)]
        return saved

    def load(self, slot: int, start: int, stop: int, saved: Sequence[Tensor], more: int = 0) -> None:
        """Put into a slot what `save` gave with the same numbers."""
        given = iter(saved)
        for group in self.groups:
            spans = group.spans(slot, self._first(group, start, stop, more), stop)
            for storage in (group.k, group.v):
                parts = torch.split(next(given), [span.stop - span.start for span in spans], 1)
                for span, part in zip(spans, parts, strict=True):
                    storage[:, span].copy_(part)

    def copy_pages(self, pages: Sequence[int], slot: int) -> None:
        """Copy pages to the slot's first ones, where these are others."""
        for source, target in zip(pages, self.pages.table[slot], strict=False):
            if source == target:
                continue
            for group in self.paged:
                for storage in (group.k, group.v):
                    here, there = (
                        slice(page * group.page_size, (page + 1) * group.page_size) for page in (target, source)
                    )
                    storage[:, here].copy_(storage[:, there])

    def whole(self, pages: Sequence[int], saved: Sequence[Tensor]) -> list[Tensor]:
        """What `save` would have given from the first token on, of an entry that holds `pages` and `saved`."""
        rows, given = iter(saved), list[Tensor]()
        for group in self.groups:
            for storage in (group.k, group.v):
                parts = [next(rows)]
                if isinstance(group, PagedKV):
                    size = group.page_size
                    parts = [*(storage[:, page * size : (page + 1) * size] for page in pages), *parts]
                given.append(torch.cat(parts, 1))
        return given

    def entry_bytes(self, paged_tokens: int, more: int = 0) -> int:
        """Bytes of what `save` gives for so many tokens of the paged layers, once the windows are full."""
        return paged_tokens * self.token_bytes + sum(
            (group.window - 1 + more) * group.token_bytes for group in self.groups if isinstance(group, WindowKV)
        )

    def _first(self, group: PagedKV | WindowKV, start: int, stop: int, more: int) -> int:
        return max(0, stop - (group.window - 1 + more)) if isinstance(group, WindowKV) else start
