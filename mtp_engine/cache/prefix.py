"""Beginnings of texts whose keys and values are kept: who begins alike goes on from there instead of reading again.

An entry holds all that a slot needs to go on behind its first n tokens, exactly: the full pages, which slots and other
entries share, and a copy of everything that a slot overwrites (the last page, the rings of windowed layers, the
drafter's state). Replaying only the last window would not do: stacked windows reach further back.

Entries are found by a hash for each full page, chained so that it stands for all tokens up to there, and then by the
tokens of the last page. When they take more than the budget, or slots need their pages, those go first that were only kept
in case somebody needs them and that nobody has found yet, then the least recently used.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtp_engine.cache.pages import Pages

Tokens = NDArray[np.int64]
_LOOKED_AT = 16  # entries with the same pages, to see where a text leaves them


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
        self._entries: OrderedDict[Entry, list[bytes]] = (
            OrderedDict()
        )  # least recently used first, each with its hashes
        self._spare: OrderedDict[Entry, None] = OrderedDict()  # those of them that go first
        self._through: dict[bytes, OrderedDict[Entry, None]] = {}  # by a page's hash: who has that page
        self._ending: dict[bytes, dict[int, dict[tuple[bytes, bool], Entry]]] = {}  # by the last full page's, see _end
        self._held: Counter[int] = Counter()
        self._copied = 0
        self._newest: tuple[Tokens, list[bytes]] = as_tokens([]), [b""]  # looked for, and its hashes
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
        chain = self._chain(tokens)
        best = self._longest(tokens, most, chain, (True,) if drafts else (True, False))
        alike = len(best.tokens) if best else 0
        shared = next((page for page in range(len(chain) - 1, 0, -1) if chain[page] in self._through), 0)
        if shared:
            start = shared * self._pages.page_size
            latest = islice(reversed(self._through[chain[shared]]), _LOOKED_AT)
            alike = max(alike, *(start + common(entry.tokens[start:], tokens[start:]) for entry in latest))
        if best is not None:
            self._use(best)
        return Hit(best, alike)

    def _longest(self, tokens: Tokens, most: int, chain: Sequence[bytes], drafts: Sequence[bool]) -> Entry | None:
        size = self._pages.page_size
        for page in range(min(len(chain) - 1, most // size), -1, -1):
            by_length = self._ending.get(chain[page], {})
            for length in sorted(by_length, reverse=True):
                if page * size + length <= most:
                    tail = tokens[page * size : page * size + length].tobytes()
                    for each in drafts:
                        if entry := by_length[length].get((tail, each)):
                            return entry
        return None

    def has(self, tokens: Tokens, *, drafts: bool) -> bool:
        """Whether there is an entry of exactly these tokens; it counts as found."""
        length, tail = self._end(tokens)
        ends = self._ending.get(self._chain(tokens)[-1], {}).get(length, {})
        found = ends.get((tail, True)) or (None if drafts else ends.get((tail, False)))
        if found:
            self._use(found)
        return found is not None

    def _use(self, entry: Entry) -> None:
        self._entries.move_to_end(entry)
        self._spare.pop(entry, None)

    def add(self, entry: Entry, *, spare: bool = False) -> None:
        """Keep an entry that is not there yet, and drop others until the budget holds. spare: it goes before others that
        are not, until it is found."""
        self._pages.hold(entry.pages)
        self._held.update(entry.pages)
        self._copied += entry.copied
        self._entries[entry] = chain = self._chain(entry.tokens)
        if spare:
            self._spare[entry] = None
        for name in chain[1:]:
            self._through.setdefault(name, OrderedDict())[entry] = None
        length, tail = self._end(entry.tokens)
        self._ending.setdefault(chain[-1], {}).setdefault(length, {})[tail, entry.drafts] = entry
        while self.size > self._budget and self._entries:
            self.drop(next(iter(self._spare or self._entries)))

    def drop(self, entry: Entry) -> None:
        """Forget an entry; pages that slots or other entries use stay."""
        chain = self._entries.pop(entry)
        self._spare.pop(entry, None)
        for name in chain[1:]:
            del self._through[name][entry]
            if not self._through[name]:
                del self._through[name]
        length, tail = self._end(entry.tokens)
        by_length = self._ending[chain[-1]]
        del by_length[length][tail, entry.drafts]
        if not by_length[length]:
            del by_length[length]
        if not by_length:
            del self._ending[chain[-1]]
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

    def _chain(self, tokens: Tokens) -> list[bytes]:
        """Whoever is added was looked for just before."""
        if self._newest[0] is not tokens:
            self._newest = tokens, _chain(tokens, self._pages.page_size)
        return self._newest[1]

    def _end(self, tokens: Tokens) -> tuple[int, bytes]:
        """What tells texts apart that end behind the same full page: how many tokens they have there, and which."""
        length = len(tokens) % self._pages.page_size
        return length, tokens[len(tokens) - length :].tobytes()

    def check(self) -> None:
        """Assert what must hold between two calls."""
        entries = list(self._entries)
        assert Counter(page for entry in entries for page in entry.pages) == self._held
        assert set(self._spare) <= set(entries)
        assert self._copied == sum(entry.copied for entry in entries)
        assert self.size <= self._budget or not entries
        ending = [e for by_length in self._ending.values() for ends in by_length.values() for e in ends.values()]
        assert len(ending) == len(entries)
        assert set(ending) == set(entries)
        size = self._pages.page_size
        assert Counter(e for passing in self._through.values() for e in passing) == Counter(
            {entry: len(entry.tokens) // size for entry in entries if len(entry.tokens) >= size}
        )
        self._pages.check([page for entry in entries for page in entry.pages])


def common(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    shorter = min(len(first), len(second))
    differ = first[:shorter] != second[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def _chain(tokens: Tokens, page_size: int) -> list[bytes]:
    """Nothing, and a hash for each full page, of it and all before it. 128 bits: nobody finds two texts with the same."""
    chain = [b""]
    for start in range(0, len(tokens) - page_size + 1, page_size):
        chain.append(blake2b(chain[-1] + tokens[start : start + page_size].tobytes(), digest_size=16).digest())
    return chain


def as_tokens(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, dtype=np.int64)
