"""Reading safetensors folders: memory-mapped, checked, and clear about what is wrong with which file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_engine.errors import EngineError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises EngineError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: the folder is not a complete model") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise EngineError(f"{path} does not hold a JSON object")
    return value


@final
class Checkpoint:
    """The tensors of a folder of safetensors files. Nothing is read until a tensor is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for file in self._list_files():
            handle = self._open(file)
            self._where.update(dict.fromkeys(handle.keys(), file))

    def _list_files(self) -> Sequence[Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        for index in self.folder.glob("*.safetensors.index.json"):
            wanted = set(read_json(index).get("weight_map", {}).values())
            missing = sorted(name for name in wanted if not (self.folder / name).is_file())
            if missing:
                raise EngineError(
                    f"{self.folder / missing[0]} is missing: {index.name} lists it; fetch the model again"
                )
        if not files:
            raise EngineError(f"{self.folder} holds no .safetensors file; pickled weights are not read")
        return files

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise EngineError(f"{file} is damaged or cut short ({error}); fetch it again") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._where[name]).get_slice(name).get_shape())

    def stored_dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, F8_E4M3, ..."""
        return str(self._open(self._where[name]).get_slice(name).get_dtype())

    def raw(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor as it is stored, on the CPU, mapped from the file. Raises EngineError if absent or misshapen."""
        if name not in self._where:
            raise EngineError(f"{self.folder}: tensor {name} is missing")
        tensor: Tensor = self._open(self._where[name]).get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise EngineError(
                f"{self._where[name]}: tensor {name} has shape {list(tensor.shape)}; config.json calls for {list(shape)}"
            )
        return tensor

    def get(self, name: str, *shape: int) -> Tensor:
        """A weight in the engine's dtype on the engine's device."""
        return self.raw(name, shape).to(self.device, self.dtype)
