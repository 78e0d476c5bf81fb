"""Random engines under random loads: request options x drafters x trees x steps in flight x joining, leaving, failing,
preemption, prefix hits. Seeded: a case is known by its number.

Every answer must be what plain decoding of that request alone says: its tokens, text, log-probabilities, and why it ends; of
one that was cancelled, the beginning. bench/crosses.py runs many cases, tests/test_crosses.py a few.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final
from unittest.mock import patch

import torch
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.assemble import make_drafter, make_loop
from mtp_engine.cache import PagedKV
from mtp_engine.config import Structure
from mtp_engine.hub import hub
from mtp_engine.runtime import cuda_graph
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded import Uncaptured
from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS
from mtp_engine.runtime.request import Request

_SHAPES = (
    "chain:1",
    "chain:2",
    "chain:3",
    "2x1",
    "4x2x2",
    "1x3",
    "tree:2",
    "tree:5",
    "tree:7",
    "tree:16",
    "auto",
    "auto",
)
_TEXTS = (
    "Once upon a time there was a small dog that", "The sun is", "One, two, three, one, two, three, one, two",
    "In the old house at the end of the road, behind a door that nobody had opened for years, she found", "x", "Why? " * 20,
)  # fmt: skip
_SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yes"]}}, "required": ["a", "b"]}'
)
_STRUCTURES = (
    Structure(regex="[a-z ]{4,30}"), Structure(json=_SCHEMA), Structure(json=_SCHEMA, within=14),
    Structure(regex="(yes|no|maybe)(, (yes|no|maybe)){2,4}"),
)  # fmt: skip
_BREAK = "a step that breaks off"
_PATIENCE = 3000  # steps after which a loop is stuck

Draw = Callable[[random.Random], Any]
_OPTIONS: dict[str, tuple[float, Draw]] = {  # of SamplingParams: how often one is set, and to what
    "top_k": (0.15, lambda rng: rng.choice([1, 2, 20])),
    "top_p": (0.2, lambda rng: rng.choice([0.05, 0.5, 0.9])),
    "min_p": (0.15, lambda rng: rng.choice([0.02, 0.3, 1.0])),
    "repetition_penalty": (0.15, lambda rng: rng.choice([0.7, 1.3, 10.0])),
    "frequency_penalty": (0.15, lambda rng: rng.choice([-2.0, 0.4, 2.0])),
    "presence_penalty": (0.1, lambda rng: rng.choice([-1.0, 0.6])),
    "logit_bias": (0.15, lambda rng: {rng.randrange(2000): rng.choice([-1e6, -3.0, 2.5, 9.0]) for _ in range(4)}),
    "allowed_token_ids": (0.05, lambda rng: tuple(rng.sample(range(2000), rng.choice([1, 2, 60])))),
    "bad_words": (0.2, lambda rng: tuple(rng.sample([" the", " a", "e", ".", " and", ",", (300, 301), (262,)], 3))),
    "stop": (0.2, lambda rng: tuple(rng.sample([".", " the", "\n", "ing ", "o", "d t"], 2))),
    "stop_token_ids": (0.1, lambda rng: tuple(rng.sample(range(2000), 3))),
    "logprobs": (0.25, lambda rng: rng.choice([0, 1, 5, 64])),
    "structure": (0.15, lambda rng: rng.choice(_STRUCTURES)),
    "speculate": (0.1, lambda rng: False),
    "n": (0.15, lambda rng: rng.choice([2, 3])),
    "ignore_eos": (0.3, lambda rng: True),
}


@final
@dataclass(frozen=True)
class Asked:
    """One request of a case. at: the step before which it comes; gone: after how many more it is cancelled, 0: never."""

    prompt: list[int]
    params: SamplingParams
    at: int
    gone: int


@final
@dataclass
class Outcome:
    """What a case showed. problems: a line each; answers, tokens: that were compared."""

    config: EngineConfig
    problems: list[str] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0
    accepted: int = 0
    preempted: int = 0
    cached: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    breaks: frozenset[int] = frozenset()  # the steps that break off


@final
class Crosses:
    """Cases over one model. recorded: on a CPU, in fp32, with the steps of a GPU, which are recorded ahead; most: requests of
    a case; ranks: of the engines of cases, while what they are compared with is one process; shared: what all engines have,
    such as the device and the dtype."""

    def __init__(
        self, model: str, *, recorded: bool = False, most: int = 16, ranks: int = 1, **shared: Any
    ) -> None:  # fmt: skip
        self.model, self._recorded, self._most = model, recorded, most
        self._shared = {**shared, "tensor_parallel": ranks}
        self._alone = Engine.load(model, EngineConfig(
            drafter="root", max_batch=1, prefix_cache=False, steps_in_flight=1, max_context=384, **shared,
        ))  # fmt: skip
        self._bits = self._alone.config.dtype in ("int8", "bf16")

    def close(self) -> None:
        self._alone.close()

    def config(self, rng: random.Random) -> EngineConfig:
        drafter = rng.choices(["mtp", "ngram", "root"], [8, 2, 1])[0]
        tree = {"mtp": rng.choice(_SHAPES), "ngram": f"chain:{rng.randrange(1, 8)}", "root": None}[drafter]
        candidates = rng.choice(["auto", "auto", "best"]) if drafter == "mtp" and tree != "auto" else "auto"
        return EngineConfig(
            drafter=drafter, tree=TreeShape.parse(tree) if tree else None, candidates=candidates,
            steps_in_flight=rng.choice([1, 2, 2, 3]), max_batch=rng.choice([1, 2, 4, 8, 8]),
            prefix_cache=rng.random() < 0.7, prefix_cache_gb=rng.choice([0.002, 0.004, 0.1]), page_size=rng.choice([4, 16, 64]),
            prefill_chunk=rng.choice([16, 33, 128, 0]), kv_tokens=rng.choice([0, 240, 256]), max_context=384,
            draft_vocab=rng.choice([None, None, 0, 300]), **self._shared,
        )  # fmt: skip

    def asked(self, rng: random.Random) -> list[Asked]:
        made = []
        for number in range(rng.randrange(min(4, self._most), self._most)):
            text = rng.choice(_TEXTS)
            prompt = self._alone.encode(text) + self._alone.encode(rng.choice(["", "", " and", text]))
            options = {name: draw(rng) for name, (chance, draw) in _OPTIONS.items() if rng.random() < chance}
            tokens = rng.choice([1, 2, 7, 20, 40, 60])
            options["min_tokens"] = rng.randrange(tokens + 1) if rng.random() < 0.15 else 0
            if rng.random() < 0.15:
                options["tree"] = TreeShape.parse(rng.choice(["chain:1", "tree:2"]))
            params = SamplingParams(
                max_tokens=tokens, temperature=rng.choice([0.0, 0.0, 0.3, 0.8, 1.0, 1.7]), seed=10 * number,
                priority=rng.randrange(3), **options,
            )  # fmt: skip
            made.append(Asked(prompt, params, rng.choice([0, 0, rng.randrange(40)]), rng.choice([0] * 12 + [1, 4, 9])))
        return made

    def case(self, number: int) -> Outcome:
        rng = random.Random(number)
        outcome, asked = Outcome(self.config(rng)), self.asked(rng)
        breaks = rng.choice([0, 0, 0, 1, 2]) if outcome.config.tensor_parallel == 1 else 0  # of one rank ends them all
        outcome.breaks = frozenset(rng.randrange(30) for _ in range(breaks))
        if outcome.config.drafter != "mtp":
            asked = [replace(each, params=replace(each.params, tree=None)) for each in asked]
        with steps_left_open() if self._recorded else nullcontext(), Engine.load(self.model, outcome.config) as engine:
            if self._recorded:
                record(engine, self.model)
            requests = self._run(engine, asked, outcome)
            for index, (each, request) in enumerate(zip(asked, requests, strict=True)):
                for sample, answer in enumerate((request, *request.others)):
                    if problem := self._compare(each, answer, sample, outcome):
                        outcome.problems.append(f"request {index}, answer {sample}: {problem}; {each}")
        return outcome

    def _run(self, engine: Engine, asked: Sequence[Asked], outcome: Outcome) -> list[Request]:
        loop, requests = engine.loop, dict[int, Request]()
        said: dict[Request, list[int]] = {}
        decode, steps, broken = loop._decode, 0, set(outcome.breaks)

        def breaks(members: Any) -> Any:
            launched = decode(members)
            if steps in broken:
                broken.discard(steps)
                raise RuntimeError(_BREAK)
            return launched

        loop._decode = breaks  # type: ignore[method-assign]
        while len(requests) < len(asked) or loop.requests:
            for index, each in enumerate(asked):
                if index not in requests and each.at <= steps:
                    requests[index] = loop.add(each.prompt, each.params)
                    said |= {answer: [] for answer in (requests[index], *requests[index].others)}
                elif index in requests and each.gone and steps == each.at + each.gone:
                    loop.scheduler.cancel(requests[index])
            for output in loop.step():
                said[output.request] += output.tokens
            steps += 1
            if steps > _PATIENCE:
                outcome.problems.append(f"stuck: {len(loop.requests)} requests do not end")
                break
        for output in loop.step():
            said[output.request] += output.tokens
        if any(answer.output != tokens for answer, tokens in said.items()):
            outcome.problems.append("what was handed out is not what was said")
        _check_memory(loop, outcome)
        del loop._decode  # which holds the loop
        return [requests[index] for index in range(len(asked))]

    def _compare(self, asked: Asked, answer: Request, sample: int, outcome: Outcome) -> str:
        """How an answer differs from the request's alone; nothing where it does not."""
        seed = (asked.params.seed or 0) + sample
        plain = self._alone.loop.add(asked.prompt, replace(asked.params, n=1, seed=seed, tree=None, priority=0))
        while plain.finish_reason is None:
            self._alone.loop.step()
        self._alone.loop.step()
        reason = str(answer.finish_reason)
        outcome.answers, outcome.tokens = outcome.answers + 1, outcome.tokens + len(answer.output)
        outcome.accepted += sum(answer.drafted)
        outcome.preempted, outcome.cached = (
            outcome.preempted + answer.stats.preemptions,
            outcome.cached + answer.stats.cached_tokens,
        )
        outcome.ends[reason] = outcome.ends.get(reason, 0) + 1
        count = len(answer.output)
        if answer.output != plain.output[:count]:
            at = next(i for i, (a, b) in enumerate(zip(answer.output, [*plain.output, -1], strict=False)) if a != b)
            return f"another token at {at}: {answer.output[at:]} for {plain.output[at:]}"
        if not self._alike(answer, plain):
            return "other log-probabilities"
        if reason == "abort":
            return "" if asked.gone else "aborted, and nobody asked for that"
        if reason == "error" and answer.error.endswith(_BREAK):
            return "" if len(outcome.breaks) > 1 else "one step that breaks off ends nobody"
        if (answer.output, answer.text, reason) != (plain.output, plain.text, str(plain.finish_reason)):
            ours, theirs = (f"{each.finish_reason} {each.text!r} {each.error}" for each in (answer, plain))
            return f"ends otherwise: {ours} for {theirs}"
        return ""

    def _alike(self, answer: Request, plain: Request) -> bool:
        """Whether the log-probabilities are the same: bit by bit where rows are, else up to rounding."""
        ours, theirs = answer.logprobs, plain.logprobs[: len(answer.logprobs)]
        if len(ours) != (len(answer.output) if answer.params.logprobs is not None else 0):
            return False
        if self._bits:
            return list(ours) == list(theirs)
        return all(abs(a.logprob - b.logprob) < 1e-3 for a, b in zip(ours, theirs, strict=True))


@contextmanager
def steps_left_open() -> Iterator[None]:
    """Recorded steps with a structure stay open as they do on a GPU, whose attention knows pages by the device's table alone."""

    def read(cache: PagedKV, layer: int, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        rows = cache.rows(torch.tensor([slot]), torch.arange(tokens)[None])[0]
        return cache.k[layer][rows], cache.v[layer][rows]

    with patch.object(cuda_graph, "Captured", Uncaptured), patch.object(PagedKV, "read", read):
        yield


def record(engine: Engine, model: str) -> None:
    """From now on its steps are recorded, as on a GPU."""
    config, device = engine.config, torch.device("cpu")
    backend = replace(
        engine.backend, levels=None, in_flight=config.steps_in_flight, scratch_tokens=SCRATCH_TOKENS,
        runner=lambda slots: partial(GraphRunner, in_flight=config.steps_in_flight, scratch=slots, device=device),
    )  # fmt: skip
    files = hub.locate(model)
    drafter = make_drafter(
        replace(files, mtp_folder=files.mtp_folder or files.folder), engine.model, config, backend, hub.silent
    )
    slots, tokenizer = config.max_batch, engine.tokenizer
    engine.loop = make_loop(engine.model, drafter, config, backend, slots=slots, tokenizer=tokenizer)


def _check_memory(loop: DecodeLoop, outcome: Outcome) -> None:
    """A loop without requests holds nothing but beginnings that it keeps."""
    scheduler = loop.scheduler
    if loop.memory.prefix is not None:
        loop.memory.prefix.check()
    else:
        loop.memory.pages.check()
    if scheduler._slots != len(scheduler._free) or loop._flying:
        outcome.problems.append("a slot is still taken")
