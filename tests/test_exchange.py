"""What ranks on GPUs do by kernels: sums and gatherings over each other's memory, choices, drafts, and fused models.

Without GPUs ranks are processes that run the kernels in Triton's interpreter over memory that they share: the protocol is the
same, with the processor's caches in place of NVLink. On two GPUs bench/tensor_parallel.py checks the bits.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import nearly_tied, together
from test_parallel import WIDE
from torch import Tensor

pytest.importorskip("triton")

from mtp_engine.attention.exact import MOST_ROWS, exact_attention
from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams
from mtp_engine.drafters.device import DeviceDraftOps
from mtp_engine.drafters.expand import Growth, Level
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels import exchange, linear
from mtp_engine.models import loader
from mtp_engine.models.fused import FusedJoin, fuse, fuse_mtp
from mtp_engine.models.layers import Join, RMSNorm
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.parallel.group import Group, joined, ordered_sum, weighted
from mtp_engine.parallel.linear import SummedLinear
from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers import DeviceShardedMatchVerifier, MatchVerifier

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")


def exchanged(
    folder: Path, size: int, kind: str, calls: list[dict[str, Any]], ranks: int | None = None
) -> list[list[Tensor]]:
    """What each rank got; see tests/exchanging.py. ranks: how many of them come."""
    for rank in range(size):
        with (folder / f"{rank}").open("wb") as file:
            file.truncate(exchange.bytes_needed(size))
    torch.save(calls, folder / "given.pt")
    script = str(Path(__file__).parent / "exchanging.py")
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(size), str(folder), kind])
        for rank in range(ranks or size)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"found{rank}.pt") for rank in range(len(processes))]


@pytest.mark.parametrize("size", [2, 3])
def test_exchanges_are_their_twins(size: int, tmp_path: Path) -> None:
    """Many in a row, so that messages take the place of earlier ones, of sizes that leave programs out; bits that look like
    empty memory, or like a message's number, among them."""
    torch.manual_seed(0)
    calls: list[dict[str, Any]] = []
    for few in (1 << 20, 0):
        for shape in ((1, 64), (3, 700), (2, 33), (1, 4)):
            x, residual = torch.randn(size, *shape), torch.randn(shape)
            x[0, 0, :3], x[1, 0, :3] = torch.tensor([0.0, -0.0, 1e-45]), torch.tensor([-0.0, -0.0, 0.0])
            calls.append({"x": x, "sum": True, "dtype": torch.float32, "residual": residual, "few": few})
            calls.append({"x": x, "sum": True, "dtype": torch.float32, "residual": None, "few": few})
            whole = {"x": (x * 4).round(), "residual": residual.round()}  # as the interpreter rounds to bf16 otherwise
            calls.append({**whole, "sum": True, "dtype": torch.bfloat16, "few": few})
        for rows, terms, width in ((3, 5, 300), (1, 1, 64), (2, 3, 512)):
            pairs, weights = torch.randn(size, rows * terms, width), torch.rand(rows, terms)
            given = {"x": pairs, "weights": weights, "residual": torch.randn(rows, width)}
            calls.append({**given, "sum": True, "dtype": torch.float32, "few": few})
    for join in (False, True):
        calls.append({"x": torch.randint(-(2**63), 2**63 - 1, (size, 3, 5)), "sum": False, "join": join})
        calls.append({"x": torch.arange(size * 600).view(size, 2, 3, 100).float(), "sum": False, "join": join})
        calls.append({"x": torch.zeros(size, 1, dtype=torch.int64), "sum": False, "join": join})
    found = exchanged(tmp_path, size, "all", calls)
    for number, call in enumerate(calls):
        if call["sum"]:
            parts = torch.stack([weighted(part, call.get("weights")) for part in call["x"]])
            expected = ordered_sum(parts, call["dtype"], call["residual"])
        else:
            expected = joined(call["x"]) if call["join"] else call["x"]
        for rank in range(size):
            got = found[rank][number]
            assert got.shape == expected.shape
            assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8)), (number, rank)


def test_who_waits_for_nobody_is_released(tmp_path: Path) -> None:
    """Every kernel of a rank whose peer never comes ends, says so in `stop`, and gives nothing that cannot be: its own tokens."""
    x = torch.randint(0, 2**40, (2, 3, 2))
    given = {"x": torch.randn(2, 3, 64), "sum": True, "dtype": torch.float32, "residual": None}
    calls = [{"x": x, "sum": False, "join": False}, given | {"few": 1 << 20}, given | {"few": 0}]
    [[gathered, *_, stop]] = exchanged(tmp_path, 2, "alone", calls, ranks=1)
    assert torch.equal(gathered, x[:1].expand(2, -1, -1))
    assert int(stop) == 1


def test_kernels_compile(tmp_path: Path) -> None:
    """Without a GPU: whoever calls them, for whatever sums and gatherings."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).parent / "offline.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr


def test_ranks_choose_what_one_process_chooses() -> None:
    """From the same logits: every node's token, ties and temperatures included, and a drafter's tree, in two levels."""
    logits, tree, batch = nearly_tied()
    scores = torch.randn(3, 4, 64)

    def chosen(group: Group) -> tuple[VerifyResult, Growth, DraftTree]:
        part = group.shard.part(64)
        own, ids = slice(part.start, part.stop), torch.arange(64)[part.start : part.stop]
        shared = group.size > 1
        rule = DeviceShardedMatchVerifier(group, 4, CPU) if shared else MatchVerifier()
        ops = DeviceDraftOps(4, CPU, group=group) if shared else TorchDraftOps()
        first, second = (
            Level(scores[:, :count, own], ids, ahead, 3, keep) for count, ahead, keep in ((1, 1, 3), (3, 2, 4))
        )
        grown = ops.grow(ops.start(batch, [(3, 3), (3, 4)], ids, 64), batch, first)
        grown = Growth(*(x.clone() for x in (grown.tokens, grown.parents, grown.depths, grown.scores)), 3, 1)
        again = ops.grow(ops.start(batch, [(3, 3), (3, 4)], ids, 64), batch, first)
        finished = ops.finish(again, batch, second, 5, torch.tensor([1, 1, 0]))
        return rule.verify(tree, logits[..., own].contiguous(), batch), grown, finished

    expected, grown, finished = chosen(Group())
    for found, growth, whole in together(4, chosen, in_turns=True):
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.path, expected.path)
        assert torch.equal(found.counts, expected.counts)
        assert torch.equal(growth.tokens, grown.tokens)
        torch.testing.assert_close(growth.scores, grown.scores)
        assert torch.equal(whole.size, finished.size)
        assert torch.equal(whole.tokens, finished.tokens)
        assert torch.equal(whole.parents, finished.parents)


def test_drawn_candidates_are_those_of_one_process() -> None:
    """Whose distribution is of all tokens."""
    torch.manual_seed(0)
    scores, sampling = torch.randn(2, 1, 64), SamplingBatch.build([SamplingParams(temperature=0.9)] * 2, [5, 6], CPU)
    batch = Batch(torch.arange(2), torch.tensor([3, 4]), torch.tensor([9, 40]), 80, sampling)

    def grown(group: Group) -> DraftTree:
        part = group.shard.part(64)
        ids, ops = torch.arange(part.start, part.stop), DeviceDraftOps(2, CPU, "drawn", group)
        level = Level(scores[..., part.start : part.stop], ids, 1, 3, 3)
        return ops.finish(ops.start(batch, [(3, 3)], ids, 64), batch, level, 0, torch.ones(2, dtype=torch.int64))

    expected = grown(Group())
    for found in together(2, grown, in_turns=True):
        assert torch.equal(found.tokens, expected.tokens)
        assert found.draft is not None
        assert expected.draft is not None
        assert torch.equal(found.draft, expected.draft)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_a_projection_may_lie_in_both_of_its_inputs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose norms are those of whole rows all the same."""
    monkeypatch.setattr(linear, "packed_is_faster", lambda: False)
    torch.manual_seed(0)
    weight, embedded, hidden = torch.randn(48, 96), torch.randn(2, 48), torch.randn(2, 48)
    norms = [RMSNorm(torch.rand(48), 1e-5) for _ in range(2)]
    expected = Join(*norms, linear.Linear(weight), hidden_first=True)(embedded, hidden)

    def joined_by(group: Group) -> Tensor:
        own = group.shard.part(96)
        part = SummedLinear(linear.Linear(weight[:, own.start : own.stop]), group, own)
        return FusedJoin(Join(*norms, part, hidden_first=True))(embedded, hidden)

    for found in together(size, joined_by, in_turns=True):
        torch.testing.assert_close(found, expected)


def read(folder: Path, group: Group, dtype: torch.dtype, *, fused: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The main model's logits of a text, and hidden states and logits of its first MTP layer."""
    model = loader.load_main(folder, dtype, CPU, lambda *_: None, group=group)
    module = loader.load_mtp(folder, model, 0, lambda *_: None)
    if fused:
        model, module = fuse(model), fuse_mtp(module)
    tokens, positions = torch.tensor([[1, 8, 40]]), torch.arange(3)[None]

    def attention(layers: list[Any]) -> Any:
        pages = Pages(slots=1, tokens=64, page_size=16, device=CPU)
        cache = HybridKV(layers, pages, max_nodes=MOST_ROWS, ring_page=16, kernels=fused, dtype=dtype)
        pages.reserve(0, 32)
        return (exact_attention if fused else TorchAttention)(cache, StepRows.prompt(0, 0, 3, CPU))

    hidden = model.forward(tokens, positions, attention([layer.attention for layer in model.config.layers]))
    own = attention([module.config.layer.attention] * len(module.layers))
    output = module.forward(0, model.embedding[tokens], module.main_hidden(hidden), positions, own)
    return model.logits(hidden), output, group.join(module.logits(0, output))


@pytest.mark.parametrize(("family", "size"), [("mimo", 2), ("mimo", 4), ("mimo_v2_flash", 2)])
def test_fused_models_over_ranks(family: Any, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits on all ranks, and the values of torch's modules in one process."""
    monkeypatch.setattr(linear, "packed_is_faster", lambda: False)  # kernels want weights as they are
    dtype, changes = torch.float32, dict[str, Any](num_hidden_layers=1)
    if family != "mimo":  # a sliding layer with experts, in FP8; routers' kernels take bf16
        dtype = torch.bfloat16
        changes = {**WIDE, "num_hidden_layers": 1, "hybrid_layer_pattern": [1], "moe_layer_freq": [1]}
    folder = make_tiny(tmp_path, family=family, fp8=family != "mimo", vocab_size=264, **changes)
    with torch.inference_mode():
        alone = read(folder, Group(), dtype, fused=False)
    ranks = together(size, lambda group: read(folder, group, dtype), in_turns=True)
    for others in ranks[1:]:
        assert all(torch.equal(first, other) for first, other in zip(ranks[0], others, strict=True)), "other bits"
    for found, expected in zip(ranks[0], alone, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 0.05  # the interpreter rounds to bf16 towards 0
        error = ((found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).median()
        assert error < bound


def test_kernels_compile_for_a_gpu() -> None:
    """A helper that returned integers here and floats there ran in the interpreter, and on no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "hopper.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
