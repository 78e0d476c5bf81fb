"""What the exported mimo-nano is worth, read back through the engine's own loader; and its model card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F

from mtp_engine.config import EngineConfig, SamplingParams, TreeShape
from mtp_engine.engine import Engine
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training.attention import sequence_hidden
from mtp_engine.training.evaluate import outside_loops
from mtp_engine.training.nano.text import Dialogue, repeated

_BATCH = 16  # dialogues that go through a model together
_LOGITS = 1 << 26  # that exist at a time


@final
@dataclass(frozen=True)
class Loss:
    """Of a model on answers, given their prompts. Nats: with the token that ends an answer."""

    nats: float
    tokens: int
    size: int  # bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.size


@final
@dataclass(frozen=True)
class Figures:
    """What was measured on held-out prompts. accepted_length: chain:3, T = 0, loops left out; equal: of `prompts` answers,
    those that are the same tokens without drafting; repeated: share of their runs of five words that they said before.
    reference_*: another model's on the same text, 0 = not measured."""

    perplexity: float
    bits_per_byte: float
    accepted_length: float
    equal: int
    prompts: int
    repeated: float
    reference_bits_per_byte: float = 0.0


def answer_loss(name: str, dialogues: Sequence[Dialogue], device: torch.device) -> Loss:
    """Of a model's answers, in fp32, after its own chat template. name: as for Engine.load."""
    folder = hub.locate(name).folder
    tokenizer, main = Tokenizer.load(folder), loader.load_main(folder, torch.float32, device, hub.silent)
    bos, total, tokens = len(tokenizer.encode("")), 0.0, 0
    for start in range(0, len(dialogues), _BATCH):
        some = dialogues[start : start + _BATCH]
        prompts = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt, _ in some]
        answers = [[*tokenizer.encode(answer)[bos:], tokenizer.eos_ids[0]] for _, answer in some]
        nats, count = _loss(main, prompts, answers)
        total, tokens = total + nats, tokens + count
    return Loss(total, tokens, sum(len(answer.encode()) for _, answer in dialogues))


@torch.inference_mode()
def _loss(main: Decoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Nats of all answers, and how many tokens these are."""
    length = -(-max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) // 64) * 64
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    counted = torch.zeros(len(prompts), length, dtype=torch.bool)  # rows whose next token is of the answer
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        counted[row, len(prompt) - 1 : end - 1] = True
    tokens, counted = tokens.to(main.embedding.device), counted.to(main.embedding.device)
    hidden = sequence_hidden(main, tokens)[0][counted]
    labels = tokens.roll(-1, 1)[counted]
    total, rows = torch.zeros((), dtype=torch.float64, device=tokens.device), max(1, _LOGITS // main.vocab_size)
    for part, label in zip(hidden.split(rows), labels.split(rows), strict=True):  # type: ignore[no-untyped-call]
        total += F.cross_entropy(main.logits(part), label, reduction="sum")
    return float(total), len(labels)


def evaluate(
    folder: Path, held_out: Sequence[Dialogue], config: EngineConfig, *, texts: int = 512, prompts: int = 96,
    max_tokens: int = 128, reference: str = "",
) -> tuple[Figures, list[Dialogue]]:  # fmt: skip
    """Figures of an exported model on held-out dialogues, and ten of its answers. config: how the engine runs; its
    drafter and tree are set here."""
    drafting = Engine.load(str(folder), replace(config, drafter="mtp", tree=TreeShape.parse("chain:3")))
    device = drafting.model.embedding.device
    loss = answer_loss(str(folder), held_out[:texts], device)
    other = answer_loss(reference, held_out[:texts], device).bits_per_byte if reference else 0.0
    asked = [prompt for prompt, _ in held_out[:prompts]]
    encoded = [drafting.encode([{"role": "user", "content": prompt}]) for prompt in asked]
    length, drafted = outside_loops(drafting, encoded, SamplingParams(max_tokens=max_tokens))
    plain = Engine.load(str(folder), replace(config, drafter="root", tree=None))
    alone = [answer.token_ids for answer in plain.generate(encoded, SamplingParams(max_tokens=max_tokens))]
    shown = asked[:10]
    answers = drafting.generate([[{"role": "user", "content": p}] for p in shown], SamplingParams(max_tokens=256))
    figures = Figures(
        loss.perplexity, loss.bits_per_byte, length, sum(a == b for a, b in zip(drafted, alone, strict=True)),
        len(asked), repetition(drafting.tokenizer, drafted), other,
    )  # fmt: skip
    return figures, [(p, answer.text) for p, answer in zip(shown, answers, strict=True)]


def repetition(tokenizer: Tokenizer, answers: Sequence[Sequence[int]]) -> float:
    """Share of all answers' runs of five words that stood in their answer before."""
    counts = [repeated(tokenizer.decode(answer)) for answer in answers]
    return sum(again for again, _ in counts) / max(1, sum(every for _, every in counts))


def write_card(
    folder: Path, command: str, facts: Mapping[str, str], figures: Figures, sample: Sequence[Dialogue]
) -> None:
    """folder/README.md. facts: of the data and the run."""
    measured = {
        "held-out perplexity per token of its own tokenizer": f"{figures.perplexity:.3f}",
        "held-out bits per byte": f"{figures.bits_per_byte:.4f}",
        "accepted length, chain:3, T = 0, bonus token included, loops left out": f"{figures.accepted_length:.3f}",
        "runs of five words that an answer has said before, T = 0": f"{figures.repeated:.1%}",
        "answers that are the same tokens without drafting": f"{figures.equal} of {figures.prompts}",
    }
    if figures.reference_bits_per_byte:
        measured["bits per byte of the model that wrote the text"] = f"{figures.reference_bits_per_byte:.4f}"
    table = "".join(f"| {key} | {value} |\n" for key, value in (*facts.items(), *measured.items()))
    answers = "".join(
        f"> **{prompt}**\n>\n> {answer.replace(chr(10), chr(10) + '> ')}\n\n" for prompt, answer in sample
    )
    text = f"""# mimo-nano

A real, tiny MiMo-V2-Flash, trained from scratch with its three MTP layers: global and sliding-window layers with two
numbers of key heads, keys wider than values, partial rotation, sinks, a dense layer and mixtures of experts with sigmoid
routing, and block-FP8 weights, those of the global layers quantised in fused sections as in the original.
It answers simple questions and writes short stories in English, and knows nothing: it is there to test and to show the MiMo
path with. Licence: Apache-2.0, as that of the model that wrote its text.

```
{command}
```

| | |
|---|---|
{table}
Trained on rows of 512 tokens; what lies beyond is untrained.

## Ten answers to held-out prompts, T = 0, unedited

{answers}"""
    atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
