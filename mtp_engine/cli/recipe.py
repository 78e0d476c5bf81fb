"""Recipes: the options of a command as a TOML file, so that what was done once can be done again."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mtp_engine.errors import EngineError
from mtp_engine.hub.files import read_toml
from mtp_engine.hub.wheel import sha256_of

_DIGESTS = "sha256"  # the table of what the files held that an option names


def recipe_option(help: str) -> Any:
    """`--recipe FILE`: what is not given on the command line is as the file says."""
    return click.option(
        "--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), is_eager=True, callback=_load,
        expose_value=False, help=help,
    )  # fmt: skip


def _load(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    settings = read_toml(path, "a recipe")
    digests, known, values = settings.pop(_DIGESTS, {}), _parameters(context), {}
    for name, value in settings.items():
        if (parameter := known.get(name.replace("_", "-"))) is None:
            raise EngineError(f"{path}: there is no option {name!r}; {context.command_path} --help names them all")
        many = isinstance(parameter, click.Option) and parameter.multiple
        if isinstance(value, dict) or isinstance(value, list) != many:
            raise EngineError(f"{path}: {name} is {value!r}; it takes {'a list' if many else 'one value'}")
        values[parameter.name] = value
    context.default_map = values
    context.meta[_DIGESTS] = path, digests


def check_files(context: click.Context) -> None:
    """Raises EngineError where a file that a recipe names is not the one that it was written for."""
    path, digests = context.meta.get(_DIGESTS, (None, {}))
    for name, parameter in _parameters(context).items():
        wanted = digests.get(name) if isinstance(digests, dict) else None
        if not wanted or context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT_MAP:
            continue  # nothing is known of it, or another one is given
        for file, digest in zip(_files(context.params[parameter.name]), wanted, strict=False):
            if sha256_of(file) != digest:
                raise EngineError(
                    f"{file} is not the file that {path} was written for (its sha256 was {digest}): find that one, or give "
                    f"--{name} to use another"
                )


def recipe(context: click.Context, without: Collection[str]) -> str:
    """The options of a command that runs, but for some, as a recipe, with the digests of the files among them."""
    lines, digests = list[str](), list[str]()
    for name, parameter in _parameters(context).items():
        value = context.params.get(parameter.name or "")
        if name in without or value is None or value == ():
            continue
        files = _files(value)
        text = [str(each) for each in value] if isinstance(value, tuple) else str(value) if files else value
        lines.append(f"{name} = {json.dumps(text)}\n")  # TOML reads it alike
        if found := [sha256_of(file) for file in files if file.is_file()]:
            digests.append(f"{name} = {json.dumps(found)}\n")
    return "".join([*lines, *([f"\n[{_DIGESTS}]\n", *digests] if digests else [])])


def _parameters(context: click.Context) -> dict[str, click.Parameter]:
    """By what a user calls them: the longest spelling of an option, without its dashes."""
    return {max(each.opts, key=len).lstrip("-"): each for each in context.command.params}


def _files(value: Any) -> list[Path]:
    return [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Path)]
