"""Is a drafter healthy? What could be wired wrongly is tried the other way round, and what then accepts more is named.

Three comparisons. The text with drafting must be plain decoding's. Real drafting must accept what the layers accept when
they are teacher-forced, that is when they read the finished text as a prompt: less at depth 1 means that rows of rejected
drafts are read again, less only at deeper levels that drafted nodes stand at wrong positions. And no other wiring of the
layers may accept more: the hidden state before or after the final norm, a position off, the halves of the projection
swapped, one layer used for all depths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_engine.assemble import make_loop
from mtp_engine.config import EngineConfig, SamplingParams, TreeShape
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.prompts import read_prompts
from mtp_engine.experiments.record import watched
from mtp_engine.experiments.wirings import Variant, variants
from mtp_engine.hub import hub
from mtp_engine.models import loader
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention, Progress
from mtp_engine.runtime.answer import Generation
from mtp_engine.runtime.step import EagerRunner

_PROMPTS, _LONGEST, _TOKENS = 12, 70, 40
_SLACK = 0.02  # of the accepted drafts per step, by which float arithmetic may differ
_BETTER, _SURE = 0.001, 3.0  # nats per token, and standard errors, by which another wiring must win to be believed
Hits = npt.NDArray[np.bool_]


@final
@dataclass(frozen=True)
class Forced:
    """What teacher-forced layers say along a text: right [answer, D], whether that is the answer's token at their depth;
    and fit [rows, D], the mean of the log of their probabilities under the main model's, over the tokens that they may
    propose, of all rows that every layer read. nan: a layer that read nothing."""

    right: Hits
    fit: npt.NDArray[np.float64]


@final
@dataclass(frozen=True)
class Check:
    """One thing that was looked at. fault: what is wrong, as one word or two; empty where nothing is."""

    name: str
    detail: str
    fault: str = ""


@final
@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    checks: tuple[Check, ...]

    @property
    def faults(self) -> list[str]:
        return [check.fault for check in self.checks if check.fault]

    @property
    def lines(self) -> list[str]:
        """For people, a line each."""
        words = [f"{check.name:<10} {'WRONG' if check.fault else 'ok':<6} {check.detail}" for check in self.checks]
        verdict = f"looks wrong: {', '.join(self.faults)}" if self.faults else "healthy"
        return [*words, f"verdict    {verdict}"]


@final
@dataclass(frozen=True)
class Text:
    """A prompt and what plain decoding answers."""

    prompt: list[int]
    answer: list[int]


def examine(name: str, mtp: str | None, device: str, progress: Progress = hub.silent) -> Diagnosis:
    """Load a model and `diagnose` it: on a CPU in the format that it is decoded in, on a GPU in fp32. Raises EngineError for
    models without MTP layers."""
    depth = _depth(hub.locate(name, mtp=mtp, progress=progress))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    config = EngineConfig(
        tree=TreeShape((1,) * depth), dtype="fp32" if on_gpu else "auto", draft_int8=False, device=device,
        max_context=512, prefill_chunk=512, max_batch=_PROMPTS, prefix_cache=False,
    )  # fmt: skip
    with Engine.load(name, config, mtp=mtp, progress=progress) as engine:
        return diagnose(engine, hub.locate(name, mtp=mtp), progress)


def _depth(files: hub.ModelFiles) -> int:
    """To which a model's MTP layers draft."""
    folder = files.mtp_folder or (files.folder if loader.has_mtp(files.folder) else None)
    if folder is None:
        raise EngineError(f"{files.name} has no MTP layers to examine: name a folder of them (--mtp)")
    return loader.read_mtp_config(folder).depth


def diagnose(
    engine: Engine, files: hub.ModelFiles, progress: Progress = hub.silent, *, most: int = _PROMPTS
) -> Diagnosis:
    """Examine an engine that drafts chains with MTP layers. files: where they came from. most: prompts to use."""
    progress("decoding plainly", 0, None)
    prompts = [
        tokens for item in read_prompts("builtin", 120) if len(tokens := engine.encode(item.messages)) <= _LONGEST
    ]
    plain = engine.undrafted()
    texts = [
        Text(each, answer.token_ids)
        for each, answer in zip(prompts, _answers(plain, prompts[:most], 0.0), strict=False)
    ]
    progress("drafting", 0, None)
    drafted = _answers(engine, prompts[:most], 0.0)
    checks = [_check_text(engine, plain, texts, drafted)]
    module = cast(MTPModule, cast(Any, engine.loop.work.drafter).module)
    progress("reading the texts as prompts", 0, None)
    forced = read(engine, module, texts)
    checks.append(_check_drafting(texts, forced, drafted))
    for number, (name, fault, variant) in enumerate(variants(module, engine, files)):
        progress("trying other wirings", number, None)
        checks.append(_check_variant(engine, texts, forced, (name, fault, variant)))
    if not any(check.fault for check in checks) and accepted(forced) < 0.1:
        detail = f"{accepted(forced):.2f} drafts a position, and nothing tried is better: layers of another model?"
        checks.append(Check("layers", detail, "accepts nothing"))
    return Diagnosis(tuple(checks))


def _answers(engine: Engine, prompts: Sequence[list[int]], temperature: float) -> list[Generation]:
    return engine.generate(list(prompts), SamplingParams(max_tokens=_TOKENS, temperature=temperature, seed=1))


def _check_text(engine: Engine, plain: Engine, texts: Sequence[Text], drafted: Sequence[Generation]) -> Check:
    """At temperature 0, of which the answers are `drafted`, and 0.8."""
    wrong = sum(said.token_ids != text.answer for text, said in zip(texts, drafted, strict=True))
    warm = [_answers(each, [text.prompt for text in texts], 0.8) for each in (plain, engine)]
    wrong += sum(one.token_ids != other.token_ids for one, other in zip(*warm, strict=True))
    total = 2 * len(texts)
    detail = f"{total - wrong} of {total} answers with drafting are plain decoding's (T = 0 and 0.8)"
    return Check("text", detail, "wrong text" if wrong else "")


def _check_drafting(texts: Sequence[Text], forced: Sequence[Forced], drafted: Sequence[Generation]) -> Check:
    """Steps must accept what the teacher-forced layers get right where these steps began."""
    depth = forced[0].right.shape[1]
    real, ceiling, steps = np.zeros(depth), np.zeros(depth), 0
    for text, good, answer in zip(texts, forced, drafted, strict=True):
        for at, accepted in walk(answer.drafted):
            steps += 1
            real[:accepted] += 1
            ceiling[: min(_run_length(good.right, at), len(text.answer) - at)] += 1
    real, ceiling = real / max(steps, 1), ceiling / max(steps, 1)
    shown = "  ".join(f"depth {d}: {a:.0%} of {b:.0%}" for d, (a, b) in enumerate(zip(real, ceiling, strict=True), 1))
    short = real < ceiling * (1 - _SLACK) - _SLACK
    fault = "stale rows" if short[0] else "shifted positions" if short.any() else ""
    return Check("drafting", f"accepts, of what teacher-forced layers get right, {shown}", fault)


def walk(drafted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The steps of an answer (Generation.drafted): where each began, and the drafts that it accepted."""
    at = 0
    for end, draft in enumerate([*drafted, False]):
        if not draft and at < len(drafted):
            yield at, end - at
            at = end + 1


def _run_length(good: Hits, at: int) -> int:
    """Drafts that a step which begins at `at` accepts."""
    depth = 0
    while depth < good.shape[1] and at + depth < len(good) and good[at + depth, depth]:
        depth += 1
    return depth


def accepted(forced: Sequence[Forced]) -> float:
    """Drafts per position that a step which began there would accept."""
    runs = [_run_length(each.right, at) for each in forced for at in range(len(each.right))]
    return sum(runs) / max(len(runs), 1)


@final
@dataclass
class _Reader:
    """MTP layers (an MTPModule) that keep what they put out when they read a prompt."""

    module: MTPModule
    seen: dict[int, list[Tensor]] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)  # of the main model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def main_hidden(self, hidden: Tensor) -> Tensor:
        self.hidden.append(hidden)
        return self.module.main_hidden(hidden)

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        output = self.module.forward(level, embedded, hidden, positions, attention)
        self.seen.setdefault(level, []).append(output)
        return output


def read(engine: Engine, module: MTPModule, texts: Sequence[Text]) -> list[Forced]:
    """Have layers read finished texts as prompts."""
    reader, config = _Reader(module), replace(engine.config, max_batch=1)
    drafter = watched(engine, reader, config)
    backend = replace(engine.backend, runner=lambda slots: EagerRunner)  # a graph would not call the reader again
    loop = make_loop(engine.model, drafter, config, backend, slots=1, tokenizer=engine.tokenizer)
    found = []
    for text in texts:
        reader.seen.clear()
        reader.hidden.clear()
        tokens = [*text.prompt, *text.answer]
        # one token more, as the last row is not read but drafted from
        request = loop.add([*tokens, tokens[-1]], SamplingParams(max_tokens=1))
        while request.finish_reason is None:
            loop.step()
        states = torch.cat([hidden for hidden in reader.hidden[:-1] if hidden.shape[1]], 1)[0]  # the last decoded
        found.append(_forced(module, reader, engine.model.logits(states), tokens, len(text.answer)))
    return found


@torch.inference_mode()
def _forced(module: MTPModule, reader: _Reader, main: Tensor, tokens: list[int], answer: int) -> Forced:
    """main: [n] of the tokens' positions, the main model's hidden states [n, H] as logits [n, V]."""
    depth, ids = module.config.depth, module.draft_ids
    right = np.zeros((answer, depth), bool)
    true = torch.tensor(tokens, device=ids.device)
    target = main.softmax(-1)[:, ids]
    fits: dict[int, npt.NDArray[np.float64]] = {}
    for level in range(depth):
        if len(reader.seen.get(level, ())) < 2:
            continue  # a layer that is used again is not read for its deeper levels
        output = torch.cat(reader.seen[level][:-1], 1)[0, :-1]  # the last call drafts; the last row is behind the text
        scores = module.logits(level, output).log_softmax(-1)
        rows = min(len(output), answer)
        right[-rows:, level] = (ids[scores[-rows:].argmax(-1)] == true[-rows:]).cpu().numpy()
        fits[level] = (target[-len(output) - 1 : -1] * scores).sum(-1).double().cpu().numpy()
    # a deeper layer has rows that stand before its first
    shared = min((len(fit) for fit in fits.values()), default=0) - depth
    nothing = np.full(max(shared, 0), np.nan)
    return Forced(right, np.stack([fits[k][-shared:] if k in fits else nothing for k in range(depth)], 1))


def _check_variant(engine: Engine, texts: Sequence[Text], forced: Sequence[Forced], variant: Variant) -> Check:
    name, fault, module = variant
    tried = read(engine, module, texts)
    gains = np.concatenate([_gain(now, then) for now, then in zip(forced, tried, strict=True)])
    gain, error = float(gains.mean()), float(gains.std()) / max(len(gains), 1) ** 0.5
    detail = (
        f"{name}: {accepted(tried):.2f} drafts a position, as it is {accepted(forced):.2f}; {gain:+.3f} nats a token"
    )
    return Check("wiring", detail, fault if gain > max(_BETTER, _SURE * error) else "")


def _gain(now: Forced, then: Forced) -> npt.NDArray[np.float64]:
    """Nats, for every token and depth that both read; a depth that only `then` reads counts as by chance before."""
    rows = min(len(now.fit), len(then.fit))
    before, after = now.fit[-rows:], then.fit[-rows:]
    before = np.where(np.isnan(before), -np.log(1e4), before)
    gains = (after - before)[~np.isnan(after)]
    return np.asarray(gains if len(gains) else [0.0])
