"""Two makings of mimo-nano on the same held-out prompts: how much they repeat themselves, and what their drafts are worth.

    python bench/nano.py mimo-nano NEW --held-out NEW.training/held_out.json

repeated: share of the runs of five words in answers at T = 0 that stood in their answer before; the difference of the two with
95% of an interval over prompts. ended: share of answers that came to their end by themselves. Bits per byte are those of the
given texts, which the model that wrote them (--reference) is measured by, too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import SOME, conditions, require_commit, run

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.training.nano.report import evaluate
from mtp_engine.training.nano.text import Dialogue, repeated

_DRAWS = 10_000


def answers(
    model: str, config: EngineConfig, prompts: Sequence[str], tokens: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Runs said again and all runs of every answer, [P, 2]; and how long answers are."""
    with Engine.load(model, config) as engine:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        found = engine.generate(chats, SamplingParams(max_tokens=tokens))
    counts = np.array([repeated(answer.text) for answer in found])
    ended = np.mean([answer.finish_reason == "stop" for answer in found])
    return counts, {
        "repeated": round(float(counts[:, 0].sum() / counts[:, 1].sum()), 4),
        "answers_with_a_repetition": round(float((counts[:, 0] > 0).mean()), 4),
        "words": round(float(np.mean([len(answer.text.split()) for answer in found])), 1),
        "ended": round(float(ended), 4),
    }


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Of the shares, with an interval over prompts drawn again."""
    drawn = np.random.default_rng(0).integers(len(first), size=(_DRAWS, len(first)))

    def share(counts: np.ndarray) -> np.ndarray:
        sums = counts[drawn].sum(1)
        return sums[:, 0] / sums[:, 1]

    low, high = np.quantile(share(second) - share(first), [0.025, 0.975])
    apart = second[:, 0].sum() / second[:, 1].sum() - first[:, 0].sum() / first[:, 1].sum()
    return {"repeated": round(float(apart), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--held-out", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--prompts", "count", default=256, type=SOME, show_default=True, help="Whose answers are compared.")
@click.option("--tokens", default=200, type=SOME, show_default=True)
@click.option("--texts", default=256, type=SOME, show_default=True, help="For bits per byte.")
@click.option("--reference", default="", help="The model that wrote the texts.")
@click.option("--device", default="cpu", show_default=True)
def main(
    first: str, second: str, held_out: Path, count: int, tokens: int, texts: int, reference: str, device: str
) -> None:
    commit = require_commit()
    dialogues: list[Dialogue] = [
        (prompt, answer) for prompt, answer in json.loads(held_out.read_text(encoding="utf-8"))
    ]
    prompts = [prompt for prompt, _ in dialogues[:count]]
    config = EngineConfig(device=device, dtype="fp32", attention="torch", max_batch=32, max_context=1024,
                          tree=TreeShape.parse("chain:3"))  # fmt: skip
    again, every = np.sum([repeated(answer) for _, answer in dialogues], 0)
    result: dict[str, Any] = {"bench": "nano", "prompts": len(prompts), "tokens": tokens, "models": {}}
    result["repeated_in_the_held_out_texts"] = round(float(again / every), 4)
    counts = []
    for model in (first, second):
        found, shape = answers(model, config, prompts, tokens)
        counts.append(found)
        figures, _ = evaluate(
            Path(model), dialogues, config, texts=texts, reference=reference if model == second else ""
        )
        result["models"][model] = shape | {f"card_{name}": value for name, value in asdict(figures).items()}
    click.echo(json.dumps(result | {"difference": difference(*counts)} | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
