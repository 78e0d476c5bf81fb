"""Plain and drafted decoding of one prompt, piece by piece in turns, so that both meet the same machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import final

from mtp_engine.runtime.request import Request
from mtp_engine.runtime.stats import Comparison, Timed

PIECE_TOKENS = 16
PIECE_SECONDS = 0.3  # after which a piece ends early
WARM_SECONDS = 1.5  # the same of the first piece
ENOUGH_SECONDS = 0.5  # of plain decoding, for which a short answer is repeated
QUICK_SECONDS = 1.5  # of plain decoding, after which a quick comparison ends
MOST_SECONDS = 3.0  # in all, after which nothing is repeated and a quick comparison ends


@final
@dataclass
class Contender:
    """A loop that decodes the same request over and over. start: queue it anew. step: advance the loop. settle: wait for
    steps in flight, which would run into the other's piece. drop: end a request."""

    start: Callable[[], Request]
    step: Callable[[], object]
    settle: Callable[[], None]
    drop: Callable[[Request], None]
    request: Request | None = field(default=None, init=False)

    @property
    def running(self) -> Request:
        assert self.request is not None, "begin comes first"
        return self.request

    @property
    def ended(self) -> bool:
        return self.running.finish_reason is not None

    @property
    def failed(self) -> bool:
        return self.running.finish_reason == "error"

    def begin(self) -> None:
        self.request = self.start()

    def piece(self, upto: float, seconds: float = inf) -> Timed:
        """Go on until there are `upto` tokens, or so many seconds have gone, or the answer ends. Times are the loop's own:
        the reading of the prompt is not in them."""
        stats = self.running.stats
        tokens, begin = stats.tokens, stats.decode_s
        while not self.ended and stats.tokens < upto and stats.decode_s - begin < seconds:
            self.step()
        self.settle()
        return Timed(stats.tokens - tokens, stats.decode_s - begin)

    def close(self) -> None:
        if self.request is not None and not self.ended:
            self.drop(self.request)


def take_turns(
    plain: Contender, drafted: Contender, *, whole: bool, clock: Callable[[], float] = time.perf_counter
) -> tuple[Comparison, list[int]]:
    """Let both decode: a piece plainly, the same piece drafted, and so on. Their first pieces warm both up and do not count.
    A short answer is decoded again and again until there is enough to go by.

    whole: to the answer's end, however long it takes; otherwise for QUICK_SECONDS. Returns what was measured, nothing where
    a request fails, and the tokens of plain decoding's first pass.
    """
    turns, said = list[tuple[Timed, Timed]](), list[int]()
    begin = worked = 0.0
    warm = 0  # tokens of the first piece
    try:
        while True:
            plain.begin()
            drafted.begin()
            while not (plain.ended and drafted.ended):
                seconds = PIECE_SECONDS if warm else WARM_SECONDS
                first = plain.piece(plain.running.stats.tokens + PIECE_TOKENS, seconds)
                turn = (first, drafted.piece(inf if plain.ended else plain.running.stats.tokens))
                if warm:
                    turns.append(turn)
                    worked += first.seconds
                else:
                    warm, begin = (
                        max(first.tokens, 1),
                        clock(),
                    )  # the first reading of a long prompt is not in the limit
                if not whole and turns and (worked >= QUICK_SECONDS or clock() - begin >= MOST_SECONDS):
                    return Comparison(tuple(turns)), said or list(plain.running.output)
            if plain.failed or drafted.failed:
                return Comparison(()), said or list(plain.running.output)
            if not said and 2 * warm > len(plain.running.output):
                turns, worked = [], 0.0  # the end alone stands for nothing
            said = said or list(plain.running.output)
            if turns and (worked >= ENOUGH_SECONDS or clock() - begin >= MOST_SECONDS):
                return Comparison(tuple(turns)), said
    finally:
        plain.close()
        drafted.close()
