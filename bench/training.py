"""Speed of writing dialogues and of training MTP layers on them, as tokens/s and as a share of the device's bf16 peak.

    python bench/training.py --device cuda
    python bench/training.py --device cuda --drafted 16384
    python bench/training.py --rows 8 --row-length 128 --steps 4

FLOPs are those of training/plan.py: forward of the main model and its head, forward and backward of the layers and their
heads; attention is not counted. Writing counts forward products only, so it is bound by reading keys and values. With as many
steps as by default no row comes twice, of which the main model's states would be known.
"""

import json
import tempfile
import time
from pathlib import Path

import click
import torch
from common import COUNT, SOME, conditions, require_commit, run

from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.training.dialogues import DialogueSettings
from mtp_engine.training.job import Job
from mtp_engine.training.objective import Objective
from mtp_engine.training.plan import PEAK_BF16
from mtp_engine.training.run import Training, plan
from mtp_engine.training.trainer import TrainSettings


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--shards", default=2, type=SOME, show_default=True, help="The first also compiles, and is not timed.")
@click.option("--rows", default=2048, type=SOME, show_default=True)
@click.option("--row-length", default=768, type=SOME, show_default=True)
@click.option("--batch-tokens", default=41_472, type=SOME, show_default=True)
@click.option(
    "--drafted", default=0, type=COUNT, show_default=True, help="Tokens to draft, the most frequent; 0 is all."
)
@click.option("--steps", default=60, type=SOME, show_default=True, help="The first third is not timed.")
@click.option("--device", default="cpu", show_default=True)
def main(
    model: str,
    prompts: Path | None,
    shards: int,
    rows: int,
    row_length: int,
    batch_tokens: int,
    drafted: int,
    steps: int,
    device: str,
) -> None:
    commit = require_commit()
    with tempfile.TemporaryDirectory() as folder:
        written: list[tuple[float, int]] = []

        def progress(what: str, done: int, total: int | None) -> None:
            if what.startswith("writing"):
                written.append((time.perf_counter(), done))

        dialogues = DialogueSettings(shards=shards, rows=rows, length=row_length, prompts=prompts)
        settings = TrainSettings(
            steps,
            batch_tokens,
            Objective(acceptance=0.5, reach=0.7, drafted=drafted),
            log_every=max(1, steps // 3),
            evaluate_every=steps + 1,
        )
        job = Job(
            model, Path(folder) / "out", Path(folder) / "data", dialogues=dialogues, settings=settings, device=device
        )
        training = Training(job, progress)
        later = [(t, done) for t, done in written if done >= rows * row_length] if shards > 1 else written
        writing = (later[-1][1] - later[0][1]) / max(later[-1][0] - later[0][0], 1e-9)
        reports = list(training.run())
        flops = plan(job).flops
        counts = torch.bincount(training.corpus.kinds.flatten(), minlength=4).tolist()
    speed = min(report.tokens_per_s for report in reports[1:])
    peak = next((value for name, value in PEAK_BF16.items() if name in conditions(commit, device)["device"]), None)
    record = {
        "bench": "training", "model": model, "rows": rows, "row_length": row_length, "batch_tokens": batch_tokens,
        "drafted": drafted, "writing_tokens_per_s": round(writing), "training_tokens_per_s": round(speed),
        "flops_per_token": flops,
        "training_share_of_bf16_peak": round(speed * flops / peak, 4) if peak else None,
        "kinds": dict(zip(("padding", "given", "answer", "loop"), counts, strict=True)),
    }  # fmt: skip
    click.echo(json.dumps(record | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
