"""What processes of one engine tell each other: dataclasses as JSON. Unlike a pickle it is data only: reading it runs nothing."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, final


@final
class Codec:
    """Reads what another one of the same classes wrote."""

    def __init__(self, *classes: type) -> None:
        """classes: dataclasses that may occur, at any depth."""
        self._classes = {each.__name__: each for each in classes}

    def write(self, message: object) -> bytes:
        """Numbers, texts, None, lists, tuples, mappings, paths, and dataclasses of the given classes."""
        return json.dumps(self._pack(message)).encode("ascii")

    def read(self, data: bytes) -> Any:
        return self._unpack(json.loads(data))

    def _pack(self, value: object) -> object:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [type(value).__name__, *(self._pack(each) for each in value)]
        if isinstance(value, Mapping):
            return ["dict", *([self._pack(key), self._pack(each)] for key, each in value.items())]
        if isinstance(value, Path):
            return ["Path", str(value)]
        name = type(value).__name__
        if not is_dataclass(value) or self._classes.get(name) is not type(value):
            raise TypeError(f"a message cannot hold {value!r}")
        return [name, *(self._pack(getattr(value, each.name)) for each in fields(value))]

    def _unpack(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        name, *parts = value
        if name == "dict":
            return {self._unpack(key): self._unpack(each) for key, each in parts}
        made = [self._unpack(each) for each in parts]
        if name in ("list", "tuple"):
            return made if name == "list" else tuple(made)
        return Path(*made) if name == "Path" else self._classes[name](*made)
