"""The memory that requests run in (a scheduler.Room): pages, rings and the drafter's state, kept entries among them."""

import logging
from collections.abc import Sequence
from typing import final

from torch import Tensor

from mtp_engine.cache import Entry, HybridKV, PrefixCache
from mtp_engine.cache.prefix import as_tokens, common
from mtp_engine.cache.prefix_file import StoredPrefix
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter
from mtp_engine.runtime.request import Mark, Request
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.processors import Processors

_LOG = logging.getLogger("mtp_engine")
_EVERY = 256  # tokens: entries inside a prompt lie so far apart, or a quarter of their own weight in tokens


@final
class Memory:
    """What slots hold, and what is kept of them.

    capacity: tokens of prompt and answer that fit for one request if nobody else runs. prefix: None keeps nothing.
    """

    def __init__(
        self, cache: HybridKV, drafter: Drafter, processors: Processors, state: SlotState, *, ahead: int, chunk: int,
        prefix_bytes: int = 0, shares: bool = False,
    ) -> None:  # fmt: skip
        """ahead: tokens for which a request gets room beyond its last one, for steps that run past its end. chunk: tokens
        of a prompt that are read at a time. prefix_bytes: of the prefix cache, 0 = there is none. shares: whether slots use
        an entry's pages as they are; else they copy them, to have their own in one run, which TorchAttention reads fast.

        Raises EngineError if prefix_bytes hold not even one entry.
        """
        self.cache, self.drafter, self.processors, self.state = cache, drafter, processors, state
        self.pages, self.ahead = cache.pages, ahead
        self.capacity = self.pages.unreserved - ahead
        self._caches = [cache, drafter.cache] if drafter.cache else [cache]
        self._token_bytes = sum(each.token_bytes for each in self._caches)
        self._shares = shares
        self._refused: tuple[Request, int] | None = None  # who found no room, and what had been given back by then
        self.prefix: PrefixCache | None = None
        if not prefix_bytes:
            return
        page = self.pages.page_size
        least = self._copied_bytes(page - 1 + drafter.reread)
        if prefix_bytes < least:
            raise EngineError(
                f"prefix_cache_gb is {prefix_bytes / 1e9:g} and one entry takes {least / 1e9:.3g}: raise it, or set "
                "prefix_cache=False"
            )
        weight = self._copied_bytes(page // 2) // max(1, self._token_bytes)
        self._spacing = -(-max(_EVERY, weight // 4) // chunk) * chunk
        self.prefix = PrefixCache(self.pages, budget=prefix_bytes, page_bytes=self._token_bytes * page)

    # ---- for the scheduler -------------------------------------------------------------------------------------------

    def enter(self, request: Request) -> bool:
        """See scheduler.Room."""
        if self._refused == (request, self.pages.given_back):
            return False
        entry, request.marks = self._look_up(request)
        if not self._take(request, entry):
            self._refused = (request, self.pages.given_back)
            return False
        # not when the last one left: what was open of a step then, with that one in it, has written to the slot since
        self.drafter.release(request.slot)
        if entry and not self._load(request, entry):
            return self.enter(request)  # without that entry
        request.read = len(entry.tokens) if entry else 0
        if self.prefix is not None and not request.output and not request.stats.preemptions:
            request.stats.cached_tokens = request.read
            self.prefix.asked_tokens += request.length
            self.prefix.hit_tokens += request.read
        self.processors.start(request.slot, request.prompt, request.params, request.output)
        self.state.set(request.slot, request.length, request.last)
        return True

    def grow(self, request: Request) -> bool:
        return self.pages.reserve(request.slot, self._tokens(request))

    def fits(self, requests: Sequence[Request]) -> bool:
        pages = [self.pages.for_tokens(self._tokens(request, whole=True)) for request in requests]
        return sum(pages) * self.pages.page_size <= self.capacity + self.ahead

    def gains(self, request: Request, others: Sequence[Request]) -> bool:
        """See scheduler.Room."""
        page = self.pages.page_size
        begins = request.known(0, page)
        others = [other for other in others if other.known(0, page) == begins]
        if self.prefix is None or request.length < page or not others:
            return False
        known = as_tokens(request.known(0, request.length))
        alike = max(common(known, as_tokens(other.known(0, other.length))) for other in others)
        return alike >= page + self.prefix.find(known, alike, drafts=request.params.speculate).length

    def keep(self, request: Request, mark: Mark | None = None, *, apart: bool = False) -> None:
        """See scheduler.Room. A failure is noted in the log and costs nobody anything."""
        mark = mark or Mark(request.length)
        tokens, drafts = mark.tokens, request.params.speculate
        drift = request.in_flight * (self.drafter.depth + 1) + self.drafter.depth  # tokens that the slot may be ahead
        if self.prefix is None or tokens <= 0 or drift > self.cache.behind:
            return
        page = self.pages.page_size
        full = 0 if apart else max(0, tokens - self.drafter.reread) // page
        size = self._copied_bytes(tokens - full * page) + full * page * self._token_bytes
        known = as_tokens(request.known(0, tokens))
        if not self.prefix.fits(size) or self.prefix.has(known, drafts=drafts):
            return
        try:
            rows = self.cache.save(request.slot, full * page, tokens)
            state = (
                self.drafter.save(request.slot, tokens, lean=mark.lean) if drafts else []
            )  # it may complete its cache
            if drafts and self.drafter.cache and not mark.lean:
                rows += self.drafter.cache.save(request.slot, full * page, tokens, self.drafter.reread)
            rows += state
            pages = tuple(self.pages.table[request.slot][:full])
            entry = Entry(known, pages, tuple(rows), drafts, lean=mark.lean)
            self.prefix.add(entry, spare=mark.spare)
        except Exception as error:
            _LOG.warning("a beginning of %d tokens could not be kept (%s); nothing else is affected", tokens, error)

    def leave(self, slot: int) -> None:
        self.pages.release(slot)

    # ---- entries -----------------------------------------------------------------------------------------------------

    def stored(self, tokens: Sequence[int], maker: str) -> StoredPrefix | None:
        """The longest kept beginning of `tokens` for a file, with the drafter's state. None if there is none."""
        entry = self.prefix.find(as_tokens(tokens), len(tokens), drafts=True).entry if self.prefix is not None else None
        return StoredPrefix(entry.tokens, self._whole(entry), maker, entry.lean) if entry else None

    def restore(self, stored: StoredPrefix) -> None:
        """Keep what a file held. Raises EngineError if the prefix cache has no room for it."""
        assert self.prefix is not None
        rows = tuple(row.to(self.pages.device) for row in stored.rows)
        entry = Entry(stored.tokens, (), rows, True, stored.lean)
        if not self.prefix.fits(entry.copied):
            raise EngineError(
                f"it takes {entry.copied / 1e9:.3g} GB, and the prefix cache has less: raise prefix_cache_gb"
            )
        if not self.prefix.has(stored.tokens, drafts=True):
            self.prefix.add(entry)

    def _whole(self, entry: Entry) -> list[Tensor]:
        """All rows of an entry, in host memory: what `Entry.rows` of one without pages holds."""
        rows, given = list(entry.rows), list[Tensor]()
        for cache in self._caches if entry.drafts and not entry.lean else [self.cache]:
            own, rows = rows[: 2 * len(cache.groups)], rows[2 * len(cache.groups) :]
            given += cache.whole(entry.pages, own)
        return [row.cpu() for row in given + rows]

    def _look_up(self, request: Request) -> tuple[Entry | None, list[Mark]]:
        """What it can go on from, and where its reading stops to keep an entry: at the prompt's end; at a junction, where
        it leaves a text that is known further than that entry; and now and then between, so that others who leave it
        there need not begin at its beginning."""
        length = request.length
        if self.prefix is None:
            return None, [Mark(length)]
        hit = self.prefix.find(as_tokens(request.known(0, length)), length, drafts=request.params.speculate)
        lean = 3 * self.drafter.history < 2 * length  # else the drafter reads most of the prompt anyway
        begin = hit.length + (self.drafter.history if lean and hit.entry else 0)  # before that too few states are there
        between = (tokens for tokens in range(self._spacing, length, self._spacing) if tokens > begin)
        marks = {tokens: Mark(tokens, spare=True, lean=lean) for tokens in between} | {length: Mark(length)}
        if hit.length + self.pages.page_size <= hit.common < length:
            marks[hit.common] = Mark(hit.common)
        return hit.entry, [marks[tokens] for tokens in sorted(marks) if tokens > hit.length]

    def _take(self, request: Request, entry: Entry | None) -> bool:
        """Pages for a request: at least for what is known of it and a step, at best for its whole answer. Where there is no
        room for copies of an entry's pages, they are shared."""
        slot, shared = request.slot, entry.pages if entry else ()
        self.pages.hold(shared)  # nobody may drop them meanwhile
        try:
            for shares in (False, True)[self._shares :]:
                if shares:
                    self.pages.share(slot, shared)
                if self.pages.reserve(slot, self._tokens(request), self._tokens(request, whole=True)):
                    return True
                self.pages.release(slot)
            return False
        finally:
            self.pages.unhold(shared)

    def _load(self, request: Request, entry: Entry) -> bool:
        """Go on from an entry. False if that failed, and then the entry and what the slot held are gone."""
        assert self.prefix is not None
        slot, tokens = request.slot, len(entry.tokens)
        start = len(entry.pages) * self.pages.page_size
        try:
            for cache in self._caches:
                cache.copy_pages(entry.pages, slot)
            rows, own = entry.rows, 2 * len(self.cache.groups)
            self.cache.load(slot, start, tokens, rows[:own])
            if request.params.speculate:
                rows = rows[own:]
                if self.drafter.cache and not entry.lean:
                    own = 2 * len(self.drafter.cache.groups)
                    self.drafter.cache.load(slot, start, tokens, rows[:own], self.drafter.reread)
                    rows = rows[own:]
                left = next((mark.tokens for mark in request.marks if not mark.lean), tokens) - tokens
                self.drafter.load(slot, request.known(0, tokens + 1), rows, left)
            return True
        except Exception as error:
            _LOG.warning("a kept beginning could not be used (%s); it is read again", error)
            self.prefix.drop(entry)
            self.leave(slot)
            return False

    def _tokens(self, request: Request, *, whole: bool = False) -> int:
        """Tokens that a request needs room for: with its next steps, or with its whole answer."""
        answer = request.limit if whole else min(len(request.output) + self.drafter.max_nodes, request.limit)
        return len(request.prompt) + answer + self.ahead

    def _copied_bytes(self, paged_tokens: int) -> int:
        """Bytes of an entry's copies, once the windows are full, of which so many tokens are not in full pages."""
        return self.cache.entry_bytes(paged_tokens) + (
            self.drafter.cache.entry_bytes(paged_tokens, self.drafter.reread) if self.drafter.cache else 0
        )
