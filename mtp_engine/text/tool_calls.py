"""What a MiMo answer holds: its thoughts, its text, and its tool calls with arguments typed by the tools' schemas.

A call is `<tool_call><function=NAME><parameter=KEY>value</parameter>...</function></tool_call>`; values are
HTML-escaped text.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import Any, final

THINK, END_THINK = "<think>", "</think>"
CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


@final
@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """{"name": ..., "arguments": {...}}, of JSON types only."""
        return {"name": self.name, "arguments": self.arguments}


@final
@dataclass(frozen=True)
class Message:
    """An answer taken apart. thinking is None where there was none; content is the text around the calls."""

    thinking: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]


def parse_answer(text: str, tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool = False) -> Message:
    """Take an answer apart. tools: as given to the chat template, OpenAI's form or the bare function objects.

    thinking: the prompt ended in `<think>`, so the text begins within it. Calls within thoughts, and calls that were
    never finished, are text. A value that its schema's type does not fit stays a string; so does one without a schema.
    """
    thoughts: str | None = None
    head, mark, rest = text.partition(END_THINK)
    opened, tag, inner = head.partition(THINK)
    if thinking and not (tag and not opened.strip()):
        thoughts, text = (head, rest) if mark else (text, "")
    elif tag and not opened.strip():
        thoughts, text = (inner, rest) if mark else (inner, "")
    known = schemas(tools)
    calls = tuple(read_call(match, known) for match in CALL.finditer(text))
    return Message(thoughts.strip() if thoughts is not None else None, CALL.sub("", text).strip(), calls)


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of one call {"name": ..., "arguments": {...}} of any of the tools: as a Structure, tool-call mode.

    tools: as for `parse_answer`. As in OpenAI's strict mode an object takes no other arguments than those its schema
    lists, unless the schema has an `additionalProperties` of its own. Raises ValueError for what is no list of tools.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"it is {_JSON_NAMES.get(type(tools), 'something else')}, not a list of tools")
    if not tools:
        raise ValueError("the list is empty: it needs at least one tool")
    calls = []
    for number, tool in enumerate(tools, 1):
        name, parameters = _function(tool, number)
        arguments = {"type": "object", "properties": {}, **_closed(parameters)}
        if not _COMPOSED & arguments.keys():
            arguments.setdefault("additionalProperties", False)
        where = "/properties/arguments" if len(tools) == 1 else f"/anyOf/{number - 1}/properties/arguments"
        arguments = _moved(arguments, where)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _function(tool: Any, number: int) -> tuple[str, Mapping[str, Any]]:
    """Name and parameters of one tool. Raises ValueError, which says what is wrong with tool `number`."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(function, Mapping):
        raise ValueError(f"tool {number} is {_JSON_NAMES.get(type(function), 'something else')}, not an object")
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not name:
        raise ValueError(f"tool {number} has no name")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"the parameters of tool {number}, {name}, are not the schema of an object")
    return name, parameters


def _moved(schema: Any, where: str) -> Any:
    """The schema with its references to itself as they are once it lies at `where` in another one."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, where) for key, value in schema.items()}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = f"#{where}{reference[1:]}"
        return moved
    return [_moved(each, where) for each in schema] if isinstance(schema, list) else schema


def _closed(schema: Any) -> Any:
    """The schema with every object closed that lists its properties. Parts of a composition are left as they are: each
    of them sees the properties of the others."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(closed.get(key), Mapping):
            closed[key] = {name: _closed(each) for name, each in closed[key].items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(closed.get(key), list):
            closed[key] = [_closed(each) for each in closed[key]]
    if "items" in closed:
        closed["items"] = _closed(closed["items"])
    if "properties" in closed and not _COMPOSED & closed.keys():
        closed.setdefault("additionalProperties", False)
    return closed


def schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schemas of the tools' parameters, by the name of the tool."""
    functions = [tool.get("function", tool) for tool in tools]
    return {str(each.get("name")): (each.get("parameters") or {}).get("properties") or {} for each in functions}


def read_call(match: re.Match[str], known: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    """The call that a match of CALL is, with arguments typed by `schemas`."""
    arguments, schema = {}, known.get(match[1].strip(), {})
    for parameter in _PARAMETER.finditer(match[2]):
        key = parameter[1].strip()
        value = unescape(parameter[2].removeprefix("\n").removesuffix("\n"))
        arguments[key] = _typed(value, schema.get(key) or {})
    return ToolCall(match[1].strip(), arguments)


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    """The value as the first type that fits; text where a string may stand and nothing narrower fits."""
    for kind in sorted(_types(schema), key=lambda kind: kind == "string"):
        try:
            return _READERS[kind](value)
        except (KeyError, ValueError):
            continue
    return value


def _types(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    found = [kinds] if isinstance(kinds, str) else list(kinds)
    for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found += _types(each)
    if not found and "enum" in schema:
        found = [_NAMES[type(item)] for item in schema["enum"] if type(item) in _NAMES]
    return found


def _integer(value: str) -> int:
    number = float(value)
    return int(value) if re.fullmatch(r"\s*[-+]?\d+\s*", value) else _whole(number)


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"{number} is not whole")
    return int(number)


def _number(value: str) -> int | float:
    if re.fullmatch(r"\s*[-+]?\d+\s*", value):
        return int(value)
    number = float(value)
    if not math.isfinite(number):  # JSON has no such thing
        raise ValueError(value)
    return number


def _boolean(value: str) -> bool:
    return {"true": True, "false": False}[value.strip().lower()]


def _null(value: str) -> None:
    if value.strip().lower() not in ("null", "none"):
        raise ValueError(value)


def _container(kind: type) -> Callable[[str], Any]:
    def read(value: str) -> Any:
        found = json.loads(value, parse_constant=_refuse)
        if not isinstance(found, kind):
            raise ValueError(f"not a {kind.__name__}")
        return found

    return read


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_READERS: dict[str, Callable[[str], Any]] = {
    "string": str, "integer": _integer, "number": _number, "boolean": _boolean, "null": _null,
    "object": _container(dict), "array": _container(list),
}  # fmt: skip
_COMPOSED = {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties"}
_JSON_NAMES = {
    dict: "an object", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null",
    list: "a list",
}  # fmt: skip
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
