"""Answers taken apart: thoughts, text, and calls typed by the tools' schemas."""

import json
from html import escape
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_engine.text.tool_calls import ToolCall, call_schema, parse_answer

TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"}, "limit": {"type": "integer"}, "score": {"type": "number"},
                "exact": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}},
                "filter": {"type": "object"}, "page": {"type": ["integer", "null"]}, "mode": {"enum": ["fast", 2]},
                "either": {"anyOf": [{"type": "string"}, {"type": "number"}]},
            },
        },
    },
}  # fmt: skip


def call(name: str = "search", **arguments: str) -> str:
    inner = "".join(f"<parameter={key}>{value}</parameter>" for key, value in arguments.items())
    return f"<tool_call><function={name}>{inner}</function></tool_call>"


def arguments(**given: str) -> dict[str, Any]:
    [found] = parse_answer(call(**given), [TOOL]).tool_calls
    json.dumps(found.to_json(), allow_nan=False)
    return found.arguments


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("query", "42", "42"), ("query", "a &lt;b&gt; &amp; &quot;c&quot;", 'a <b> & "c"'), ("query", "", ""),
        ("query", "\nline one\n line two\n", "line one\n line two"), ("query", "  kept  ", "  kept  "),
        ("limit", "5", 5), ("limit", " 7 ", 7), ("limit", "5.0", 5), ("limit", "5.5", "5.5"), ("limit", "many", "many"),
        ("limit", str(10**30), 10**30), ("score", "0.5", 0.5), ("score", "3", 3), ("score", "1e400", "1e400"),
        ("score", "nan", "nan"),
        ("exact", "true", True), ("exact", "False", False), ("exact", "yes", "yes"),
        ("tags", '["a", "b"]', ["a", "b"]), ("tags", "[&quot;a&quot;]", ["a"]), ("tags", "{}", "{}"), ("tags", "[", "["),
        ("filter", '{"a": {"b": 1}}', {"a": {"b": 1}}), ("filter", "[NaN]", "[NaN]"), ("filter", '{"a": NaN}', '{"a": NaN}'),
        ("page", "null", None), ("page", "3", 3), ("mode", "fast", "fast"), ("mode", "2", 2),
        ("either", "1.5", 1.5), ("either", "word", "word"), ("unknown", "5", "5"),
    ],
)  # fmt: skip
def test_values_are_typed_by_the_schema(key: str, text: str, value: Any) -> None:
    found = arguments(**{key: text})[key]
    assert found == value
    assert type(found) is type(value)


def test_parts_of_an_answer() -> None:
    text = f"<think>\nLet me see.\n</think>\nI will look.\n{call(query='a')}\n{call(query='b', limit='2')}\nDone."
    message = parse_answer(text, [TOOL])
    assert message.thinking == "Let me see."
    assert message.content == "I will look.\n\n\nDone."
    assert message.tool_calls == (
        ToolCall("search", {"query": "a"}),
        ToolCall("search", {"query": "b", "limit": 2}),
    )


def test_prompt_that_ended_in_think() -> None:
    assert parse_answer("hmm</think>yes", thinking=True).thinking == "hmm"
    assert parse_answer("hmm</think>yes", thinking=True).content == "yes"
    assert parse_answer("<think>hmm</think>yes", thinking=True).content == "yes"
    unfinished = parse_answer("hm", thinking=True)
    assert (unfinished.thinking, unfinished.content) == ("hm", "")
    assert parse_answer("<think>cut").thinking == "cut"
    assert parse_answer("<think></think>yes").thinking == ""
    assert parse_answer("no thoughts").thinking is None
    assert parse_answer("the tag <think> is text here").content == "the tag <think> is text here"


def test_calls_in_thoughts_and_unfinished_ones_are_text() -> None:
    assert parse_answer(f"<think>{call(query='x')}</think>no", [TOOL]).tool_calls == ()
    for cut in ("</tool_call>", "</function></tool_call>"):
        text = call(query="x").removesuffix(cut)
        message = parse_answer(text, [TOOL])
        assert (message.tool_calls, message.content) == ((), text)


def test_layouts_and_schemas_of_other_makes() -> None:
    spread = "<tool_call>\n<function=search>\n<parameter=limit>\n3\n</parameter>\n</function>\n</tool_call>"
    for tools in ([TOOL], [TOOL["function"]]):
        assert parse_answer(spread, tools).tool_calls == (ToolCall("search", {"limit": 3}),)  # type: ignore[arg-type]
    assert parse_answer(spread).tool_calls == (ToolCall("search", {"limit": "3"}),)
    assert parse_answer(call("other"), [TOOL, {"name": "other"}]).tool_calls == (ToolCall("other", {}),)


@given(st.text())
def test_any_string_survives(value: str) -> None:
    value = value.removeprefix("\n").removesuffix("\n")
    text = escape(value)
    if "\r" in value or text != text.removeprefix("\n").removesuffix("\n"):
        return
    assert arguments(query=text) == {"query": value}


@given(st.text())
def test_any_answer_parses(text: str) -> None:
    parse_answer(text, [TOOL])
    parse_answer(text, [TOOL], thinking=True)


# ---- the schema of a call ---------------------------------------------------------------------------------------------


def test_tools_are_closed_unless_they_say_otherwise() -> None:
    inner = {"type": "object", "properties": {"c": {"type": "integer"}}}
    parameters = {
        "properties": {"a": inner, "b": {"type": "array", "items": inner}, "free": {"type": "object"}},
        "$defs": {"d": inner},
    }
    [arguments] = [call_schema([{"name": "f", "parameters": parameters}])["properties"]["arguments"]]
    assert arguments["additionalProperties"] is False
    for part in (arguments["properties"]["a"], arguments["properties"]["b"]["items"], arguments["$defs"]["d"]):
        assert part["additionalProperties"] is False
    assert "additionalProperties" not in arguments["properties"]["free"], "it lists nothing, so it takes anything"
    opened = call_schema([{"name": "f", "parameters": {**parameters, "additionalProperties": True}}])
    assert opened["properties"]["arguments"]["additionalProperties"] is True
    assert call_schema([{"name": "f"}])["properties"]["arguments"]["additionalProperties"] is False


def test_parts_of_a_composition_stay_open() -> None:
    half = {"properties": {"a": {"type": "integer"}}}
    arguments = call_schema([{"name": "f", "parameters": {"allOf": [half, half]}}])["properties"]["arguments"]
    assert "additionalProperties" not in arguments
    assert arguments["allOf"] == [half, half]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({}, "an object, not a list"), ("ab", "a text"), (3, "a number"), (None, "null"), ([], "at least one"),
        (["a"], "tool 1 is a text"), ([TOOL, {}], "tool 2 has no name"), ([{"function": []}], "tool 1 is a list"),
        ([{"name": "f", "parameters": []}, 1], "tool 2 is a number"), ([{"name": "f", "parameters": "x"}], "of tool 1, f"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_tools(tools: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call_schema(tools)


@pytest.mark.parametrize("others", [0, 2])
def test_references_within_a_tool_are_found_in_its_call(others: int) -> None:
    """As pydantic writes nested models: they begin at the root of the parameters, which is not the call's."""
    node = {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["kids"],
    }
    parameters = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {"node": node},
    }
    tools = [*({"name": f"t{index}"} for index in range(others)), {"name": "grow", "parameters": parameters}]
    schema = call_schema(tools)
    jsonschema.validate({"name": "grow", "arguments": {"root": {"kids": [{"kids": []}]}}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "grow", "arguments": {"root": {"kids": [{}]}}}, schema)
