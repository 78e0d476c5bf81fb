"""Beginnings of texts whose keys and values are kept: who begins alike goes on from there instead of reading again.

An entry holds all that a slot needs to go on behind its first n tokens, exactly: the full pages, which slots and other
entries share, and a copy of everything that a slot overwrites (the last page, the rings of windowed layers, the
drafter's state). Replaying only the last window would not do: stacked windows reach further back.

Entries are found by a hash for each full page, chained so that it stands for all tokens up to there, and then token by
token. They are dropped least recently used first, when they take more than the budget or when slots need their pages.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtp_engine.cache.pages import Pages

Tokens = NDArray[np.int64]


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """State behind `tokens`. pages: the full ones that it counts on, from the first token on; rows: what was copied, on the
    caches' device: the main model's, then the drafter's. drafts: whether the drafter's are there; lean: without those of
    its cache."""

    tokens: Tokens
    pages: tuple[int, ...]
    rows: tuple[Tensor, ...]
    drafts: bool
    lean: bool = False

    @property
    def copied(self) -> int:
        """Bytes of the rows."""
        return sum(row.numel() * row.element_size() for row in self.rows)


@final
@dataclass(frozen=True)
class Hit:
    """The longest usable entry, if there is one, and how many tokens some entry has in common with those asked for."""

    entry: Entry | None
    common: int

    @property
    def length(self) -> int:
        return len(self.entry.tokens) if self.entry else 0


@final
class PrefixCache:
    """The entries of a loop. All their bytes count: copies, and each page once however many entries hold it."""

    def __init__(self, pages: Pages, *, budget: int, page_bytes: int) -> None:
        """budget: bytes. page_bytes: of one page in all paged layers. The cache gives up entries when `pages` run short."""
        self._pages, self._budget, self._page_bytes = pages, budget, page_bytes
        self._entries: OrderedDict[Entry, None] = OrderedDict()  # least recently used first
        self._spare: OrderedDict[Entry, None] = OrderedDict()  # those of them that go first
        self._by_page: dict[bytes, OrderedDict[Entry, None]] = {}
        self._held: Counter[int] = Counter()
        self._copied = 0
        self.asked_tokens = self.hit_tokens = 0  # of prompts that were looked up, and of these what was found
        pages.short = self._give_up

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return self._copied + len(self._held) * self._page_bytes

    def fits(self, size: int) -> bool:
        """Whether an entry of `size` bytes may be kept at all."""
        return size <= self._budget

    def find(self, tokens: Tokens, most: int, *, drafts: bool) -> Hit:
        """Look for the beginning of `tokens`, of `most` tokens at most. drafts: only with the drafter's state."""
        best, common, seen = None, 0, set[Entry]()
        chain = [b"", *_chain(tokens, self._pages.page_size)]
        for page in range(len(chain) - 1, -1, -1):
            for entry in reversed(self._by_page.get(chain[page], {})):
                if entry in seen:
                    continue
                seen.add(entry)
                start = page * self._pages.page_size
                alike = start + _common(entry.tokens[start:], tokens[start:])
                common = max(common, alike)
                usable = alike == len(entry.tokens) <= most and (entry.drafts or not drafts)
                if usable and (best is None or len(entry.tokens) > len(best.tokens)):
                    best = entry
            if best is not None and len(best.tokens) >= page * self._pages.page_size:
                break  # entries that share fewer pages are shorter
        if best is not None:
            self._entries.move_to_end(best)
            self._spare.pop(best, None)
        return Hit(best, common)

    def has(self, tokens: Tokens, *, drafts: bool) -> bool:
        """Whether there is an entry of exactly these tokens; it counts as used."""
        return len(tokens) > 0 and self.find(tokens, len(tokens), drafts=drafts).length == len(tokens)

    def add(self, entry: Entry, *, spare: bool = False) -> None:
        """Keep an entry, and drop others until the budget holds. spare: until it is found, others come before it."""
        self._pages.hold(entry.pages)
        self._held.update(entry.pages)
        self._copied += entry.copied
        self._entries[entry] = None
        if spare:
            self._spare[entry] = None
        for name in self._names(entry):
            self._by_page.setdefault(name, OrderedDict())[entry] = None
        while self.size > self._budget and self._entries:
            self.drop(next(iter(self._spare or self._entries)))

    def drop(self, entry: Entry) -> None:
        """Forget an entry; pages that slots or other entries use stay."""
        del self._entries[entry]
        self._spare.pop(entry, None)
        for name in self._names(entry):
            del self._by_page[name][entry]
            if not self._by_page[name]:
                del self._by_page[name]
        self._copied -= entry.copied
        for page in entry.pages:
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
        self._pages.unhold(entry.pages)

    def clear(self) -> None:
        for entry in list(self._entries):
            self.drop(entry)

    def _give_up(self, pages: int) -> None:
        """Drop entries that hold pages until so many more are free."""
        wanted = self._pages.free + pages
        order = [*self._spare, *(entry for entry in self._entries if entry not in self._spare)]
        for entry in [each for each in order if each.pages]:
            if self._pages.free >= wanted:
                break
            self.drop(entry)

    def _names(self, entry: Entry) -> Iterator[bytes]:
        """Under which an entry is found: its pages, or that it has no full one."""
        if len(entry.tokens) < self._pages.page_size:
            yield b""
        yield from _chain(entry.tokens, self._pages.page_size)

    def check(self) -> None:
        """Assert what must hold between two calls."""
        entries = list(self._entries)
        assert Counter(page for entry in entries for page in entry.pages) == self._held
        assert set(self._spare) <= set(entries)
        assert self._copied == sum(entry.copied for entry in entries)
        assert self.size <= self._budget or not entries
        named = {name for entry in entries for name in self._names(entry)}
        assert named == set(self._by_page)
        self._pages.check([page for entry in entries for page in entry.pages])


def _common(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    shorter = min(len(first), len(second))
    differ = first[:shorter] != second[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def _chain(tokens: Tokens, page_size: int) -> Iterator[bytes]:
    """A hash for each full page, of it and all before it. 128 bits: nobody finds two texts with the same ones."""
    last = b""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        last = blake2b(last + tokens[start : start + page_size].tobytes(), digest_size=16).digest()
        yield last


def as_tokens(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, dtype=np.int64)
