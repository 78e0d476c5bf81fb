"""Reading config.json field by field: whatever is wrong is an error that names file and field."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, final

from mtp_engine.errors import EngineError

_T = TypeVar("_T")


@final
class Fields:
    """The fields of a JSON object. A field that is null counts as missing; without a default that is an error."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw, self.where = raw, where

    def error(self, name: str, problem: str) -> EngineError:
        return EngineError(f"{self.where}: {name} {problem}")

    def _get(self, name: str, kinds: type | tuple[type, ...], what: str, default: _T | None) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _tuple(kinds)):
            raise self.error(name, f"is {value!r}, not {what}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = int(self._get(name, int, "a whole number", default))
        if value < least:
            raise self.error(name, f"is {value}; it must be at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = float(self._get(name, (int, float), "a number", default))
        if not (0 < value < math.inf):
            raise self.error(name, f"is {value}; it must be above 0 and finite")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        return bool(self._get(name, bool, "true or false", default))

    def mapping(self, name: str) -> "Fields":
        """A nested object, empty where there is none; its errors read name.field."""
        value = self._get(name, dict, "an object", {})
        return Fields({f"{name}.{key}": item for key, item in value.items()}, self.where)

    def switches(self, name: str, count_name: str, count: int) -> list[bool]:
        """A list of zeros and ones, one per layer."""
        value = self._get(name, list, "a list", None)
        if len(value) != count:
            raise self.error(name, f"has {len(value)} entries, but {count_name} is {count}")
        if wrong := next((item for item in value if item not in (0, 1)), None):
            raise self.error(name, f"holds {wrong!r}; entries are 0 or 1")
        return [bool(item) for item in value]

    def only(self, name: str, *allowed: Any, required: bool = False) -> None:
        """Refuse a field whose value the engine does not implement."""
        if name not in self.raw:
            if required:
                raise self.error(name, "is missing")
        elif self.raw[name] not in allowed:
            known = ", ".join(map(repr, allowed))
            raise self.error(name, f"= {self.raw[name]!r} is not supported (only {known})")

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.raw.get(name)
        return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
