"""Text of ids that arrive a few at a time, as they are said."""

from collections.abc import Callable, Iterable, Sequence
from typing import final

import tokenizers
from tokenizers.decoders import DecodeStream

_CONTEXT = 4  # ids kept before new ones: some decoders treat the first token of a text differently
_LONG = 16  # ids after which an unfinished character must lie in the last few
_REPLACEMENT = "\ufffd"


@final
class ByteLevelStream:
    """StreamDecoder for byte-level tokenizers, by the library's own, which takes a third of the time. For tokenizers of other
    kinds that raises, or leaves spaces out."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool) -> None:
        self._backend, self._skip_special = backend, skip_special
        self._start()

    def _start(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._held: list[int] = []  # ids since text came last; it ends with a whole character

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete; empty while a character is unfinished."""
        ids = list(ids)
        text: str = self._stream.step(self._backend, ids) or ""
        self._held = [] if text else self._held + ids
        return text

    def flush(self) -> str:
        """What was held back: the U+FFFD of a character that never ended. The decoder then starts afresh."""
        rest: str = self._backend.decode(self._held, skip_special_tokens=self._skip_special)
        self._start()
        return rest


@final
class StreamDecoder:
    """Decodes ids as they come and never emits half a character.

    All that `push` and `flush` return, joined, equals the decoding of all ids at once, for every byte-level tokenizer.
    Each push decodes at most some 20 ids beside its own.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._sent = 0  # characters of the decoding of _ids that are out already

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete; empty while a character is unfinished."""
        self._ids += ids
        text = self._decode(self._ids)
        # An unfinished character is at most three bytes and shows as one to three U+FFFD at the end.
        ready = len(text)
        while ready > max(self._sent, len(text) - 3) and text[ready - 1] == _REPLACEMENT:
            ready -= 1
        new = text[self._sent : ready]
        self._sent = max(self._sent, ready)
        if ready == len(text) and len(self._ids) > _LONG:
            self._ids = self._ids[-_CONTEXT:]
            self._sent = len(self._decode(self._ids))
        elif len(self._ids) > _LONG:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """What was held back: the U+FFFD of a character that never ended. The decoder then starts afresh."""
        rest = self._decode(self._ids)[self._sent :]
        self._ids, self._sent = [], 0
        return rest

    def _shorten(self, text: str) -> None:
        """Forget ids in front of a place between two characters: one where the two parts decode to the whole."""
        middle = len(self._ids) - _LONG // 2
        for cut in range(middle, middle - 4, -1):
            head = self._decode(self._ids[:cut])
            if len(head) <= self._sent and head + self._decode(self._ids[cut:]) == text:
                self._ids = self._ids[cut:]
                self._sent -= len(head)
                return
