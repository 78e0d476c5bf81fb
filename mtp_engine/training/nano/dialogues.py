"""`python -m mtp_engine.training.nano.dialogues`: have another model write the text that mimo-nano is trained on."""

from pathlib import Path

import click
import torch

from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub import hub
from mtp_engine.models import loader
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training.dialogues import DialogueSettings, shares, write_dialogues
from mtp_engine.training.nano.prompts import write_prompts


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--writer", default=DEFAULT_MODEL, show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=8192, show_default=True, help="Answers in a shard.")
@click.option("--temperatures", default="0:0.2,0.3:0.4,0.5:0.4", show_default=True, metavar="T:SHARE,..")
@click.option("--device", default="cuda", show_default=True)
def main(folder: Path, writer: str, shards: int, rows: int, temperatures: str, device: str) -> None:
    """Write SHARDS x ROWS answers to templated prompts into FOLDER, few of them above temperature 0.5: at 0.7 a model of this
    size drifts into nonsense, and at 0 it repeats itself. Shards that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.jsonl"
    write_prompts(file, shards * rows * 21 // 20)  # one in 64 is held out
    settings = DialogueSettings(
        shards, rows, 256, temperatures=shares(temperatures), max_answer=220, follow_up=0.0, prompts=file,
        prompt_share=1.0, batch=rows,
    )  # fmt: skip
    source = hub.locate(writer).folder
    model = loader.load_main(
        source, torch.bfloat16 if device == "cuda" else torch.float32, torch.device(device), hub.silent
    )
    click.echo(write_dialogues(model, Tokenizer.load(source), settings, folder, progress=hub.silent))


if __name__ == "__main__":
    main()
