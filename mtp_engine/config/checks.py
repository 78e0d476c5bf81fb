"""What the fields of a settings dataclass may hold, read off their annotations."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mtp_engine.errors import EngineError

_NUMBERS: dict[Any, tuple[type, str]] = {int: (Integral, "whole number"), float: (Real, "number")}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class _WrongTypeError(Exception):
    """A value is not what the annotation says."""


def check_types(settings: object) -> None:
    """Check every field of a frozen dataclass against its annotation, and turn its value into the annotation's own type.

    To be called first in __post_init__. Lists and other iterables become tuples, a single text a tuple of one, numpy's
    numbers Python's, and the text of a class with `parse` (a TreeShape) what it parses to. A bool is no number, and a
    number no bool. Raises EngineError that names field, value and what it must be.
    """
    cls: Any = type(settings)
    for name, hint in _hints(cls).items():
        value = getattr(settings, name)
        try:
            object.__setattr__(settings, name, _read(value, hint))
        except _WrongTypeError:
            raise EngineError(f"{name} is {_SHORT.repr(value)}; it must be {_needed(hint)}") from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _read(value: Any, hint: Any) -> Any:
    """The value as `hint` has it. Raises _WrongTypeError where it is something else."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return _read_union(value, inner)
    if origin is tuple:
        return _read_tuple(value, inner[0])
    if origin is Mapping and isinstance(value, Mapping):
        return {_read(key, inner[0]): _read(item, inner[1]) for key, item in value.items()}
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint][0]) and not isinstance(value, bool):
        try:
            return hint(value)
        except OverflowError:  # a whole number beyond all floats
            raise _WrongTypeError from None
    if origin is None and hint not in _NUMBERS and isinstance(value, hint):
        return value
    if isinstance(value, str) and hasattr(hint, "parse"):
        return hint.parse(value)
    raise _WrongTypeError


def _read_union(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _read(value, hint)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _read_tuple(value: Any, hint: Any) -> tuple[Any, ...]:
    if isinstance(value, str) and str in (hint, *get_args(hint)):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise _WrongTypeError
    try:
        items = tuple(value)
    except TypeError:  # an array without dimensions
        raise _WrongTypeError from None
    if set(map(type, items)) <= {hint}:  # the usual case, and fast: a list of allowed tokens may be a whole vocabulary
        return items
    return tuple(_read(item, hint) for item in items)


def _needed(hint: Any, *, several: bool = False) -> str:
    """The annotation in words, for one value or several."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return " or ".join(_needed(each, several=several) for each in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if hint is NoneType:
        return "None"
    if hint is bool:
        return "True or False"
    if origin is tuple:
        word, rest = "tuple", f" of {_needed(inner[0], several=True)}"
    elif origin is Mapping:
        word, rest = "mapping", " from {} to {}".format(*(_needed(each, several=True) for each in inner))
    elif hint in _NUMBERS:
        word, rest = _NUMBERS[hint][1], ""
    else:
        word, rest = "text" if hint is str else hint.__name__, " or its text" if hasattr(hint, "parse") else ""
    return f"{word}s{rest}" if several else f"a {word}{rest}"
