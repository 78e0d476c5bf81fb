"""The whole path of a GPU step, kernels and all: what it emits does not depend, by a single bit, on drafting.

Without a GPU the kernels run in Triton's interpreter, operation by operation; with one, as CUDA graphs.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shapes import Dice, planner_of
from tiny import MTP, Sums, write_llama, write_mtp

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.exact import MOST_ROWS, exact_attention
from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import Experts, SamplingParams, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.drafters.device import DeviceDraftOps
from mtp_engine.drafters.expand import DraftOps
from mtp_engine.kernels.state import advance
from mtp_engine.models import loader
from mtp_engine.models.fused import fuse, fuse_mtp
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.protocols import Drafter, Verifier
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS
from mtp_engine.runtime.request import Request
from mtp_engine.runtime.step import EagerRunner
from mtp_engine.verifiers import BlockVerifier, DeviceMatchVerifier, DeviceRRSVerifier, TraversalVerifier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, PAGE = 3, 16
GPU = DEVICE.type == "cuda"  # the interpreter takes seconds a step: it gets one small case
PROMPTS = [[5, 9, 2, 40, 17, 33, 8], [3], [7] * 4 + [11, 30] * 80][: 3 if GPU else 1]
TOKENS = 60 if GPU else 3
LLAMA = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = 2 if GPU else 1
HEADS = {
    "heads": 4,
    "kv_heads": 2,
    "qk_dim": 16,
    "v_dim": 16,
    "rope_dim": 16,
    "rope_theta": 1e4,
    "window": 20,
    "sink": False,
}


class Model:
    """A tiny model with MTP layers, through the kernels."""

    def __init__(self, folder: Path, mtp: Path, dtype: torch.dtype, experts: Experts = "auto") -> None:
        decoder = loader.load_main(folder, dtype, DEVICE, lambda *_: None, experts=experts)
        module = loader.load_mtp(mtp, decoder, 0, lambda *_: None)
        self.decoder, self.module = fuse(decoder), fuse_mtp(module)
        self._plain: dict[float, list[list[int]]] = {}

    def drafter(self, shape: str, ops: DraftOps | None = None) -> Drafter:
        if shape == "root":
            return RootDrafter()
        return MTPDrafter(
            self.module, TreeShape.parse(shape), slots=SLOTS + 1, attention=exact_attention,
            ops=ops or DeviceDraftOps(4, DEVICE), ring_page=PAGE, ring_rows=MOST_ROWS,
        )  # fmt: skip

    def loop(
        self, shape: str | Drafter, attention: AttentionFactory = exact_attention, rule: Verifier | None = None,
        graphs: bool = GPU, ops: DraftOps | None = None, **options: Any,
    ) -> DecodeLoop:  # fmt: skip
        drafter = self.drafter(shape, ops) if isinstance(shape, str) else shape
        layers = [layer.attention for layer in self.decoder.config.layers]
        cache = HybridKV(
            layers, Pages(slots=SLOTS + 1, tokens=2000, page_size=PAGE, device=DEVICE), max_nodes=MOST_ROWS, ring_page=PAGE,
            behind=2 * (drafter.depth + 1), kernels=True, dtype=self.decoder.embedding.dtype,
        )  # fmt: skip
        assert cache.pages.reserve(SLOTS, SCRATCH_TOKENS)
        runner = partial(GraphRunner, in_flight=2, scratch=SLOTS, device=DEVICE)
        return decode_loop(
            self.decoder, cache, drafter, rule or DeviceMatchVerifier(4, DEVICE), slots=SLOTS, max_context=400,
            eos_token_ids=[], prefill_chunk=80, device=DEVICE, attention=attention,
            kernels=True, advance=advance, runner=runner if graphs else EagerRunner,
            grammars=lambda _: Sums(self.decoder.config.vocab_size), **options,
        )  # fmt: skip

    def plain(self, temperature: float) -> list[list[int]]:
        """Every prompt's text, decoded alone and without drafting, once for all tests."""
        if temperature not in self._plain:
            params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=3)
            texts = [decode(self.loop("root"), [prompt], [params])[0].output for prompt in PROMPTS]
            self._plain[temperature] = texts
        return self._plain[temperature]


def decode(loop: DecodeLoop, prompts: list[list[int]], params: list[SamplingParams]) -> list[Request]:
    requests = [loop.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    while loop.requests:
        loop.step()
    if isinstance(loop.runner, GraphRunner) and GPU:
        assert loop.runner.replayed > 0, "nothing ran as graphs"
        assert loop.runner.slow == 0, "something did not run as graphs"
    return requests


@pytest.fixture(scope="module", params=["llama", "mimo", "mimo-fp8", "mimo-int4"] if GPU else ["llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        folder = write_llama(root / "main", num_hidden_layers=LAYERS, **LLAMA)
        mtp = write_mtp(root / "mtp", width=64, **{**MTP, "attention": HEADS})
        return Model(folder, mtp, torch.bfloat16)
    folder = make_tiny(root / "tiny", fp8=request.param == "mimo-fp8", sliding_window=20)
    return Model(folder, folder, torch.bfloat16, "int4" if request.param == "mimo-int4" else "auto")


@pytest.mark.parametrize("temperature", [0.0, 0.9] if GPU else [0.9])
def test_bf16_text_does_not_depend_on_the_tree(model: Model, temperature: float) -> None:
    """Alone or in a batch, plain or over any tree, a prompt gets the same tokens."""
    params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=3)
    plain = model.plain(temperature)
    assert all(len(text) == TOKENS for text in plain)
    for shape in ("chain:3", "2x2x1", "tree:6") if GPU else ("2x1",):
        assert [r.output for r in decode(model.loop(shape), PROMPTS, [params] * len(PROMPTS))] == plain, shape


def test_bf16_text_does_not_depend_on_the_plan(model: Model) -> None:
    """Shapes change from step to step, plain ones among them, after which rows that waited are drafted from."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.9, seed=3)
    plain = model.plain(0.9)
    shapes = [TreeShape.parse(name) for name in ("chain:1", "chain:3", "tree:6")]
    for seed in (1, 2) if GPU else (1,):
        dice = Dice(seed, 0.6, planner_of(shapes, 3, 16))
        drafter = MTPDrafter(
            model.module, shapes[1], slots=SLOTS + 1, attention=exact_attention, ops=DeviceDraftOps(4, DEVICE), ring_page=PAGE,
            ring_rows=MOST_ROWS, others=[shapes[0], shapes[2]], late=16, planner=dice,
        )  # fmt: skip
        loop = model.loop(drafter, graphs=True, shapes=dice)
        assert [request.output for request in decode(loop, PROMPTS, [params] * len(PROMPTS))] == plain
        assert not GPU or len(set(dice.chosen)) == 5


def test_whatever_requests_want(model: Model) -> None:
    """Penalties, bad words, log-probabilities, structures, trees of their own: the same tokens over trees as without."""
    tokens = 40 if GPU else 4
    shape, anything = TreeShape.parse("2x1"), Structure(regex="any")
    penalised = SamplingParams(
        max_tokens=tokens, temperature=0.8, seed=1, frequency_penalty=0.7, bad_words=((4, 5), (9,)), logprobs=2
    )
    params = [
        replace(penalised, tree=shape, structure=anything),
        penalised,
        SamplingParams(max_tokens=tokens, temperature=0.8, seed=3, tree=shape, top_p=0.9),
    ][: len(PROMPTS)]
    plain = [decode(model.loop("root"), [prompt], [each])[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    for drafted in ("2x2x1", "tree:6") if GPU else ("tree:3",):
        found = decode(model.loop(drafted), PROMPTS, params)
        assert [r.output for r in found] == [r.output for r in plain], drafted
        assert [p.token for p in found[0].logprobs] == found[0].output
        assert sum(found[0].output) % 3 != 2


@pytest.mark.cuda
def test_two_kinds_of_graphs_take_turns(model: Model) -> None:
    """A request that wants more joins while steps are in flight, and leaves before the bare one ends."""
    params = [
        SamplingParams(max_tokens=60, temperature=0.7, seed=4),
        SamplingParams(max_tokens=12, temperature=0.7, seed=5, frequency_penalty=1.0, logprobs=0),
    ]
    alone = [decode(model.loop("root"), [PROMPTS[i]], [each])[0].output for i, each in enumerate(params)]
    loop = model.loop("tree:6")
    first = loop.add(PROMPTS[0], params[0])
    loop.step()
    second = loop.add(PROMPTS[1], params[1])
    while loop.requests:
        loop.step()
    assert [first.output, second.output] == alone


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (DeviceRRSVerifier, "chain:3"),
        (BlockVerifier, "chain:3"),
        (DeviceRRSVerifier, "3x2"),
        (TraversalVerifier, "3x2"),
    ],
)
def test_other_rules_say_in_graphs_what_they_say_without(model: Model, rule: Any, shape: str) -> None:
    params = [
        SamplingParams(max_tokens=40, temperature=0.8, seed=1, frequency_penalty=0.5),
        SamplingParams(max_tokens=40, temperature=0.8, seed=2),
        SamplingParams(max_tokens=40, temperature=1.1, seed=3, top_p=0.9, logprobs=3),
    ]

    def said(graphs: bool) -> list[list[int]]:
        loop = model.loop(shape, rule=rule(), graphs=graphs, ops=DeviceDraftOps(16, DEVICE, "drawn"))
        return [request.output for request in decode(loop, PROMPTS, params)]

    assert said(True) == said(False)


@pytest.mark.cuda
def test_requests_join_and_leave_steps_in_flight(model: Model) -> None:
    """With steps queued ahead, a request that ends, one that is removed and one that joins take nothing from others."""
    params = [SamplingParams(max_tokens=count, temperature=0.7, seed=count) for count in (5, 40, 31, 17)]
    alone = [decode(model.loop("root"), [PROMPTS[i % 3]], [each])[0].output for i, each in enumerate(params)]
    loop = model.loop("tree:6")
    first = [loop.add(PROMPTS[i], params[i]) for i in range(2)]
    loop.step()
    dropped = loop.add(PROMPTS[2], params[2])
    while not first[0].finish_reason:
        loop.step()
    loop.remove(dropped)
    late = loop.add(PROMPTS[0], params[3])
    while loop.requests:
        loop.step()
    assert [first[0].output, first[1].output, late.output] == [alone[0], alone[1], alone[3]]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", ["chain:3", "tree:6"])
def test_kept_beginnings_have_the_bits_of_what_was_read(model: Model, shape: str) -> None:
    """Whole prompts, and answers that are taken up where they were cut, with steps in flight: also of a preempted request."""
    prompts, params = [*PROMPTS, PROMPTS[2] + [9, 4]], SamplingParams(max_tokens=21, temperature=0.8, seed=2)
    loop = model.loop(shape, prefix_bytes=10**8, share_pages=True)
    misses = decode(loop, prompts, [params] * 4)
    hits = decode(loop, prompts, [params] * 4)
    assert [r.output for r in hits] == [r.output for r in misses]
    assert [r.stats.steps for r in hits] == [r.stats.steps for r in misses]
    assert [r.stats.cached_tokens for r in hits] == [len(prompt) - 1 for prompt in prompts]
    further = [request.prompt + request.output[: 21 - 4 * i] + [3, 7] for i, request in enumerate(misses)]
    kept, alone = decode(loop, further, [params] * 4), decode(model.loop("root"), further, [params] * 4)
    assert [r.output for r in kept] == [r.output for r in alone]
    assert kept[0].stats.cached_tokens == len(further[0]) - 3
    request = loop.add(PROMPTS[0], SamplingParams(max_tokens=60, temperature=0.8, seed=5))
    for _ in range(6):
        loop.step()
    while loop._flying:
        loop._land()
    loop.memory.keep(request, apart=True)
    loop.scheduler._requeue(request)
    while loop.requests:
        loop.step()
    [plain] = decode(model.loop("root"), [PROMPTS[0]], [request.params])
    assert request.output == plain.output
    loop.memory.prefix.check()  # type: ignore[union-attr]


@pytest.mark.cuda
@torch.inference_mode()
def test_a_prompt_in_chunks_has_the_bits_of_single_rows(model: Model) -> None:
    """So a request that was queued again, and reads its prompt and answer in other chunks, says the same."""
    tokens = torch.tensor([[1 + i * 7 % 50 for i in range(200)]], device=DEVICE)
    layers = [layer.attention for layer in model.decoder.config.layers]

    def read(size: int) -> torch.Tensor:
        cache = HybridKV(
            layers, Pages(slots=1, tokens=400, page_size=PAGE, device=DEVICE), max_nodes=MOST_ROWS, ring_page=PAGE,
            kernels=True, dtype=model.decoder.embedding.dtype,
        )  # fmt: skip
        cache.pages.reserve(0, 300)
        hidden = []
        for start in range(0, 200, size):
            rows = StepRows.prompt(0, start, min(size, 200 - start), DEVICE)
            chunk = tokens[:, start : start + size]
            hidden.append(model.decoder.forward(chunk, rows.positions, exact_attention(cache, rows))[0])
        return torch.cat(hidden)

    single = read(1)
    for size in (2, 5, 17, 33, MOST_ROWS, MOST_ROWS + 1, 130, 200):
        assert torch.equal(read(size), single), size


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(64, 5, 17), (130, 33, 1)])
@torch.inference_mode()
def test_prompts_that_are_read_together_have_the_bits_of_each_alone(model: Model, sizes: tuple[int, ...]) -> None:
    """In chunks of these sizes, turn by turn, until all are read; some rings turn, and some chunks are longer than rings."""
    prompts = [[1 + (i * 7 + b) % 50 for i in range(200)] for b in range(3)]
    layers = [layer.attention for layer in model.decoder.config.layers]

    def fresh() -> HybridKV:
        cache = HybridKV(
            layers, Pages(slots=3, tokens=1200, page_size=PAGE, device=DEVICE), max_nodes=MOST_ROWS, ring_page=PAGE,
            kernels=True, dtype=model.decoder.embedding.dtype,
        )  # fmt: skip
        for slot in range(3):
            cache.pages.reserve(slot, 300)
        return cache

    def forward(cache: HybridKV, rows: StepRows, tokens: list[int]) -> torch.Tensor:
        given = torch.tensor([tokens], device=DEVICE)
        return model.decoder.forward(given, rows.positions, exact_attention(cache, rows))[0]

    alone = []
    for slot, prompt in enumerate(prompts):
        cache = fresh()
        alone.append(torch.cat([forward(cache, StepRows.prompt(slot, i, 1, DEVICE), [prompt[i]]) for i in range(200)]))
    cache, at = fresh(), [0, 0, 0]
    for turn in range(3):
        spans = tuple((slot, at[slot], min(sizes[(slot + turn) % 3], 200 - at[slot])) for slot in range(3))
        table = torch.tensor(spans, device=DEVICE).T.contiguous()
        rows = StepRows.prompts(table, sum(count for *_, count in spans), 300)
        tokens = [prompts[slot][i] for slot, start, count in spans for i in range(start, start + count)]
        for (slot, start, count), states in zip(
            spans, forward(cache, rows, tokens).split([c for *_, c in spans]), strict=True
        ):
            assert torch.equal(states, alone[slot][start : start + count]), (turn, slot)
            at[slot] = start + count


@pytest.mark.cuda
@pytest.mark.parametrize("shape", ["root", "chain:3", "tree:6"])
def test_prompts_as_graphs_are_those_read_operation_by_operation(model: Model, shape: str) -> None:
    """The same texts in the same steps; all passes are replayed, of prompts alone and together, in chunks and behind hits."""
    prompts = [[1 + (i * 7 + b) % 50 for i in range(length)] for b, length in enumerate((150, 30, 3, 99, 61, 40))]
    params, found = SamplingParams(max_tokens=30, temperature=0.7, seed=2), []
    for graphs in (True, False):
        loop = model.loop(shape, graphs=graphs, prefix_bytes=10**8, share_pages=True)
        runner: Any = loop.runner
        slow = 0
        if graphs:
            runner.capture(SLOTS, 400, lambda *_: None)
            slow = runner.prompts.slow  # each size once, before it was captured
        requests = [*decode(loop, prompts, [params] * 6), *decode(loop, [p + [4] * 9 for p in prompts], [params] * 6)]
        found.append([(r.output, r.stats.steps, r.stats.cached_tokens) for r in requests])
        if graphs:
            assert runner.prompts.replayed > 4
            assert runner.prompts.slow == slow, "all sizes were captured"
    assert found[0] == found[1]
    assert any(cached for *_, cached in found[0])
