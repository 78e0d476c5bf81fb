"""Entries of the prefix cache as files: a long system prompt that is read once survives a restart."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_engine.cache.prefix import Tokens
from mtp_engine.errors import EngineError

_FORMAT = "mtp-engine prefix 1"


@final
@dataclass(frozen=True)
class StoredPrefix:
    """tokens, and all rows of an entry without pages (see Entry), in host memory, the drafter's state among
    them. maker: says what model and version made it."""

    tokens: Tokens
    rows: list[Tensor]
    maker: str
    lean: bool

    def write(self, path: Path) -> None:
        """Put it into a file."""
        tensors = {f"row.{index:04}": row.contiguous() for index, row in enumerate(self.rows)}
        tensors["tokens"] = torch.from_numpy(self.tokens.copy())
        about = {
            "format": _FORMAT,
            "maker": self.maker,
            "lean": str(int(self.lean)),
            "sha256": _digest(list(tensors.values())),
        }
        save_file(tensors, path, about)

    @classmethod
    def read(cls, path: Path, maker: str) -> "StoredPrefix":
        """Raises EngineError for a file that is missing, damaged, or of another maker."""
        again = "make it again with save_prefix"
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise EngineError(f"{path} is no file of save_prefix of this version: {again}")
                if about.get("maker") != maker:
                    raise EngineError(f"{path} was made by another model, version, device or drafter: {again}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        except SafetensorError as error:
            raise EngineError(f"{path} is damaged ({error}): {again}") from error
        rows = [tensors[name] for name in sorted(tensors) if name.startswith("row.")]
        if "tokens" not in tensors or _digest([*rows, tensors["tokens"]]) != about.get("sha256"):
            raise EngineError(f"{path} is damaged: {again}")
        return cls(tensors["tokens"].numpy(), rows, maker, about.get("lean") == "1")


def _digest(tensors: list[Tensor]) -> str:
    found = sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
