"""Options that are fields of a dataclass: type and default come from there and are written down once."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


def setting(
    cls: type, name: str, text: str, *, kind: "click.ParamType[Any] | type | None" = None, unset: str = ""
) -> Any:
    """A click option `--name` for field `name` of dataclass `cls`. `unset` says in the help what the default does."""
    default = next(field.default for field in fields(cls) if field.name == name)
    assert default is not MISSING, f"{cls.__name__}.{name} has no default"
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is Literal:
        kind = click.Choice([str(choice) for choice in get_args(hint)])
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=kind or hint,
        default=default,
        show_default=unset or True,
        help=text,
    )


def settings(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Several options as one decorator, in the order in which --help shows them."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def build(cls: Callable[..., _T], given: Mapping[str, Any], **fixed: Any) -> _T:
    """The dataclass `cls` from those of the given options that are its fields. Raises EngineError as `cls` does."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in given.items() if name in names}, **fixed)
