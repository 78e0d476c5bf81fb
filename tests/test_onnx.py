"""The CPU's graphs: no row's bits depend on another row, on the order of keys, on chunks, trees, batches or threads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import MTP, write_llama, write_mtp
from torch import Tensor

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.graph import GraphAttention
from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.models.onnx import fold, load, session, store
from mtp_engine.models.onnx.blocks import Precision, fixed_product, row_product
from mtp_engine.models.onnx.fold import Rounded
from mtp_engine.models.onnx.graph import Graph
from mtp_engine.models.onnx.model import GraphDecoder
from mtp_engine.verifiers import MatchVerifier

pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
BYTES = Precision(qkv=8, out=8, gate_up=8, down=8, head=8, join=8)
WORDS = Precision(qkv=15, out=15, gate_up=15, down=15, head=15, join=15)
LENGTH = 96
TOKENS = torch.randint(0, 61, (LENGTH,), generator=torch.Generator().manual_seed(3))
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("onnx") / "m", hidden_size=48, head_dim=16, num_attention_heads=6)


@pytest.fixture(scope="module", params=[(BYTES, 1), (WORDS, 1), (WORDS, 2)], ids=["8 bits", "15 bits", "2 threads"])
def model(folder: Path, request: pytest.FixtureRequest) -> GraphDecoder:
    precision, threads = request.param
    return load.load_main(folder, folder.parent / "graphs", threads=threads, precision=precision)


def new_cache(model: GraphDecoder, slots: int = 1) -> HybridKV:
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(
        layers, Pages(slots=slots, tokens=slots * 256, page_size=16, device=CPU), max_nodes=64, dtype=torch.float32
    )
    for slot in range(slots):
        cache.pages.reserve(slot, 192)
    return cache


def read(model: GraphDecoder, cache: HybridKV, tokens: Tensor, sizes: Sequence[int], slot: int = 0) -> Tensor:
    """Hidden states of a prompt that is read in chunks of these sizes. [sum of sizes, H]."""
    out, start = [], 0
    for size in sizes:
        rows = StepRows.prompt(slot, start, size, CPU)
        out.append(model.forward(tokens[None, start : start + size], rows.positions, GraphAttention(cache, rows))[0])
        start += size
    return torch.cat(out)


@pytest.fixture(scope="module")
def plain(model: GraphDecoder) -> Tensor:
    """One token at a time."""
    return read(model, new_cache(model), TOKENS, [1] * LENGTH)


@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 48, 63, 64, 96])
def test_any_number_of_rows_has_the_same_bits(model: GraphDecoder, plain: Tensor, size: int) -> None:
    sizes = [size] * (LENGTH // size)
    hidden = read(model, new_cache(model), TOKENS, sizes)
    assert torch.equal(hidden, plain[: len(hidden)])
    logits = torch.cat([model.logits(row[None]) for row in plain[: len(hidden)]])
    assert torch.equal(model.logits(hidden), logits)


@FEW
@given(st.data())
def test_any_chunks_have_the_same_bits(model: GraphDecoder, plain: Tensor, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda x: sum(x) <= LENGTH))
    cache = new_cache(model)
    whole = new_cache(model)
    hidden = read(model, cache, TOKENS, sizes)
    read(model, whole, TOKENS, [sum(sizes)])
    assert torch.equal(hidden, plain[: sum(sizes)])
    for mine, theirs in zip(
        cache.groups[0].read(0, 0, sum(sizes)), whole.groups[0].read(0, 0, sum(sizes)), strict=True
    ):
        assert torch.equal(mine, theirs)


@FEW
@given(st.data())
def test_any_tree_has_the_bits_of_plain_decoding(model: GraphDecoder, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 70))
    nodes = data.draw(st.integers(1, 64))
    parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, nodes)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens = torch.randint(0, 61, (nodes,), generator=generator)
    depths = [0] * nodes
    for i in range(1, nodes):
        depths[i] = depths[parents[i]] + 1
    cache = new_cache(model)
    if start:
        read(model, cache, TOKENS, [start])
    rows = StepRows(
        torch.tensor([0]), torch.tensor([start]), start + torch.tensor([depths]), torch.tensor([parents]), max(depths),
        start + nodes,
    )  # fmt: skip
    hidden = model.forward(tokens[None], rows.positions, GraphAttention(cache, rows))[0]
    for node in {nodes - 1, data.draw(st.integers(0, nodes - 1))}:
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        text = torch.cat([TOKENS[:start], tokens[path[::-1]]])
        alone = read(model, new_cache(model), text, [1] * len(text))
        assert torch.equal(hidden[node], alone[-1])


@FEW
@given(st.lists(st.integers(1, 80), min_size=2, max_size=4), st.integers(1, 5))
def test_any_batch_has_the_bits_of_requests_alone(model: GraphDecoder, lengths: list[int], nodes: int) -> None:
    cache = new_cache(model, len(lengths))
    for slot, length in enumerate(lengths):
        read(model, cache, TOKENS.roll(slot), [length], slot)
    index = torch.arange(nodes)
    starts = torch.tensor(lengths)
    rows = StepRows(
        torch.arange(len(lengths)), starts, starts[:, None] + index, (index - 1).expand(len(lengths), -1), nodes - 1, 200,
        chain=True,
    )  # fmt: skip
    tokens = torch.stack([TOKENS.roll(slot)[length : length + nodes] for slot, length in enumerate(lengths)])
    hidden = model.forward(tokens, rows.positions, GraphAttention(cache, rows))
    for slot, length in enumerate(lengths):
        alone = read(model, new_cache(model), TOKENS.roll(slot), [length, nodes])
        assert torch.equal(hidden[slot], alone[length:])


def test_pages_that_lie_apart_have_the_same_bits(model: GraphDecoder, plain: Tensor) -> None:
    """Few rows in a long stretch of storage are gathered instead of masked."""
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(layers, Pages(slots=3, tokens=4000, page_size=16, device=CPU), max_nodes=64, dtype=torch.float32)
    assert cache.pages.reserve(0, 16)
    assert cache.pages.reserve(1, 3000)
    assert cache.pages.reserve(0, LENGTH + 16)
    assert torch.equal(read(model, cache, TOKENS, [40, 1, 20]), plain[:61])


def test_threads_change_nothing(folder: Path) -> None:
    one, two = (
        load.load_main(folder, folder.parent / "graphs", threads=threads, precision=WORDS) for threads in (1, 2)
    )
    hidden = read(one, new_cache(one), TOKENS, [LENGTH])
    assert torch.equal(hidden, read(two, new_cache(two), TOKENS, [LENGTH]))
    assert torch.equal(one.logits(hidden), two.logits(hidden))


def test_it_is_the_same_model(folder: Path) -> None:
    """Within what rounding does to random weights; quality is measured on a real model (bench/LOG.md)."""
    reference = loader.load_main(folder, torch.float32, CPU, lambda *_: None)
    graph = load.load_main(folder, folder.parent / "graphs", threads=1, precision=WORDS)
    cache, rows = new_cache(graph), StepRows.prompt(0, 0, LENGTH, CPU)
    expected = reference.logits(
        reference.forward(TOKENS[None], rows.positions, TorchAttention(cache, rows))
    )[0]  # fmt: skip
    found = graph.logits(read(graph, new_cache(graph), TOKENS, [LENGTH]))
    error = (found - expected).norm() / expected.norm()
    assert error < 0.1, float(error)


@FEW
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), st.sampled_from([8, 7]), st.integers(0, 99))
def test_products_are_integer_arithmetic(rows: int, columns: int, outputs: int, bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    most = (1 << (bits - 1)) - 1
    weight = generator.integers(-most, most + 1, (columns, outputs)).astype(np.int8)
    x = generator.integers(-16319, 16320, (1, rows, columns))
    graph = Graph()
    name = graph.input("x", 1, [1, "N", columns])
    graph.output("y", fixed_product(graph, name, Rounded(weight, np.ones(outputs)), 15, 1.0))
    y = session.open_session(graph.serialised(), 1).run(None, {"x": x.astype(np.float32)})[0]
    high = np.rint(x / 128).astype(np.int64)  # ties go to the even one, as in QuantizeLinear
    parts = [(part @ weight.astype(np.int64)).astype(np.float32) for part in (high, x - 128 * high)]
    np.testing.assert_array_equal(y, parts[0] * np.float32(128) + parts[1])


@FEW
@given(st.integers(1, 64), st.sampled_from([8, 15]), st.integers(0, 99))
def test_a_scale_per_row_is_the_rows_own(rows: int, bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((1, rows, 48)) * 10.0 ** generator.integers(-3, 4, (1, rows, 1))).astype(np.float32)
    x[0, generator.integers(0, rows)] = 0.0
    graph = Graph()
    name = graph.input("x", 1, [1, "N", 48])
    weight = Rounded.of(generator.standard_normal((31, 48)), 8)
    graph.output("y", row_product(graph, name, weight, bits))
    run = session.open_session(graph.serialised(), 1)
    y = run.run(None, {"x": x})[0]
    for row in range(rows):
        np.testing.assert_array_equal(run.run(None, {"x": x[:, row : row + 1].copy()})[0][0, 0], y[0, row])
    exact = x[0] @ weight.weight.T
    size = np.abs(x[0]).max(1, keepdims=True) * np.abs(weight.weight).sum(1)
    assert (np.abs(y[0] - exact) <= size / (127 if bits == 8 else 16000) + 1e-6).all()


def test_errors_of_rounding_cancel_over_the_inputs_seen() -> None:
    """Inputs with few large directions, as hidden states are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 48, generator=generator) @ (
        torch.randn(48, 48, generator=generator) * torch.logspace(0, -2, 48)
    )
    weight = torch.randn(20, 48, generator=generator).double().numpy()
    errors = [
        (x.double() @ torch.from_numpy(rounded.weight - weight).T).norm()
        for rounded in (Rounded.of(weight, 8), Rounded.of(weight, 8, x.T @ x))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_calibration_is_conversations() -> None:
    conversations = load.calibration()
    assert len(conversations) == 20
    assert all([message["role"] for message in each] == ["user", "assistant"] for each in conversations)


def test_texts_change_the_weights_and_not_the_promise(folder: Path) -> None:
    texts = [TOKENS[:50].tolist(), TOKENS[50:].tolist()]
    model = load.load_main(folder, folder.parent / "graphs", threads=1, precision=BYTES, texts=texts)
    other = load.load_main(folder, folder.parent / "graphs", threads=1, precision=BYTES)
    hidden = read(model, new_cache(model), TOKENS, [50, 1, 3, 42])
    assert torch.equal(hidden, read(model, new_cache(model), TOKENS, [1] * LENGTH))
    assert not torch.equal(hidden, read(other, new_cache(other), TOKENS, [LENGTH]))


def test_this_processor_is_checked() -> None:
    assert session.weight_bits() in (8, 7)
    assert session.exact(7, 5), "7 bits are exact everywhere"
    assert session.steady()


def test_a_turn_is_orthogonal() -> None:
    for size in (48, 64, 576):
        turned = fold.turn(np.eye(size))
        np.testing.assert_allclose(turned @ turned.T, np.eye(size), atol=1e-12)


@FEW
@given(st.integers(0, 10_000), st.sampled_from([64, 512, 8192, 40_000]), st.floats(0.01, 30.0))
def test_sums_of_attention_stay_exact(seed: int, context: int, size: float) -> None:
    """The bounds that the units promise, at their extremes."""
    generator = np.random.default_rng(seed)
    q, k, v = (generator.standard_normal((rows, 24)) * size for rows in (64, 32, 32))
    units = fold.units(
        q, k, v, None, heads=4, kv_heads=2, scale=16**-0.5, longest=5.0, context=context, spread=8.0
    )  # fmt: skip
    for head in range(4):
        rows = q[head * 16 : head * 16 + 16], k[head // 2 * 16 : head // 2 * 16 + 16]
        longest = [
            np.linalg.norm(matrix, 2) * 5.0 / unit + 2.0
            for matrix, unit in zip(rows, (units.query[head], units.key[head // 2]), strict=True)
        ]
        assert longest[0] * longest[1] <= 1 << 24
    most = fold.most_value(context)
    weights = fold.WEIGHT_SUM + min(context / 2, fold.WEIGHT_SUM)
    assert most * weights <= 1 << 24
    assert context * np.ceil(fold.coarse_unit(context)) <= 1 << 24


def write_some(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"right")


def test_what_is_kept_is_checked(tmp_path: Path) -> None:
    folder = store.prepared(tmp_path, {"a": 1}, write_some)
    assert store.prepared(tmp_path, {"a": 2}, write_some) != folder
    (folder / "a.bin").write_bytes(b"wrong")
    assert store.prepared(tmp_path, {"a": 1}, write_some) == folder
    assert (folder / "a.bin").read_bytes() == b"right"


def decode(
    model: GraphDecoder, drafter: MTPDrafter | RootDrafter, prompts: list[list[int]], chunk: int
) -> list[list[int]]:
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(
        layers, Pages(slots=3, tokens=900, page_size=16, device=CPU), max_nodes=drafter.max_nodes, dtype=torch.float32
    )
    loop = decode_loop(
        model, cache, drafter, MatchVerifier(), slots=2, max_context=400, eos_token_ids=(), prefill_chunk=chunk, device=CPU,
        attention=GraphAttention,
    )  # fmt: skip
    params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, temperature=1.0, seed=4)]
    requests = [loop.add(prompt, each) for each in params for prompt in prompts]
    while loop.requests:
        loop.step()
    assert all(request.finish_reason == "length" for request in requests)
    return [request.output for request in requests]


@pytest.mark.parametrize("shape", ["chain:3", "3x2x1", "tree:7"])
@pytest.mark.parametrize("changes", [{}, {"chained": False, "concat": "hidden_first", "own_norm": False}], ids=str)
def test_drafting_does_not_change_the_text(tmp_path: Path, shape: str, changes: dict[str, object]) -> None:
    main = write_llama(tmp_path / "m")
    layers = write_mtp(tmp_path / "d", **changes)
    model = load.load_main(main, tmp_path / "g", threads=1, precision=BYTES)
    module = load.load_mtp(main, layers, model, tmp_path / "g", threads=1, precision=BYTES)
    drafter = MTPDrafter(
        module,
        TreeShape.parse(shape),
        slots=3,
        attention=GraphAttention,  # type: ignore[arg-type]
    )
    prompts = [TOKENS[:21].tolist(), TOKENS[30:77].tolist()]
    assert decode(model, drafter, prompts, 16) == decode(model, RootDrafter(), prompts, 64)


def test_levels_are_those_of_the_fp32_layers(tmp_path: Path) -> None:
    main_folder, folder = write_llama(tmp_path / "m"), write_mtp(tmp_path / "d")
    reference = loader.load_main(main_folder, torch.float32, CPU, lambda *_: None)
    expected = loader.load_mtp(folder, reference, 0, lambda *_: None)
    model = load.load_main(main_folder, tmp_path / "g", threads=1, precision=WORDS)
    found = load.load_mtp(main_folder, folder, model, tmp_path / "g", threads=1, precision=WORDS)
    hidden = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
    rows = StepRows.prompt(0, 0, 20, CPU)
    layer = MTP["attention"]
    assert isinstance(layer, dict)
    outputs = []
    for module, attention, h in ((expected, TorchAttention, hidden), (found, GraphAttention, turned(hidden))):
        cache = HybridKV(
            [module.config.layer.attention] * 3,
            Pages(slots=1, tokens=64, page_size=16, device=CPU),
            max_nodes=8,
            dtype=torch.float32,
        )
        embedded = module.embedding[TOKENS[:20]][None]
        outputs.append(module.logits(1, module.forward(1, embedded, h, rows.positions, attention(cache, rows))))
    assert (outputs[0] - outputs[1]).norm() < 0.1 * outputs[0].norm()


def turned(hidden: Tensor) -> Tensor:
    return torch.from_numpy(fold.turn(hidden.double().numpy())).float()


def test_mimo_7b(tmp_path: Path) -> None:
    """Biases, a head of its own, and one MTP layer that serves every depth and reads the normed hidden state."""
    folder = make_tiny(tmp_path / "m", family="mimo")
    model = load.load_main(folder, tmp_path / "g", threads=1, precision=WORDS)
    module = load.load_mtp(folder, folder, model, tmp_path / "g", threads=1, precision=BYTES)
    reference = loader.load_main(folder, torch.float32, CPU, lambda *_: None)
    cache, rows = new_cache(model), StepRows.prompt(0, 0, 60, CPU)
    expected = reference.logits(reference.forward(TOKENS[None, :60], rows.positions, TorchAttention(cache, rows)))[0]
    found = model.logits(read(model, new_cache(model), TOKENS, [60]))
    assert (found - expected).norm() < 0.1 * expected.norm()
    drafter = MTPDrafter(
        module,
        TreeShape.parse("tree:7"),
        slots=3,
        attention=GraphAttention,  # type: ignore[arg-type]
    )
    prompts = [TOKENS[:21].tolist(), TOKENS[30:77].tolist()]
    assert decode(model, drafter, prompts, 16) == decode(model, RootDrafter(), prompts, 64)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m")
    with pytest.raises(Exception, match="no int8 graph yet"):
        load.load_main(folder, tmp_path / "g", threads=1, precision=BYTES)
