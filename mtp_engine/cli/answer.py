"""One answer on its way from the engine to stdout, for `generate` and `chat`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from mtp_engine.cli.output import TextWriter
from mtp_engine.config import EngineConfig, SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.kernels.waking import waking

if TYPE_CHECKING:
    from mtp_engine.engine import Engine, Prompt
    from mtp_engine.protocols import Progress
    from mtp_engine.runtime.answer import Generation


_GPU = Path("/dev/nvidiactl")


@final
class AnswerFailed(EngineError):
    """An answer broke off on its way."""


def load_engine(name: str, config: EngineConfig, mtp: str | None, progress: "Progress") -> "Engine":
    """Engine.load, imported late: torch takes seconds to import."""
    progress("starting", 0, None)
    if config.device != "cpu" and _GPU.exists():
        waking()
    from mtp_engine.engine import Engine

    return Engine.load(name, config, mtp=mtp, progress=progress)


@final
@dataclass
class Said:
    """What has come of an answer so far: all that is left of it where it is interrupted."""

    text: str = ""
    tokens: int = 0
    steps: int = 0

    def __str__(self) -> str:
        length = f", mean accepted length {self.tokens / self.steps:.2f}" if self.steps else ""
        return f"{self.tokens} tokens in {self.steps} steps{length}"


def stream_answer(
    engine: "Engine", prompt: "Prompt", params: SamplingParams, writer: TextWriter | None, said: Said,
    *, by_token: bool, begin: Callable[[], None],
) -> "Generation":  # fmt: skip
    """Write the answer as it comes, and a newline; `said` keeps count. by_token: drafts are to be told from the rest.
    begin: called at every chunk, before it is written. Raises AnswerFailed."""
    decoder, answer = engine.tokenizer.stream(), None
    try:
        for chunk in engine.stream([prompt], params):
            begin()
            said.text, said.tokens, said.steps = (
                said.text + chunk.text,
                said.tokens + len(chunk.token_ids),
                said.steps + 1,
            )
            answer = chunk.finished
            if writer is None:
                continue
            if by_token and not params.stop:  # what a stop string cuts off is no token's text
                for token, drafted in zip(chunk.token_ids, chunk.drafted, strict=True):
                    writer.write(decoder.push([token]), drafted=drafted)
                writer.write(decoder.flush() if answer else "")
            else:
                writer.write(chunk.text)
    except KeyboardInterrupt:
        begin()
        if writer:
            writer.end()
        raise
    if writer:
        writer.end()
    assert answer is not None, "the engine's stream ended without a last chunk"
    if answer.error:
        raise AnswerFailed(answer.error)
    return answer
