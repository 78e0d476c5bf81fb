"""What the prefix cache gives and what it costs.

    python bench/prefix.py --prompts ../shared/prompts/spec-bench.jsonl --model mimo-nano
    python bench/prefix.py --prompts ../shared/prompts/spec-bench.jsonl --device cuda --parts equal,beside

first: time to first token of a prompt, and of a second one that shares its first 1,960 tokens. chat: tokens that ten turns
read. replay: 200 requests with 20 system prompts in random order. overhead: the same prompts, none of which share anything,
with and without the cache, in turns. equal: prompts as misses, as hits and preempted (see --kv-tokens) against plain
decoding. beside: decoding while other requests end and begin, whose states are copied, with and without the cache.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import conditions, encode, read_prompts, require_commit

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.config import DEFAULT_MODEL

SHARED = 1960  # tokens: with a question and an answer they fit a context of 2,048
ANSWER = SamplingParams(max_tokens=48, seed=1, ignore_eos=True)


class Texts:
    """Prompts of real words of any length, made of a file's prompts in turns."""

    def __init__(self, engine: Engine, rows: Sequence[dict[str, Any]]) -> None:
        self.tokens = [token for row in rows for token in engine.encode("\n\n".join(row["turns"]))]

    def __call__(self, number: int, length: int) -> list[int]:
        """Texts of different numbers begin differently."""
        start = (number * 7919) % (len(self.tokens) - length)
        return self.tokens[start : start + length]


def first_tokens(load: Callable[..., Engine], texts: Texts, repeats: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of SHARED + 1 tokens, of one that goes on from there, and of one that leaves it
    there for something else; each median of `repeats` engines' worth of different texts."""
    firsts, seconds, thirds = [], [], []
    with load() as engine:
        engine.generate([texts(99, 300)], ANSWER)  # what is slow once
        for number in range(repeats):
            text = texts(number, SHARED + 40)
            for found, prompt in (
                (firsts, text[: SHARED + 20]),
                (seconds, text[:SHARED] + texts(50 + number, 20)),
                (thirds, text[:SHARED] + texts(70 + number, 20)),
            ):
                found.append(engine.generate([prompt], ANSWER)[0].stats.ttft_s)
    return {
        "first_s": median(firsts), "second_s": median(seconds), "third_s": median(thirds),
        "second_over_first": median(b / a for a, b in zip(firsts, seconds, strict=True)),
        "third_over_first": median(b / a for a, b in zip(firsts, thirds, strict=True)),
    }  # fmt: skip


def chat(load: Callable[..., Engine], texts: Texts) -> dict[str, float]:
    """Ten turns of a chat with a long beginning: tokens that were read, and those that the user wrote and an answer's last,
    which nothing has computed yet. The last token of a prompt is not read, but the root of the first step."""
    text, read = texts(0, 600), 0
    with load() as engine:
        for turn in range(10):
            [answer] = engine.generate([text], ANSWER)
            read += len(text) - 1 - answer.stats.cached_tokens
            text = [*text, *answer.token_ids, *texts(turn + 1, 20)]
    return {"read": read, "new": 599 + 9 * 20}


def replay(load: Callable[..., Engine], texts: Texts) -> dict[str, float]:
    """Of the tokens that somebody had read before, how many were not read again."""
    rng = random.Random(1)
    systems = [texts(number, rng.randrange(300, 1200)) for number in range(20)]
    order = [number % 20 for number in range(200)]
    rng.shuffle(order)
    prompts = [systems[which] + texts(1000 + at, rng.randrange(10, 60)) for at, which in enumerate(order)]
    possible = sum(len(systems[which]) for at, which in enumerate(order) if which in order[:at])
    with load(max_batch=8) as engine:
        answers = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        cache = engine.loop.memory.prefix
        assert cache is not None
        cached = sum(min(a.stats.cached_tokens, len(systems[w])) for a, w in zip(answers, order, strict=True))
        return {"requests": 200, "possible": possible, "cached": cached, "rate": cached / possible,
                "entries": len(cache), "bytes": cache.size}  # fmt: skip


def overhead(load: Callable[..., Engine], texts: Texts, repeats: int, length: int) -> dict[str, Any]:
    """Seconds for the same prompts with the cache over without, in turns in one process."""
    ratios = []
    with load() as on, load(prefix_cache=False) as off:
        for number in range(repeats + 1):
            spent = []
            prompts = [texts(10 * number + i, length) for i in range(4)]
            for engine in (on, off) if number % 2 else (off, on):
                begin = time.perf_counter()
                engine.generate(prompts, ANSWER)
                spent.append(time.perf_counter() - begin)
            if number:  # the first compiles and measures
                ratios.append(spent[0] / spent[1] if number % 2 else spent[1] / spent[0])
    return {"ratio": median(ratios), "ratios": [round(each, 4) for each in sorted(ratios)], "prompt_tokens": length}


def equal(load: Callable[..., Engine], prompts: Sequence[list[int]], max_tokens: int, kv_tokens: int) -> dict[str, Any]:
    """How many answers are those of plain decoding: as misses, as hits of whole prompts and of answers, and preempted."""
    found: dict[str, Any] = {"cases": len(prompts) * 2}
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1)
        with load(drafter="root", prefix_cache=False, max_batch=1) as plain:
            expected = [answer.token_ids for answer in plain.generate(prompts, params)]
        with load(max_batch=8) as engine, load(max_batch=8, kv_tokens=kv_tokens) as starved:
            misses, hits = (engine.generate(prompts, params) for _ in range(2))
            runs = {"misses": misses, "hits": hits, "preempted": starved.generate(prompts, params)}
            for name, answers in runs.items():
                same = sum(a.token_ids == text for a, text in zip(answers, expected, strict=True))
                found[name] = found.get(name, 0) + same
            found["same_steps"] = found.get("same_steps", 0) + sum(
                a.stats.steps == b.stats.steps for a, b in zip(misses, hits, strict=True)
            )
            found["hit_tokens"] = found.get("hit_tokens", 0) + sum(a.stats.cached_tokens for a in hits)
            found["preemptions"] = found.get("preemptions", 0) + sum(a.stats.preemptions for a in runs["preempted"])
    return found


def beside(load: Callable[..., Engine], texts: Texts, repeats: int) -> dict[str, Any]:
    """Tokens a second of four long answers while four slots take a new request of 16 tokens and 16 more again and again:
    each is saved twice. With the cache over without."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    with load(max_batch=8) as on, load(max_batch=8, prefix_cache=False) as off:
        for repeat in range(repeats + 1):
            for kept, engine in ((True, on), (False, off)):
                prompts = [texts(1000 * repeat + i, 64) for i in range(4)]
                others = [texts(1000 * repeat + 100 + i, 16) for i in range(96)]
                long = [SamplingParams(max_tokens=384, seed=1, ignore_eos=True)] * 4
                short = [SamplingParams(max_tokens=16, seed=1, ignore_eos=True)] * 96
                begin = time.perf_counter()
                answers = engine.generate([*prompts, *others], [*long, *short])
                spent = time.perf_counter() - begin
                if repeat:
                    rates[kept].append(sum(len(a.token_ids) for a in answers) / spent)
        cache = on.loop.memory.prefix
        assert cache is not None
        entries, size = len(cache), cache.size
    pairs = sorted(a / b for a, b in zip(rates[True], rates[False], strict=True))
    return {"tokens_per_s": median(rates[True]), "without": median(rates[False]), "ratio": median(pairs),
            "ratios": [round(each, 3) for each in pairs], "entries": entries, "bytes": size}  # fmt: skip


@click.command()
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path),
              default=Path(__file__).parent / "prompts/bench_core.jsonl", show_default=True)  # fmt: skip
@click.option("--parts", default="first,chat,replay,overhead", show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, help="0: one per core.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--limit", default=40, show_default=True, help="Prompts that `equal` compares.")
@click.option("--kv-tokens", default=3600, show_default=True, help="Room of the run that is preempted.")
@click.option("--overhead-tokens", default=300, show_default=True, help="Prompt length of `overhead`.")
def main(path: Path, parts: str, model: str, device: str, threads: int, repeats: int, limit: int, kv_tokens: int,
         overhead_tokens: int) -> None:  # fmt: skip
    commit = require_commit()
    small = model == "mimo-nano"

    def load(**options: Any) -> Engine:
        given = {"max_context": 2048 + (0 if small else 1024), "device": device, "threads": threads, "max_batch": 1,
                 "dequantize": small and device == "cpu", "prefix_cache_gb": 4.0, **options}  # fmt: skip
        return Engine.load(model, EngineConfig(**given))

    with load() as engine:
        rows = read_prompts(path)
        texts, chosen = Texts(engine, rows), [tokens for _, tokens in encode(engine, read_prompts(path, limit), 1200)]
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "first": lambda: first_tokens(load, texts, repeats),
        "chat": lambda: chat(load, texts),
        "replay": lambda: replay(load, texts),
        "overhead": lambda: overhead(load, texts, repeats, overhead_tokens),
        "equal": lambda: equal(load, chosen, 128, kv_tokens),
        "beside": lambda: beside(load, texts, repeats),
    }
    results = {}
    for part in parts.split(","):
        if part not in run:
            raise click.UsageError(f"there is no part {part!r}: choose from {', '.join(run)}")
        results[part] = run[part]()
        click.echo(f"{part}: {json.dumps(results[part])}", err=True)
    click.echo(json.dumps({"bench": "prefix", "model": model, **results, **conditions(commit, device)}))


if __name__ == "__main__":
    main()
