"""The CPU's library: no row's bits depend on another row, on chunks, trees, batches or threads; twins in torch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import MTP, attached, show_prompt, write_llama, write_mtp
from torch import Tensor

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.native import NativeAttention
from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, RootDrafter, TorchDraftOps, TorchLevels
from mtp_engine.drafters.expand import Level, finish
from mtp_engine.drafters.lazy import LevelsFactory
from mtp_engine.drafters.native import NativeDraftOps, NativeLevels
from mtp_engine.kernels.cpu import build
from mtp_engine.kernels.cpu.calls import PackedLinear, PackedStack, Team
from mtp_engine.kernels.reference import int8_linear
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.native import NativeMTP, fuse, fuse_mtp, why_not
from mtp_engine.models.weights import Makers
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.sampling.processors import Tables
from mtp_engine.tree import VerifyResult
from mtp_engine.verifiers import MatchVerifier, NativeMatchVerifier

CPU = torch.device("cpu")
LENGTH = 96
VOCAB = 5000
TOKENS = torch.randint(0, 61, (LENGTH,), generator=torch.Generator().manual_seed(3))
FEW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
LLAMA = {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 6, "intermediate_size": 64}
HEADS = {
    "heads": 4,
    "kv_heads": 2,
    "qk_dim": 32,
    "v_dim": 16,
    "rope_dim": 8,
    "rope_theta": 1e4,
    "window": 7,
    "sink": True,
}
GENERIC = tuple(flag for flag in build.FLAGS if not flag.startswith("-march"))
PROCESSORS = {
    "native": build.FLAGS, "no VNNI": (*build.FLAGS, "-mno-avx512vnni"), "no AVX-512": (*GENERIC, "-march=x86-64-v3"),
    "no vectors": (*GENERIC, "-O1"),  # compiles in a sixth of the time
}  # fmt: skip


@pytest.fixture(scope="module")
def team(library: Path) -> Team:
    return Team(2, library)


def load(folder: Path, team: Team) -> tuple[Decoder, Decoder]:
    """As the library runs it, and its twin of torch modules with the same weights."""
    linear = lambda weight, bias: PackedLinear(team, weight, bias)  # noqa: E731
    make = Makers(linear, lambda weight: PackedStack([linear(each, None) for each in weight]))
    loaded = loader.load_main(folder, torch.float32, CPU, lambda *_: None, dequantize=True, make=make)
    return fuse(loaded, team), loaded


def write(folder: Path, kind: str) -> Path:
    if kind == "llama":
        return write_llama(folder, **LLAMA)
    if kind == "mimo":
        return make_tiny(folder, family="mimo", head_dim=16)
    wide = {"head_dim": 32, "swa_head_dim": 32}
    return make_tiny(folder, fp8=True, **wide)


@pytest.fixture(scope="module", params=["llama", "mimo", "mimo_v2_flash"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, team: Team) -> Decoder:
    return load(write(tmp_path_factory.mktemp("native") / "m", request.param), team)[0]


def new_cache(model: Decoder, slots: int = 1) -> HybridKV:
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(
        layers, Pages(slots=slots, tokens=slots * 256, page_size=16, device=CPU), max_nodes=64, dtype=torch.float32
    )
    for slot in range(slots):
        cache.pages.reserve(slot, 192)
    return cache


def read(model: Decoder, cache: HybridKV, tokens: Tensor, sizes: Sequence[int], slot: int = 0) -> Tensor:
    """Hidden states of a prompt that is read in chunks of these sizes. [sum of sizes, H]."""
    out, start = [], 0
    for size in sizes:
        rows = StepRows.prompt(slot, start, size, CPU)
        out.append(model.forward(tokens[None, start : start + size], rows.positions, NativeAttention(cache, rows))[0])
        start += size
    return torch.cat(out)


@pytest.fixture(scope="module")
def plain(model: Decoder) -> Tensor:
    """One token at a time."""
    return read(model, new_cache(model), TOKENS, [1] * LENGTH)


@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 48, 63, 64, 96])
def test_any_number_of_rows_has_the_same_bits(model: Decoder, plain: Tensor, size: int) -> None:
    sizes = [size] * (LENGTH // size)
    hidden = read(model, new_cache(model), TOKENS, sizes)
    assert torch.equal(hidden, plain[: len(hidden)])
    logits = torch.cat([model.logits(row[None]) for row in plain[: len(hidden)]])
    assert torch.equal(model.logits(hidden), logits)


@FEW
@given(st.data())
def test_any_chunks_have_the_same_bits(model: Decoder, plain: Tensor, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda x: sum(x) <= LENGTH))
    cache, whole = new_cache(model), new_cache(model)
    hidden = read(model, cache, TOKENS, sizes)
    read(model, whole, TOKENS, [1] * sum(sizes))
    assert torch.equal(hidden, plain[: sum(sizes)])
    for mine, theirs in zip(cache.save(0, 0, sum(sizes)), whole.save(0, 0, sum(sizes)), strict=True):
        assert torch.equal(mine, theirs)


@FEW
@given(st.data())
def test_any_tree_has_the_bits_of_plain_decoding(model: Decoder, data: st.DataObject) -> None:
    start, nodes = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 64))
    parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, nodes)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens, depths = torch.randint(0, 61, (nodes,), generator=generator), [0] * nodes
    for i in range(1, nodes):
        depths[i] = depths[parents[i]] + 1
    cache = new_cache(model)
    if start:
        read(model, cache, TOKENS, [start])
    rows = StepRows(
        torch.tensor([0]), torch.tensor([start]), start + torch.tensor([depths]), torch.tensor([parents]), max(depths),
        start + nodes,
    )  # fmt: skip
    hidden = model.forward(tokens[None], rows.positions, NativeAttention(cache, rows))[0]
    for node in {nodes - 1, data.draw(st.integers(0, nodes - 1))}:
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        text = torch.cat([TOKENS[:start], tokens[path[::-1]]])
        alone = read(model, new_cache(model), text, [1] * len(text))
        assert torch.equal(hidden[node], alone[-1])


@FEW
@given(st.lists(st.integers(1, 80), min_size=2, max_size=4), st.integers(1, 5))
def test_any_batch_has_the_bits_of_requests_alone(model: Decoder, lengths: list[int], nodes: int) -> None:
    cache = new_cache(model, len(lengths))
    for slot, length in enumerate(lengths):
        read(model, cache, TOKENS.roll(slot), [length], slot)
    index, starts = torch.arange(nodes), torch.tensor(lengths)
    rows = StepRows(
        torch.arange(len(lengths)), starts, starts[:, None] + index, (index - 1).expand(len(lengths), -1), nodes - 1, 200,
        chain=True,
    )  # fmt: skip
    tokens = torch.stack([TOKENS.roll(slot)[length : length + nodes] for slot, length in enumerate(lengths)])
    hidden = model.forward(tokens, rows.positions, NativeAttention(cache, rows))
    for slot, length in enumerate(lengths):
        alone = read(model, new_cache(model), TOKENS.roll(slot), [length, nodes])
        assert torch.equal(hidden[slot], alone[length:])


@pytest.mark.parametrize("kind", ["llama", "mimo", "mimo_v2_flash"])
def test_threads_change_nothing_and_torch_says_the_same(tmp_path: Path, library: Path, kind: str) -> None:
    """More threads than cores, too. The twin's attention rounds in another order, and then so do its activations."""
    folder, found = write(tmp_path / "m", kind), []
    for threads in (1, 2, 7):
        native, twin = load(folder, Team(threads, library))
        found.append(read(native, new_cache(native), TOKENS, [40, 1, 55]))
    assert all(torch.equal(each, found[0]) for each in found)
    if kind == "mimo_v2_flash":
        return  # its experts are packed, and torch has no twin for them
    cache, rows = new_cache(native), StepRows.prompt(0, 0, LENGTH, CPU)
    expected = twin.forward(TOKENS[None], rows.positions, TorchAttention(cache, rows))[0]
    assert (found[0] - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "mimo", "mimo_v2_flash"])
def test_it_is_the_model_that_was_loaded(tmp_path: Path, team: Team, kind: str) -> None:
    """Within what 8 bits do to random weights; quality is measured on a real model (bench/int8.py)."""
    folder = write(tmp_path / "m", kind)
    reference = loader.load_main(folder, torch.float32, CPU, lambda *_: None, dequantize=True)
    native, _ = load(folder, team)
    cache, rows = new_cache(native), StepRows.prompt(0, 0, LENGTH, CPU)
    expected = reference.logits(reference.forward(TOKENS[None], rows.positions, TorchAttention(cache, rows)))[0]
    found = native.logits(read(native, new_cache(native), TOKENS, [LENGTH]))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.fixture(scope="module", params=list(PROCESSORS), ids=str)
def other(request: pytest.FixtureRequest, library: Path) -> Team:
    """As on a processor that can do less."""
    return Team(2, library, PROCESSORS[request.param])


@FEW
@given(st.integers(1, 21), st.integers(1, 6), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_products_are_integer_arithmetic(
    other: Team, rows: int, columns: int, outputs: int, extreme: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, 16 * columns, generator=generator)
    x = torch.randn(rows, 16 * columns, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (rows, 1), generator=generator
    )
    if extreme:  # the largest sums that there are
        weight, x = weight.sign(), x.abs()[:, :1].expand(x.shape).contiguous()
        weight[0] = 1.0
    x[seed % rows] *= seed % 3
    bias = torch.randn(outputs, generator=generator) if seed % 2 else None
    assert torch.equal(PackedLinear(other, weight, bias)(x), int8_linear(x, weight, bias))


def decode(
    model: Decoder, drafter: MTPDrafter | LazyMTPDrafter | RootDrafter, prompts: list[list[int]], chunk: int, team: Team
) -> list[list[int]]:
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(
        layers, Pages(slots=3, tokens=900, page_size=16, device=CPU), max_nodes=drafter.max_nodes, dtype=torch.float32
    )
    loop = decode_loop(
        model, cache, drafter, NativeMatchVerifier(team), slots=2, max_context=400, eos_token_ids=(), prefill_chunk=chunk,
        device=CPU, attention=NativeAttention, packs=False,
    )  # fmt: skip
    params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, temperature=1.0, seed=4)]
    requests = [loop.add(prompt, each) for each in params for prompt in prompts]
    while loop.requests:
        loop.step()
    assert all(request.finish_reason == "length" for request in requests)
    return [request.output for request in requests]


@pytest.mark.parametrize("shape", ["chain:3", "3x2x1", "tree:7"])
@pytest.mark.parametrize("changes", [{}, {"chained": False, "concat": "hidden_first", "own_norm": False}], ids=str)
def test_drafting_does_not_change_the_text(tmp_path: Path, other: Team, shape: str, changes: dict[str, Any]) -> None:
    model, module = load_both(tmp_path, other, changes)
    prompts = [TOKENS[:21].tolist(), TOKENS[30:77].tolist()]
    wanted = decode(model, RootDrafter(), prompts, 64, other)
    drafters: list[LazyMTPDrafter | MTPDrafter] = [
        MTPDrafter(module, TreeShape.parse(shape), slots=3, attention=NativeAttention),
        MTPDrafter(module, TreeShape.parse(shape), slots=3, attention=NativeAttention, ops=NativeDraftOps(other)),
        *(LazyMTPDrafter(module, TreeShape.parse(shape), levels, slots=3) for levels in both_levels(other)),
    ]
    for drafter in drafters:
        assert decode(model, drafter, prompts, 16, other) == wanted


def load_both(tmp_path: Path, team: Team, changes: dict[str, Any]) -> tuple[Decoder, MTPModule]:
    folder = write_llama(tmp_path / "m", **LLAMA)
    layers = write_mtp(tmp_path / "d", width=48, attention=HEADS, intermediate_size=64, **changes)
    native, loaded = load(folder, team)
    make = Makers(lambda weight, bias: PackedLinear(team, weight, bias))
    return native, fuse_mtp(loader.load_mtp(layers, loaded, 0, lambda *_: None, make=make), team)


def test_levels_are_those_of_the_fp32_layers(tmp_path: Path, team: Team) -> None:
    _, found = load_both(tmp_path, team, {})
    reference = loader.load_main(tmp_path / "m", torch.float32, CPU, lambda *_: None)
    expected = loader.load_mtp(tmp_path / "d", reference, 0, lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    embedded, hidden = torch.randn(2, 1, 12, 48, generator=generator).unbind(0)
    for level in range(MTP["depth"]):
        outputs = []
        for module, attention in ((expected, TorchAttention), (found, NativeAttention)):
            cache = HybridKV(
                [expected.config.layer.attention] * 3, Pages(slots=1, tokens=64, page_size=16, device=CPU), max_nodes=64,
                dtype=torch.float32,
            )  # fmt: skip
            rows = StepRows.prompt(0, 3, 12, CPU)
            step = attention(cache, StepRows(**{**vars(rows), "first": torch.tensor([5])}))  # type: ignore[operator]
            outputs.append(module.logits(level, module.forward(level, embedded, hidden, rows.positions - 1, step)))
        assert (outputs[0] - outputs[1]).norm() < 0.05 * outputs[0].norm()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, team: Team) -> tuple[NativeMTP, Team]:
    """MTP layers over a vocabulary that is worth several vectors."""
    folder = tmp_path_factory.mktemp("wide")
    write_llama(folder / "m", **LLAMA, vocab_size=VOCAB)
    layers = write_mtp(folder / "d", width=48, attention=HEADS, intermediate_size=64)
    make = Makers(lambda weight, bias: PackedLinear(team, weight, bias))
    loaded = loader.load_main(folder / "m", torch.float32, CPU, lambda *_: None, make=make)
    module = fuse_mtp(loader.load_mtp(layers, loaded, 0, lambda *_: None, make=make), team)
    return cast(NativeMTP, module), team


def both_levels(team: Team) -> list[LevelsFactory]:
    """The library's, and its twin over the same weights of 8 bits."""
    return [
        lambda module: NativeLevels(cast(NativeMTP, module), team),
        lambda module: TorchLevels(module, NativeAttention),
    ]


@FEW
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["4x2x1", "chain:3", "tree:7", "tree:40"]))
def test_levels_grow_the_trees_of_their_twin(wide: tuple[NativeMTP, Team], seed: int, batch: int, shape: str) -> None:
    """Requests of different lengths and temperatures, over some steps. Scores agree up to what the last bit of a logarithm
    does: none of these draws is near a tie."""
    (module, team), generator = wide, torch.Generator().manual_seed(seed)
    temperatures = [0.0, 0.8, 1.2, 0.3][:batch]
    params = [SamplingParams(temperature=each) for each in temperatures]
    sampling = SamplingBatch.build(params, [seed * 7919**3 + b for b in range(batch)], CPU)
    drafters = [
        attached(LazyMTPDrafter(module, TreeShape.parse(shape), levels, slots=batch), slots=batch, tokens=batch * 160)
        for levels in both_levels(team)
    ]
    lengths = torch.randint(0, 60, (batch,), generator=generator)
    tokens = torch.randint(0, VOCAB, (batch, 100), generator=generator)
    states = torch.randn(batch, 100, 48, generator=generator)
    for drafter in drafters:
        for b, length in enumerate(lengths.tolist()):
            show_prompt(drafter, b, tokens[b, : length + 1].tolist(), states[b, :length])
    biases = Tables.empty(batch, VOCAB, (0, 0), CPU)
    biases.bias[0, ::3], biases.bias[-1] = -float("inf"), torch.randn(VOCAB, generator=generator)
    for step in range(4):
        requests = Batch(
            torch.arange(batch), tokens[torch.arange(batch), lengths], lengths, int(lengths.max()), sampling,
            biases=biases if step % 2 else None,
        )  # fmt: skip
        native, torchs = trees = [drafter.draft(requests) for drafter in drafters]
        for name in ("tokens", "parents", "depths", "size"):
            assert torch.equal(getattr(native, name), getattr(torchs, name)), name
        assert torch.allclose(*(tree.scores for tree in trees), atol=1e-3)  # type: ignore[arg-type]
        counts = torch.randint(1, native.max_depth + 2, (batch,), generator=generator)
        index = lengths[:, None] + torch.arange(native.max_depth + 1)
        path = torch.arange(native.max_depth + 1).expand(batch, -1)
        hidden = states.gather(1, index[..., None].expand(-1, -1, 48))
        for drafter in drafters:
            drafter.observe(requests, VerifyResult(path, tokens.gather(1, index + 1), counts), hidden)
        lengths = lengths + counts


@FEW
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([61, 5000, 49152]), st.sampled_from(["4x8", "chain"]),
    st.integers(0, 1),
)  # fmt: skip
def test_choosing_is_that_of_torch(team: Team, seed: int, batch: int, vocab: int, kind: str, extra: int) -> None:
    """And so is how slots move on. extra: 0 where the last of them is in the batch."""
    generator = torch.Generator().manual_seed(seed)
    params = [SamplingParams(temperature=each) for each in [0.0, 0.8, 1.2, 0.3][:batch]]
    sampling = SamplingBatch.build(params, [seed * 7919**3 + b for b in range(batch)], CPU)
    lengths = torch.randint(0, 3000, (batch,), generator=generator)
    requests = Batch(torch.arange(batch), torch.randint(0, vocab, (batch,)), lengths, 4000, sampling)
    levels = {"4x8": [(4, 4), (2, 8)], "chain": [(1, 1)] * 3}[kind]
    ids = torch.randperm(vocab, generator=generator)[: min(vocab, 2000)].contiguous()
    ops = TorchDraftOps()
    tree = ops.start(requests, levels, ids, vocab)
    for number, (width, keep) in enumerate(levels):
        scores = torch.randn(batch, tree.frontier, len(ids), generator=generator) * 3
        tree = ops.grow(tree, requests, Level(scores, ids, number + 1, width, keep))
    drafted = finish(tree, 0, torch.ones(batch, dtype=torch.bool))
    logits = torch.randn(batch, drafted.nodes, vocab, generator=generator) * 3
    for b in range(batch):  # drafts that match
        for node in range(1, drafted.nodes):
            if torch.rand((), generator=generator) < 0.5:
                logits[b, drafted.parents[b, node], drafted.tokens[b, node]] += 30
    expected, found = (
        verifier.verify(drafted, logits, requests) for verifier in (MatchVerifier(), NativeMatchVerifier(team))
    )
    assert torch.equal(expected.counts, found.counts)
    assert torch.equal(expected.path, found.path)
    for b, count in enumerate(found.counts.tolist()):
        assert torch.equal(expected.tokens[b, :count], found.tokens[b, :count])
    states = [SlotState(batch + extra, CPU, how) for how in (None, team.advance)]
    tables = [state.advance(requests, drafted, expected) for state in states]
    for ours, theirs in (tables, [state.lengths for state in states], [state.tokens[:-1] for state in states]):
        assert torch.equal(ours, theirs)


def test_callers_from_several_threads_take_turns(team: Team) -> None:
    linear = PackedLinear(team, torch.randn(70, 64))
    inputs = [torch.randn(rows, 64) for rows in range(1, 9)]
    wanted = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(linear, inputs * 40))
    assert all(torch.equal(y, wanted[i % len(inputs)]) for i, y in enumerate(found))


def test_sizes_that_do_not_suit(tmp_path: Path) -> None:
    config = loader.read_config(write_llama(tmp_path / "m"))
    assert "multiples of 16" in why_not(config.hidden_size, config.layers)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compilers", lambda: iter([]))
    with pytest.raises(build.NoCompiler, match="pip install ziglang"):
        build.compiled(tmp_path)
    monkeypatch.setattr(build, "_compilers", lambda: iter([["false"], ["no-such-compiler"]]))
    with pytest.raises(build.NoCompiler, match="no-such-compiler does not run"):
        build.compiled(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_library_is_made_anew(tmp_path: Path) -> None:
    build.compiled(tmp_path)
    [made] = tmp_path.iterdir()
    copy = tmp_path / "other" / made.name
    copy.parent.mkdir()
    copy.write_bytes(b"no library")
    with pytest.raises(build.NoCompiler):
        build.compiled(copy.parent)
    build.compiled(copy.parent)
