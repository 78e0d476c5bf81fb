"""What one client may ask for, and how long anything may take."""

from dataclasses import dataclass
from typing import final

from mtp_engine.config.checks import check_types
from mtp_engine.errors import EngineError


@final
@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. body_s, write_s: seconds for a client to send its body, and to take a piece of its answer.
    answer_s: seconds for an answer, waiting included. default_tokens: of an answer whose request names no limit.
    prompts: in one request. structure_bytes, structure_depth: of a schema, regular expression or grammar. drain_s: seconds
    that answers have to end when the server is asked to."""

    body_bytes: int = 4_000_000
    body_s: float = 30.0
    write_s: float = 60.0
    answer_s: float = 600.0
    default_tokens: int = 512
    prompts: int = 64
    structure_bytes: int = 65_536
    structure_depth: int = 64
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in vars(self).items():
            if not 0 < value < 1e12:
                raise EngineError(f"{name} is {value}; it must be above 0 and below 1e12")
