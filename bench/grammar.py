"""Structured output: how many answers are valid, and how fast, with and without speculation.

python bench/grammar.py --count 40            # 5 schemas x 40 answers
"""

import json
import time

import click
from common import COUNT, SOME, conditions, require_commit, run
from jsonschema import ValidationError, validate
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL, Structure
from mtp_engine.text.tool_calls import call_schema


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_WORD, _DIGIT = {"type": "string", "maxLength": 16}, {"type": "integer", "minimum": 0, "maximum": 999}
SCHEMAS = {
    "person": _object(name=_WORD, age={"type": "integer", "minimum": 0, "maximum": 120}, student={"type": "boolean"}),
    "list": _object(colours={"type": "array", "items": _WORD, "minItems": 1, "maxItems": 4}),
    "choice": _object(mood={"enum": ["happy", "sad", "angry", "calm"]}, reason={"type": "string", "maxLength": 40}),
    "nested": _object(
        item=_object(title=_WORD, price=_DIGIT), stock=_object(shelf=_DIGIT, free={"type": ["integer", "null"]})
    ),
    "tools": call_schema(
        [
            {
                "name": "weather",
                "parameters": _object(city=_WORD, days={"type": "integer", "minimum": 1, "maximum": 9}),
            },
            {"name": "search", "parameters": _object(query={"type": "string", "maxLength": 30})},
        ]
    ),
}
QUESTION = "Answer in JSON about the first thing that comes to your mind."


def valid(text: str, schema: dict[str, object]) -> bool:
    try:
        validate(json.loads(text), schema)
    except (ValueError, ValidationError):
        return False
    return True


@click.command()
@click.option("--count", default=40, type=SOME, show_default=True, help="Answers per schema.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--tree", default="tree:7", show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--max-tokens", default=200, type=SOME, show_default=True)
@click.option("--batch", default=1, type=SOME, show_default=True)
@click.option("--within", is_flag=True, help="As servers ask for it: whole within --max-tokens.")
@click.option("--plain/--no-plain", default=True, help="Decode without speculation too, and compare the tokens.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
def main(count: int, model: str, tree: str, temperature: float, max_tokens: int, batch: int, within: bool, plain: bool,
         device: str, threads: int) -> None:  # fmt: skip
    commit = require_commit()
    common = {"max_batch": batch, "max_context": 1024, "device": device, "threads": threads}
    engines = {"speculating": Engine.load(model, EngineConfig(tree=TreeShape.parse(tree), **common))}
    if plain:
        engines["plain"] = Engine.load(model, EngineConfig(drafter="root", **common))
    prompt = [{"role": "user", "content": QUESTION}]
    table = Table("schema", "valid", "tokens", "accepted length", *[f"{name} tokens/s" for name in engines])
    results = {}
    for name, schema in SCHEMAS.items():
        structure = Structure(json=json.dumps(schema), within=max_tokens if within else 0)
        wanted = [
            SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, structure=structure)
            for seed in range(count)
        ]
        answers, rates = {}, {}
        for who, engine in engines.items():
            begin = time.perf_counter()
            answers[who] = engine.generate([prompt] * count, wanted)
            rates[who] = sum(a.stats.tokens for a in answers[who]) / (time.perf_counter() - begin)
        drafted = answers["speculating"]
        good = sum(valid(answer.text, schema) for answer in drafted)
        tokens = sum(answer.stats.tokens for answer in drafted)
        length = tokens / sum(answer.stats.steps for answer in drafted)
        results[name] = {
            "valid": good, "tokens": tokens, "accepted_length": round(length, 3), "distinct": len({a.text for a in drafted}),
            "tokens_per_s": {who: round(rate, 2) for who, rate in rates.items()},
            "identical": sum(a.token_ids == b.token_ids for a, b in zip(drafted, answers.get("plain", drafted), strict=True)),
        }  # fmt: skip
        table.add_row(
            name, f"{good}/{count}", f"{tokens}", f"{length:.2f}", *[f"{rate:.1f}" for rate in rates.values()]
        )
    Console().print(table)
    settings = {
        "model": model,
        "tree": tree,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "batch": batch,
        "within": within,
    }
    click.echo(
        json.dumps({"bench": "grammar", **settings, "count": count, "results": results, **conditions(commit, device)})
    )


if __name__ == "__main__":
    run(main)
