"""The header of a GGUF file: its fields, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is read here, because the `gguf` package's own reader
needs seven seconds for a vocabulary of 49k tokens.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mtp_engine.errors import EngineError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
REQUIRED: Any = object()


@final
@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. shape is row-major, as in PyTorch (GGUF lists dimensions the other way round)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@final
@dataclass(frozen=True)
class Source:
    """A GGUF file's header."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """The field `key`. Raises EngineError if it is missing without a default, or of another type."""
        value = self.fields.get(key, default)
        if value is REQUIRED:
            raise self.error(f"field {key} is missing")
        if value is not default and not isinstance(value, kind):
            raise self.error(f"field {key} is {str(value)[:40]!r}, which is not supported")
        return value

    def error(self, problem: str) -> EngineError:
        return EngineError(f"{self.path}: {problem}; use another GGUF file or the model's safetensors folder")


@final
class _Cursor:
    """Reads little-endian values one after another; ValueError past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self._data[self.at - count : self.at]

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        return self.take(self.numbers("Q")[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        item, count = self.numbers("I")[0], self.numbers("Q")[0]
        if item == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers(_SCALARS[item], count))


def open_gguf(path: Path) -> Source:
    """The header of a file. Raises EngineError if it is not a whole GGUF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(path, _Cursor(data), len(data))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise EngineError(f"{path}: not a whole GGUF file ({error}); download it again") from error


def _header(path: Path, cursor: _Cursor, file_size: int) -> Source:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    if (version := cursor.numbers("I")[0]) not in (2, 3):
        raise ValueError(f"version {version} instead of 2 or 3, little-endian")
    tensor_count, field_count = cursor.numbers("Q", 2)
    fields = {}
    for _ in range(field_count):
        key = cursor.string()
        fields[key] = cursor.value(cursor.numbers("I")[0])
    found = [_tensor_info(cursor) for _ in range(tensor_count)]
    align = int(fields.get("general.alignment", 32))
    base = -(-cursor.at // align) * align if align > 0 else file_size
    tensors = {}
    for name, shape, kind, offset in found:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = int(np.prod(shape, dtype=object)) // block * block_bytes
        if shape[-1] % block or base + offset + size > file_size:
            raise ValueError(f"tensor {name} is cut off")
        tensors[name] = StoredTensor(name, shape, kind, base + offset, size)
    return Source(path, fields, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    dims = cursor.numbers("I")[0]
    if not 1 <= dims <= 4:
        raise ValueError(f"tensor {name} has {dims} dimensions")
    shape = cursor.numbers("Q", dims)[::-1]
    if not all(shape):
        raise ValueError(f"tensor {name} is empty")
    return name, shape, GGMLQuantizationType(cursor.numbers("I")[0]), cursor.numbers("Q")[0]
