"""Reading safetensors folders: checked, parallel, and clear about what is wrong with which file.

Tensors are read straight into the memory where they stay; nothing is mapped, so a file never counts as ours.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mtp_engine.errors import EngineError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PIECE = 8 << 20  # bytes that one thread reads at a time
_BAND = 1 << 20  # bytes of rows of which some columns are taken; they stay in a cache meanwhile
_LONGEST_HEADER = 100 << 20
_Piece = tuple[Path, int, memoryview]  # a file, an offset in it, and where its bytes go


@final
@dataclass(frozen=True)
class Part:
    """What is read of tensor `name`, which has this shape: some of its rows (None: all) and, of a matrix, some columns."""

    name: str
    shape: tuple[int, ...]
    rows: range | None = None
    columns: range | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the part."""
        cuts = (self.rows, self.columns)
        return tuple(n if cut is None else len(cut) for n, cut in zip_longest(self.shape, cuts[: len(self.shape)]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises EngineError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: the folder is not a complete model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise EngineError(f"{path} does not hold a JSON object")
    return value


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """torch.empty; on a CPU from numpy, which asks for huge pages: filling fresh memory is twice as fast with them."""
    if (device is not None and device.type != "cpu") or 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(tuple(shape))


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, from the folder's *.safetensors.index.json; empty if there is none."""
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise EngineError(f"{path}: weight_map is missing or names no files; fetch the file again")
        where |= weight_map
    return where


@final
@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: bytes start..end of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@final
class Checkpoint:
    """The tensors of a folder of safetensors files. Only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = read_index(folder)
        self._entries: dict[str, _Entry] = {}
        for file in self._list_files():
            self._entries |= _header(file)

    def _list_files(self) -> Sequence[Path]:
        missing = sorted(name for name in set(self._index.values()) if not (self.folder / name).is_file())
        if missing:
            raise EngineError(f"{self.folder / missing[0]} is missing: the index lists it; fetch the model again")
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise EngineError(f"{self.folder} holds no .safetensors file; pickled weights are not read")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            file = self.folder / self._index[name] if name in self._index else self.folder
            raise EngineError(f"{file}: tensor {name} is missing")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored_dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, F8_E4M3, ..."""
        return self._entry(name).dtype

    def torch_dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise EngineError(f"{entry.file}: tensor {name} is stored as {entry.dtype}, which is not supported")
        return _DTYPES[entry.dtype]

    def error(self, name: str, problem: str) -> EngineError:
        """An error about tensor `name`, naming its file."""
        return EngineError(f"{self._entry(name).file}: tensor {name} {problem}")

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises EngineError if the tensor is absent or has another shape."""
        found = self.shape(name)
        if found != tuple(shape):
            raise self.error(name, f"has shape {list(found)}; config.json calls for {list(shape)}")

    def raw(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor as it is stored, on the CPU. Raises EngineError if absent or misshapen."""
        return self.part(Part(name, tuple(shape)))

    def part(self, part: Part) -> Tensor:
        """Part of a tensor as it is stored, on the CPU. Raises EngineError if the tensor is absent or misshapen."""
        self.check(part.name, part.shape)
        tensor = empty(part.size, self.torch_dtype(part.name))
        self.fill([(part, tensor)])
        return tensor

    def fill(self, targets: Iterable[tuple[Part, Tensor]]) -> None:
        """Read parts of tensors into contiguous CPU tensors of their sizes and the stored dtypes, several threads at a time.

        Of a matrix of which some columns are wanted whole rows are read, a few at a time, and the columns taken from them.
        """
        pieces: list[_Piece] = []
        strips: list[tuple[_Entry, Part, Tensor]] = []
        for part, tensor in targets:
            self.check(part.name, part.shape)
            assert tensor.is_contiguous()
            assert tensor.shape == part.size
            assert (tensor.dtype, tensor.device.type) == (self.torch_dtype(part.name), "cpu")
            entry = self._entry(part.name)
            if tensor.numel() and part.columns is not None and len(part.columns) < part.shape[1]:
                strips.append((entry, part, tensor))
            elif tensor.numel():
                data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
                begin = entry.start + (part.rows.start * (len(data) // len(part.rows)) if part.rows else 0)
                starts = range(0, len(data), _PIECE)
                pieces += [(entry.file, begin + start, data[start : start + _PIECE]) for start in starts]
        batches = _batches(sorted(pieces, key=lambda piece: piece[:2]))  # in the order in which a disk holds them
        work: list[Callable[[], None]] = [partial(_read, batch) for batch in batches]
        work += [partial(_read_columns, *strip) for strip in strips]
        if len(work) == 1:  # not worth starting threads
            work[0]()
        elif work:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(lambda each: each(), work))


def _batches(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Neighbours together, up to about _PIECE bytes of one file."""
    batches: list[list[_Piece]] = []
    size = 0
    for piece in pieces:
        if not batches or size + len(piece[2]) > _PIECE or batches[-1][0][0] != piece[0]:
            batches.append([])
            size = 0
        batches[-1].append(piece)
        size += len(piece[2])
    return batches


def _read(pieces: Sequence[_Piece]) -> None:
    """All of them from the same file."""
    file = pieces[0][0]
    try:
        handle = os.open(file, os.O_RDONLY)
        try:
            for _, offset, target in pieces:
                while target:
                    if (count := os.preadv(handle, [target], offset)) == 0:
                        raise EngineError(f"{file} is cut short: it ends at byte {offset}; fetch it again")
                    target, offset = target[count:], offset + count
        finally:
            os.close(handle)
    except OSError as error:
        raise EngineError(f"{file}: cannot be read: {error.strerror}") from None


def _read_columns(entry: _Entry, part: Part, target: Tensor) -> None:
    """Some columns of some rows of a matrix; target: [rows, columns]."""
    assert part.columns is not None
    width = (entry.end - entry.start) // part.shape[0]  # bytes of a whole row
    item, first = width // part.shape[1], part.rows.start if part.rows else 0
    taken, out = slice(part.columns.start * item, part.columns.stop * item), target.view(torch.uint8).numpy()
    band = np.empty((min(max(1, _BAND // width), len(out)), width), np.uint8)
    for start in range(0, len(out), len(band)):
        rows = band[: len(out) - start]
        _read([(entry.file, entry.start + (first + start) * width, rows.reshape(-1).data)])
        out[start : start + len(rows)] = rows[:, taken]


def _header(file: Path) -> dict[str, _Entry]:
    """What a safetensors file holds. Raises EngineError if it is damaged or cut short.

    The format: 8 bytes with the header's length, a JSON header, then the tensors without gaps.
    """
    damaged = f"{file} is damaged or cut short ({{}}); fetch it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise EngineError(damaged.format("no header"))
            header = json.loads(stream.read(length))
        entries, ends = {}, [0]
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = about["data_offsets"]
            entry = _Entry(file, about["dtype"], tuple(about["shape"]), 8 + length + start, 8 + length + end)
            dtype = _DTYPES.get(entry.dtype)
            if start > end or (dtype is not None and end - start != prod(entry.shape) * dtype.itemsize):
                raise EngineError(damaged.format(f"tensor {name} has {end - start} bytes"))
            entries[name] = entry
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(damaged.format(f"its header is not valid: {error}")) from None
    except OSError as error:
        raise EngineError(f"{file}: cannot be read: {error.strerror}") from None
    if size != 8 + length + max(ends):
        raise EngineError(damaged.format(f"{size:,} bytes instead of {8 + length + max(ends):,}"))
    return entries
