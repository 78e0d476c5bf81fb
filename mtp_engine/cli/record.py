"""What `generate --json` writes: an answer and everything that it takes to repeat it, which `--from` reads again."""

import json
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mtp_engine import __version__
from mtp_engine.config import EngineConfig, SamplingParams, Structure
from mtp_engine.errors import EngineError

if TYPE_CHECKING:
    from mtp_engine.cli.request import Job
    from mtp_engine.engine import Engine
    from mtp_engine.runtime.answer import Generation

_ASKED = ("model", "mtp", "prompt", "system", "chat", "thinking")


def document(engine: "Engine", job: "Job", answer: "Generation", *, chat: bool) -> dict[str, Any]:
    """The stable schema of --json. chat: whether the chat template was used."""
    return {
        "model": job.model,
        "mtp": job.mtp,
        "drafter": engine.config.drafter,
        "tree": None if engine.config.tree is None else str(engine.config.tree),
        "version": __version__,
        "commit": commit(),
        "prompt": job.text,
        "system": job.system,
        "chat": chat,
        "thinking": job.thinking,
        "params": _plain(replace(job.params, seed=answer.stats.seed)),
        "config": _plain(engine.config),
        "text": answer.text,
        "token_ids": answer.token_ids,
        "drafted": answer.drafted,
        "finish_reason": answer.finish_reason,
        "complete": answer.complete,
        "stats": answer.stats.to_json(),
    }


def _plain(settings: SamplingParams | EngineConfig) -> dict[str, Any]:
    """The fields in JSON's types; a tree as its text."""
    return {**asdict(settings), "tree": None if settings.tree is None else str(settings.tree)}


def commit() -> str | None:
    """The commit that runs, where that is known: of the checkout, or the one that pip installed from."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        with suppress(OSError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            done = subprocess.run(command, capture_output=True, text=True)
            return done.stdout.strip() or None
    with suppress(PackageNotFoundError, ValueError, AttributeError):
        source = json.loads(distribution("mtp-engine").read_text("direct_url.json") or "{}")
        found: str | None = source.get("vcs_info", {}).get("commit_id")
        return found
    return None


@final
@dataclass(frozen=True)
class Record:
    """A document that was read back. asked, params, config: as `document` wrote them."""

    file: str
    asked: dict[str, Any]
    params: dict[str, Any]
    config: dict[str, Any]
    token_ids: list[int]

    @classmethod
    def read(cls, file: str) -> "Record":
        """Raises EngineError for a file that is none of ours, or of a version with other settings."""
        try:
            read = json.loads(Path(file).read_text(encoding="utf-8"))
            asked = {name: read[name] for name in _ASKED}
            record = cls(file, asked, dict(read["params"]), dict(read["config"]), list(read["token_ids"]))
            version = read["version"]
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"{file}: cannot be read: {reason}; --from needs what --json wrote") from error
        except (KeyError, TypeError) as error:
            raise EngineError(f"{file}: is not what --json writes (no {error}); write it anew with --json") from error
        known = {field.name for kind in (SamplingParams, EngineConfig) for field in fields(kind)}
        if unknown := sorted({*record.params, *record.config} - known):
            raise EngineError(f"{file}: version {version} wrote it, whose {', '.join(unknown)} this one does not know")
        for name, value in asked.items():
            kind = bool if name in ("chat", "thinking") else str
            if not (isinstance(value, kind) or (value is None and name not in ("model", "prompt"))):
                raise EngineError(f"{file}: its {name} is not as --json writes it; write it anew with --json")
        return record

    def options(self, given: frozenset[str]) -> dict[str, Any]:
        """The command line that repeats it, without the options that are given anew."""
        found = {**self.params, **self.config, **self.asked}
        if "prompt_file" in given:
            del found["prompt"]
        if "system" in given:
            found["chat"] = True
        if "drafter" in given or "verifier" in given:
            found["tree"] = None  # was made for the other
        return {name: value for name, value in found.items() if name not in given and name != "structure"}

    def structure(self) -> Structure | None:
        """What the answer had to match."""
        kept = self.params.get("structure")
        try:
            return Structure(**kept) if kept else None
        except TypeError as error:
            raise EngineError(f"{self.file}: its structure is not as --json writes it: {error}") from error
