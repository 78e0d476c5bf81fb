"""The loop emits exactly what plain decoding emits: for any drafter, tree, batch, chunk and end, and after any error."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tree import random_tree
from tiny import MTP, write_llama, write_mtp
from torch import Tensor

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineBusy, EngineError
from mtp_engine.kernels.linear import Linear
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Attention, Drafter
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Request
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers import MatchVerifier

VOCAB, SLOTS, CONTEXT, LONG = 61, 4, 192, 110
CPU = torch.device("cpu")


class Scripted:
    """Knows the plain text of each seed, and proposes by it.

    right: a chain of what comes next. wrong: two wrong tokens, right ones below them. random: trees of random size
    and shape per request, in which about half the nodes that could be right are.
    """

    cache = prompts = None
    scratch_rows = history = reread = 0

    def __init__(self, kind: str, texts: Mapping[int, Sequence[int]], vocab: int = VOCAB, nodes: int = 6) -> None:
        self.kind, self.texts, self.vocab, self.max_nodes = kind, texts, vocab, nodes
        self.depth = nodes - 1
        self.rng = random.Random(nodes)

    def attach(self, pages: Pages, behind: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None: ...

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        return []

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None: ...

    def draft(self, batch: Batch) -> DraftTree:
        following = [
            list(self.texts[seed][length + 1 : length + self.max_nodes])
            for seed, length in zip(batch.sampling.seed.tolist(), batch.lengths.tolist(), strict=True)
        ]
        roots = batch.tokens.tolist()
        if self.kind == "random":
            return self._random(roots, following)
        sizes = torch.tensor([1 + len(text) for text in following])
        rows = torch.tensor(
            [([r, *text] + [0] * self.max_nodes)[: self.max_nodes] for r, text in zip(roots, following, strict=True)]
        )
        return DraftTree.chain(rows, sizes) if self.kind == "right" else self._wrong(rows)

    def _wrong(self, rows: Tensor) -> DraftTree:
        parents = torch.tensor([-1, 0, 0, *range(1, self.max_nodes - 2)])[: self.max_nodes].expand_as(rows)
        depths = torch.tensor([0, 1, 1, 2, 2, *range(3, self.max_nodes)])[: self.max_nodes].expand_as(rows)
        first = rows[:, 1:2]
        wrong = [(first + 1) % self.vocab, (first + 2) % self.vocab, rows[:, 2:3], rows[:, 2:3], rows[:, 3:]]
        tokens = torch.cat([rows[:, :1], *wrong], 1)[:, : self.max_nodes]
        size = torch.full((len(rows),), self.max_nodes)
        return DraftTree(tokens, parents, depths, size, int(depths.max()))

    def _random(self, roots: list[int], following: list[list[int]]) -> DraftTree:
        sizes = [self.rng.randint(1, self.max_nodes) for _ in roots]
        tree = random_tree(self.rng, sizes, self.max_nodes, self.vocab)
        tree.tokens[:, 0] = torch.tensor(roots)
        for b, (size, text) in enumerate(zip(sizes, following, strict=True)):
            tokens, parents, on_path = tree.tokens[b].tolist(), tree.parents[b].tolist(), {0: 0}
            for node in range(1, size):
                depth = on_path.get(parents[node])
                if depth is None or depth >= len(text):
                    continue
                siblings = [i for i in range(1, size) if parents[i] == parents[node] and i != node]
                if self.rng.random() < 0.5 and all(tokens[i] != text[depth] for i in siblings):
                    tokens[node] = text[depth]
                if tokens[node] == text[depth]:
                    on_path[node] = depth + 1
            tree.tokens[b] = torch.tensor(tokens)
        return tree


class Models:
    """A tiny Llama and MTP layers for it."""

    def __init__(self, root: Path) -> None:
        self.main = loader.load_main(write_llama(root / "main"), torch.float32, CPU, lambda *_: None)
        deep = {"reused": True, "depth": 6, "attention": {**MTP["attention"], "window": None}}
        self.mtp = self._load(write_mtp(root / "mtp"))
        self.deep = self._load(write_mtp(root / "deep", **deep))

    def _load(self, folder: Path) -> MTPModule:
        return loader.load_mtp(folder, self.main, 0, lambda *_: None)

    def __repr__(self) -> str:
        return "the models"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("loop"))


def make_loop(model: Decoder, drafter: Drafter, **changes: Any) -> DecodeLoop:
    """A loop whose first layer has a window of 12: both kinds of cache, pages of 8. prefix: how many of the smallest entries
    the prefix cache has room for."""
    wanted = {"slots": SLOTS, "max_context": CONTEXT, "prefill_chunk": 16, "eos_token_ids": [], "tokens": 0, **changes}
    layers = [layer.attention for layer in model.config.layers]
    tokens = wanted.pop("tokens") or wanted["slots"] * (CONTEXT + 16)
    cache = HybridKV(
        [replace(layers[0], window=12), *layers[1:]],
        Pages(slots=wanted["slots"], tokens=tokens, page_size=8, device=CPU),
        max_nodes=drafter.max_nodes,
        behind=3 * (drafter.depth + 1),
        dtype=torch.float32,
    )
    if entries := wanted.pop("prefix", 0):
        drafter.attach(cache.pages, cache.behind)
        caches = [each for each in (cache, drafter.cache) if each]
        wanted["prefix_bytes"] = entries * sum(each.entry_bytes(7 + drafter.reread, drafter.reread) for each in caches)
    return decode_loop(model, cache, drafter, MatchVerifier(), device=CPU, **wanted)


def decode(loop: DecodeLoop, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Request]:
    """Run all to their ends at once, and check what must hold of every request."""
    requests = [loop.add(prompt, wanted) for prompt, wanted in zip(prompts, params, strict=True)]
    emitted: dict[Request, list[int]] = {request: [] for request in requests}
    while loop.requests:
        for out in loop.step():
            assert len(out.tokens) == len(out.drafted) >= 1
            emitted[out.request] += out.tokens
        check_memory(loop)
    for request in requests:
        assert emitted[request] == request.output
        check_statistics(request)
    check_empty(loop)
    return requests


def check_empty(loop: DecodeLoop) -> None:
    assert loop.requests == []
    assert sorted(loop.scheduler._free) == list(range(loop.scheduler._slots))
    assert not any(loop.memory.pages.table)
    check_memory(loop)
    if loop.memory.prefix is not None:
        loop.memory.prefix.clear()
    assert loop.memory.pages.free == loop.memory.pages.count


class Refused(logging.Handler):
    """What goes wrong when a state is kept or used is noted and costs nobody anything; in most tests nothing may."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@contextmanager
def nothing_noted() -> Iterator[None]:
    handler, logger = Refused(logging.WARNING), logging.getLogger("mtp_engine")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def check_memory(loop: DecodeLoop) -> None:
    if loop.memory.prefix is not None:
        loop.memory.prefix.check()
    else:
        loop.memory.pages.check()


def check_statistics(request: Request) -> None:
    stats = request.stats
    assert stats.tokens == len(request.output) == len(request.drafted)
    assert stats.prompt_tokens == len(request.prompt)
    assert stats.mean_accepted_length == stats.tokens / stats.steps
    assert sum(stats.unconditional_acceptance()) == pytest.approx(stats.mean_accepted_length - 1)
    assert stats.accepted_per_depth == sorted(stats.accepted_per_depth, reverse=True)
    assert all(a <= p <= stats.steps for a, p in zip(stats.accepted_per_depth, stats.proposed_per_depth, strict=True))
    assert stats.steps <= stats.nodes
    assert stats.total_s >= stats.ttft_s > 0
    # the last token of a step is the main model's own, except where an end cut the step short
    assert 0 <= sum(request.drafted) - sum(stats.accepted_per_depth) <= 1


def prompts() -> list[list[int]]:
    """Lengths on both sides of pages and windows; the first has one token, so nothing is prefilled."""
    rng = random.Random(5)
    return [[rng.randrange(1, VOCAB) for _ in range(length)] for length in (1, 7, 40, 17)]


SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 1.1, "min_p": 0.05},
    "all": {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
}


MIXED = ("sampled", "top_k", "top_p", "min_p")


def params_for(name: str, count: int = SLOTS, **changes: Any) -> list[SamplingParams]:
    """One for each prompt, with seeds from 77 on; "mixed" is a different kind for each."""
    kinds = MIXED if name == "mixed" else (name,) * count
    given = ({"max_tokens": LONG, "seed": 77 + i, **SAMPLING[kind], **changes} for i, kind in enumerate(kinds))
    return [SamplingParams(**each) for each in given]


@pytest.fixture(scope="module")
def plain(models: Models) -> Callable[[str], dict[int, list[int]]]:
    """What plain decoding says, prompt included, by seed."""
    known: dict[str, dict[int, list[int]]] = {}

    def text(name: str) -> dict[int, list[int]]:
        if name not in known:
            requests = decode(make_loop(models.main, RootDrafter()), prompts(), params_for(name))
            assert all(request.stats.steps == LONG for request in requests)
            known[name] = {request.seed: request.prompt + request.output for request in requests}
        return known[name]

    return text


Plain = Callable[[str], dict[int, list[int]]]


def make_drafter(name: str, models: Models, texts: Mapping[int, Sequence[int]]) -> Drafter:
    if name in ("right", "wrong", "random"):
        return Scripted(name, texts)
    if name == "ngram":
        return NgramDrafter(4, slots=SLOTS, max_context=CONTEXT, device=CPU)
    module = models.deep if name.startswith("deep ") else models.mtp
    shape = TreeShape.parse(name.removeprefix("deep "))
    return MTPDrafter(module, shape, slots=SLOTS)


DRAFTERS = [
    "chain:3", "4x2x2", "tree:16", "tree:31", "tree:63", "deep tree:16", "deep tree:63", "ngram", "right", "wrong", "random",
]  # fmt: skip


@pytest.mark.parametrize("sampling", ["greedy", "mixed"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_gives_the_plain_tokens(models: Models, plain: Plain, name: str, sampling: str) -> None:
    texts = plain(sampling)
    loop = make_loop(models.main, make_drafter(name, models, texts))
    requests = decode(loop, prompts(), params_for(sampling))
    assert {request.seed: request.prompt + request.output for request in requests} == texts
    accepted = sum(sum(request.drafted) for request in requests)
    if name == "right":
        assert all(request.stats.steps == -(-LONG // 6) for request in requests)
    elif name == "wrong":
        assert accepted == 0
    elif name == "random":
        assert accepted > LONG / 2


def test_seeds_and_prompts_make_a_difference(plain: Plain) -> None:
    """The comparison above is not one of constants."""
    outputs = {tuple(text[-LONG:]) for name in ("greedy", "mixed", "all") for text in plain(name).values()}
    assert len(outputs) == SLOTS * 3
    assert all(len(set(output)) > 3 for output in outputs)


def test_a_seed_is_drawn_and_reported(models: Models) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5)
    loop = make_loop(models.main, RootDrafter())
    first, second = decode(loop, [[3, 4]] * 2, [params] * 2)
    assert first.stats.seed != second.stats.seed
    assert first.output != second.output
    [again] = decode(loop, [[3, 4]], [replace(params, seed=first.stats.seed)])
    assert again.output == first.output


# ---- batches, chunks, comings and goings --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4x2x2", "random", "ngram"])
def test_a_batch_is_each_alone(models: Models, plain: Plain, name: str) -> None:
    """Prompts of different lengths, greedy and sampled requests mixed."""
    kinds = ("greedy", "top_p", "sampled", "all")
    settings = [params_for(kind, max_tokens=50)[i] for i, kind in enumerate(kinds)]
    texts = {77 + i: plain(kind)[77 + i] for i, kind in enumerate(kinds)}
    together = decode(make_loop(models.main, make_drafter(name, models, texts)), prompts(), settings)
    alone = make_loop(models.main, make_drafter(name, models, texts), slots=1)
    for expected, prompt, wanted in zip(together, prompts(), settings, strict=True):
        [request] = decode(alone, [prompt], [wanted])
        assert request.output == expected.output == texts[request.seed][len(prompt) :][:50]


@pytest.mark.parametrize("name", ["tree:16", "random", "ngram"])
def test_requests_come_and_go(models: Models, plain: Plain, name: str) -> None:
    """More requests than slots, joining at odd times; some are dropped half way and start anew in another slot."""
    texts, rng = plain("top_p"), random.Random(2)
    loop = make_loop(models.main, make_drafter(name, models, texts), slots=3)
    waiting = list(zip(prompts(), params_for("top_p", max_tokens=30), strict=True)) * 3
    finished = 0
    while waiting or loop.requests:
        if waiting and len(loop.requests) < 3 and rng.random() < 0.4:
            loop.add(*waiting.pop())
        before = list(loop.requests)
        loop.step()
        check_memory(loop)
        for request in before:
            assert texts[request.seed][len(request.prompt) :][: len(request.output)] == request.output
            finished += request.finish_reason == "length" and len(request.output) == 30
        if len(waiting) > 6 and loop.requests and rng.random() < 0.1:
            dropped = rng.choice(loop.requests)
            loop.remove(dropped)
            waiting.insert(0, (dropped.prompt, dropped.params))
    assert finished == 12
    check_empty(loop)


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("name", ["4x2x2", "deep chain:3", "right"])
def test_the_prefill_chunk_does_not_matter(models: Models, plain: Plain, name: str, chunk: int) -> None:
    texts = plain("top_k")
    loop = make_loop(models.main, make_drafter(name, models, texts), prefill_chunk=chunk)
    requests = decode(loop, prompts(), params_for("top_k", max_tokens=20))
    for request in requests:
        assert request.output == texts[request.seed][len(request.prompt) :][:20]


@pytest.mark.parametrize("name", ["chain:3", "deep chain:3"])
def test_a_prompt_is_never_read_at_once(models: Models, name: str) -> None:
    """Neither by the main model nor by MTP layers with full attention, whose memory would grow with its square."""
    drafter, rows = make_drafter(name, models, {}), []
    assert isinstance(drafter, MTPDrafter)
    attention = drafter.attention

    def spied(cache: HybridKV, step: StepRows) -> Attention:
        rows.append(step.positions.shape[1])
        return attention(cache, step)

    drafter.attention = spied
    prompt = [1 + i % 7 for i in range(150)]
    loop = make_loop(models.main, drafter, attention=spied, prefill_chunk=16)
    loop.add(prompt, SamplingParams(max_tokens=4))
    while loop.requests:
        loop.step()
    assert 16 in rows
    assert max(rows) <= 16 + 1


def test_step_without_requests_does_nothing(models: Models) -> None:
    assert make_loop(models.main, RootDrafter()).step() == []


# ---- ends ---------------------------------------------------------------------------------------------------------


def first_seen(output: Sequence[int], least: int) -> int:
    """The first index from `least` on whose token has not occurred before."""
    return next(i for i in range(least, len(output)) if output[i] not in output[:i])


@pytest.mark.parametrize("where", range(6))
def test_a_stop_token_ends_a_path_wherever_it_lies(models: Models, plain: Plain, where: int) -> None:
    """Paths of six tokens are accepted whole; a stop at any place in one is the last token emitted."""
    texts = plain("sampled")
    text, prompt = texts[79], prompts()[2]
    output = text[len(prompt) :]
    index = first_seen(output, 6 + where)
    loop = make_loop(models.main, Scripted("right", texts))
    [wanted] = params_for("sampled", seed=79, count=1, stop_token_ids=(output[index], VOCAB + 5))
    [request] = decode(loop, [prompt], [wanted])
    assert request.output == output[: index + 1]
    assert request.finish_reason == "stop"
    assert request.stats.steps == index // 6 + 1


def test_stops_lie_at_every_place_of_a_path(plain: Plain) -> None:
    """What the test above claims to cover."""
    output = plain("sampled")[79][40:]
    assert len({first_seen(output, 6 + where) % 6 for where in range(6)}) >= 3


@pytest.mark.parametrize("ignore", [False, True])
def test_end_of_text_ends_unless_ignored(models: Models, plain: Plain, ignore: bool) -> None:
    texts, prompt = plain("sampled"), prompts()[2]
    output = texts[79][len(prompt) :]
    index = first_seen(output, 9)
    loop = make_loop(models.main, Scripted("right", texts), eos_token_ids=[output[index]])
    [request] = decode(loop, [prompt], params_for("sampled", seed=79, count=1, ignore_eos=ignore))
    assert request.finish_reason == ("length" if ignore else "stop")
    assert request.output == (output if ignore else output[: index + 1])


@pytest.mark.parametrize("name", ["right", "random", "4x2x2"])
@pytest.mark.parametrize("most", [1, 2, 6, 7, 11])
def test_max_tokens_cuts_a_path(models: Models, plain: Plain, name: str, most: int) -> None:
    texts = plain("greedy")
    loop = make_loop(models.main, make_drafter(name, models, texts))
    for request in decode(loop, prompts(), params_for("greedy", max_tokens=most)):
        assert request.output == texts[request.seed][len(request.prompt) :][:most]
        assert request.finish_reason == "length"


@pytest.mark.parametrize("name", ["right", "random", "tree:16", "ngram"])
def test_the_context_ends_a_request(models: Models, plain: Plain, name: str) -> None:
    """The prompt and the answer fill the context to its last token, whatever the tree would add."""
    texts = plain("sampled")
    loop = make_loop(models.main, make_drafter(name, models, texts), max_context=50)
    for request in decode(loop, prompts(), params_for("sampled")):
        assert len(request.prompt) + len(request.output) == 50
        assert request.finish_reason == "length"
        assert request.prompt + request.output == texts[request.seed][:50]


def test_a_stop_at_the_limit_is_a_stop(models: Models, plain: Plain) -> None:
    texts, prompt = plain("sampled"), prompts()[2]
    output = texts[79][len(prompt) :]
    index = first_seen(output, 3)
    wanted = params_for("sampled", seed=79, count=1, max_tokens=index + 1, stop_token_ids=(output[index],))
    [request] = decode(make_loop(models.main, RootDrafter()), [prompt], wanted)
    assert (request.finish_reason, request.output) == ("stop", output[: index + 1])


def test_who_wants_no_drafts_disturbs_nobody(models: Models) -> None:
    """The drafter has not seen its prompt, and drafts for it all the same; those drafts are no tokens."""
    wanted = [SamplingParams(max_tokens=20, speculate=False), SamplingParams(max_tokens=20, frequency_penalty=0.5)]
    answers = []
    for drafter in (RootDrafter(), make_drafter("ngram", models, {})):
        requests = decode(make_loop(models.main, drafter), [prompts()[2]] * 2, wanted)
        answers.append([(request.output, request.finish_reason) for request in requests])
    assert answers[0] == answers[1]


# ---- errors -------------------------------------------------------------------------------------------------------


def snapshot(loop: DecodeLoop) -> tuple[Any, ...]:
    pages = loop.memory.pages
    return list(loop.requests), list(loop.scheduler._free), [list(table) for table in pages.table], pages.free


@pytest.mark.parametrize(
    ("prompt", "most", "message"),
    [
        ([], 5, "prompt is empty"),
        ([1] * CONTEXT, 5, f"has {CONTEXT} tokens and the context holds {CONTEXT}"),
        ([1] * 500, 5, "shorten the prompt"),
        ([1] * 100, 90, "KV cache holds"),
    ],
)
@pytest.mark.parametrize("name", ["4x2x2", "ngram"])
def test_a_refused_request_changes_nothing(
    models: Models, plain: Plain, name: str, prompt: list[int], most: int, message: str
) -> None:
    """Refused beside a running request, which goes on as if nothing had been asked; so does the next."""
    texts = plain("top_p")
    loop = make_loop(models.main, make_drafter(name, models, texts), tokens=190)
    settings = params_for("top_p")
    running = loop.add(prompts()[2], settings[2])
    loop.step()
    before = snapshot(loop)
    with pytest.raises(EngineError, match=message):
        loop.add(prompt, SamplingParams(max_tokens=most))
    assert snapshot(loop) == before
    later = loop.add(prompts()[1], replace(settings[1], max_tokens=20))
    while loop.requests:
        loop.step()
        check_memory(loop)
    assert running.prompt + running.output == texts[79]
    assert later.output == texts[78][7:27]
    check_empty(loop)


@pytest.mark.parametrize("changes", [{"slots": 1}, {"tokens": 160}], ids=["slots", "memory"])
def test_who_does_not_fit_waits(models: Models, plain: Plain, changes: dict[str, int]) -> None:
    """Four requests that do not fit together give what they give at once."""
    texts, loop = plain("greedy"), make_loop(models.main, RootDrafter(), **changes)
    requests = [loop.add(prompt, params) for prompt, params in zip(prompts(), params_for("greedy"), strict=True)]
    while loop.requests:
        loop.step()
        assert len(loop.scheduler.running) <= changes.get("slots", SLOTS)
        check_memory(loop)
    assert {request.seed: request.prompt + request.output for request in requests} == texts
    check_empty(loop)


@pytest.mark.parametrize("name", ["chain:3", "4x2x2", "deep tree:6", "ngram", "random"])
def test_who_is_preempted_says_what_it_would_have_said(models: Models, plain: Plain, name: str) -> None:
    """Room for the text of about two of eight: they begin together, and the newest wait again when pages run out."""
    texts, params = plain("mixed"), params_for("mixed")
    drafter = make_drafter(name, models, texts)
    loop = make_loop(models.main, drafter, tokens=2 * (40 + LONG) + 5 * drafter.max_nodes)
    order = [0, 1, 3, 2, 2, 3, 1, 0]
    requests = [loop.add(prompts()[i], replace(params[i], priority=at % 2)) for at, i in enumerate(order)]
    together = 0
    while loop.requests:
        loop.step()
        check_memory(loop)
        together = max(together, len(loop.scheduler.running))
    assert together > 2
    assert sum(request.stats.preemptions for request in requests) >= 2
    assert not requests[0].stats.preemptions, "the first of the highest priority always goes on"
    for request in requests:
        assert request.prompt + request.output == texts[request.seed]
        check_statistics(request)
    check_empty(loop)


def test_too_many_that_wait_are_told_so(models: Models, plain: Plain) -> None:
    loop, params = make_loop(models.main, RootDrafter(), slots=1, max_waiting=2), params_for("greedy")
    requests = [loop.add(prompts()[i], params[i]) for i in range(3)]  # one has the slot
    before = snapshot(loop)
    with pytest.raises(EngineBusy, match="try again later, or raise max_waiting"):
        loop.add([1, 2], params[0])
    assert snapshot(loop) == before
    loop.step()
    with pytest.raises(EngineBusy):
        loop.add([1, 2], replace(params[0], n=2))
    while loop.requests:
        loop.step()
    assert all(request.prompt + request.output == plain("greedy")[request.seed] for request in requests)


def test_a_failure_that_is_nobodys_is_raised(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody runs who could end with it; stepping on would fail for ever."""
    loop = make_loop(models.main, RootDrafter())
    loop.add([1, 2], SamplingParams(max_tokens=3))
    with monkeypatch.context() as patch:
        patch.setattr(loop.scheduler, "plan", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loop.step()
    while loop.requests:
        loop.step()


# ---- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nodes"), [("chain:3", 4), ("4x2x2", 29), ("tree:16", 17), ("tree:31", 32), ("tree:63", 64)]
)
def test_statistics_of_full_trees(models: Models, name: str, nodes: int) -> None:
    """All but the first step of a one-token prompt, which has no hidden state to draft from, send a full tree. A tree
    of fixed width reaches every depth; the best nodes may not."""
    loop = make_loop(models.main, make_drafter(name, models, {}))
    for request in decode(loop, prompts(), params_for("sampled", max_tokens=30)):
        drafted = request.stats.steps - int(len(request.prompt) == 1)
        assert request.stats.nodes == nodes * drafted + request.stats.steps - drafted
        proposed = request.stats.proposed_per_depth
        assert proposed[0] == drafted
        assert proposed == (sorted(proposed, reverse=True) if name.startswith("tree") else [drafted] * 3)


def test_statistics_of_the_right_drafter(models: Models, plain: Plain) -> None:
    """110 tokens in steps of 6: 18 whole ones and one of 2, in which the text ends."""
    loop = make_loop(models.main, Scripted("right", plain("greedy")))
    for request in decode(loop, prompts(), params_for("greedy")):
        assert (request.stats.steps, request.stats.tokens) == (19, 110)
        assert request.stats.accepted_per_depth == [19, 18, 18, 18, 18]
        assert request.stats.nodes == 18 * 6 + 3
        assert sum(request.drafted) == 18 * 5 + 2
        assert request.drafted[:7] == [True] * 5 + [False, True]


# ---- shapes at the edge of what a model can draft -----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["4x2x2", "tree:16", "4"])
def test_a_draft_vocabulary_smaller_than_the_tree_is_wide(models: Models, plain: Plain, shape: str) -> None:
    texts, ids = plain("greedy"), torch.tensor([4, 9, 30])
    head = Linear(models.main.head_weight[ids])
    layers = [replace(layer, head=replace(layer.head, linear=head)) for layer in models.mtp.layers]
    module = replace(models.mtp, draft_ids=ids, layers=layers)
    drafter = MTPDrafter(module, TreeShape.parse(shape), slots=SLOTS)
    requests = decode(make_loop(models.main, drafter), prompts(), params_for("greedy", max_tokens=30))
    assert all(r.output == texts[r.seed][len(r.prompt) :][:30] for r in requests)


@pytest.mark.parametrize("shape", ["tree:1", "tree:2", "chain:6"])
def test_a_deep_drafter_with_few_nodes_stays_within_its_rows(models: Models, plain: Plain, shape: str) -> None:
    """The pages have room for the text and a step's rows, the main model's or the drafter's, and not a row more."""
    texts, prompt = plain("greedy"), prompts()[1]
    drafter = MTPDrafter(models.deep, TreeShape.parse(shape), slots=1)
    most = 80 - len(prompt) - max(drafter.max_nodes, drafter.scratch_rows)
    loop = make_loop(models.main, drafter, slots=1, tokens=80)
    [request] = decode(loop, [prompt], params_for("greedy", seed=78, count=1, max_tokens=most))
    assert request.output == texts[78][len(prompt) :][:most]
