"""Models divided among ranks: the values of one process's, the same bits on every rank. Here ranks are threads."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from ranks import nearly_tied, together
from real_config import REAL
from test_decode_loop import make_loop
from tiny import write_llama, write_mtp
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.cli.main import main
from mtp_engine.config import AttentionConfig, EngineConfig, RopeConfig, SamplingParams, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter, TorchDraftOps
from mtp_engine.drafters.expand import Growth, Level
from mtp_engine.errors import EngineError
from mtp_engine.models import checkpoint, loader, weights
from mtp_engine.models.checkpoint import Checkpoint, Part
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.models.mtp import MTPModule
from mtp_engine.parallel.codec import Codec
from mtp_engine.parallel.group import Group, RankLost
from mtp_engine.parallel.launch import Children
from mtp_engine.parallel.packed import pack, unpack
from mtp_engine.parallel.processes import Processes, new_store
from mtp_engine.parallel.shard import Shard
from mtp_engine.runtime.interrupts import uninterrupted
from mtp_engine.runtime.lead import LedLoop
from mtp_engine.runtime.memory import Memory
from mtp_engine.runtime.step import ModelStep
from mtp_engine.sampling.batch import Plan
from mtp_engine.tree import VerifyResult
from mtp_engine.verifiers import MatchVerifier, ShardedMatchVerifier

CPU = torch.device("cpu")
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 128}  # whole blocks of 16 for each of four ranks
KINDS = ["mimo", "mimo-fp8", "mimo-7b", "llama", "llama-untied"]


def folders(kind: str, root: Path, scale: float = 0.1) -> tuple[Path, Path]:
    """The main model's, and that of its MTP layers. scale: of a Llama's weights."""
    if kind.startswith("llama"):
        changes = {"vocab_size": 264, "eos_token_id": 263}
        folder = write_llama(root / "main", scale=scale, tie_word_embeddings=kind == "llama", **changes)
        return folder, write_mtp(root / "mtp", scale=scale)
    if kind == "mimo-7b":
        return (make_tiny(root, family="mimo", vocab_size=264),) * 2
    return (make_tiny(root, fp8=kind == "mimo-fp8", vocab_size=264, **WIDE),) * 2


def load(folder: Path, mtp: Path, group: Group, dtype: torch.dtype = torch.float32) -> tuple[Decoder, MTPModule]:
    model = loader.load_main(folder, dtype, CPU, lambda *_: None, group=group)
    return model, loader.load_mtp(mtp, model, 0, lambda *_: None)


def read(folder: Path, mtp: Path, group: Group, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The main model's logits of a text, and the hidden states and logits of its first MTP layer."""
    model, module = load(folder, mtp, group, dtype)
    tokens = torch.tensor([[1 + i * 7 % 50 for i in range(24)]])

    def attention(layers: list[Any]) -> Any:
        pages = Pages(slots=1, tokens=64, page_size=16, device=CPU)
        cache = HybridKV(layers, pages, max_nodes=4, dtype=dtype)
        pages.reserve(0, 32)
        return TorchAttention(cache, StepRows.prompt(0, 0, 24, CPU))

    positions = torch.arange(24)[None]
    hidden = model.forward(tokens, positions, attention([layer.attention for layer in model.config.layers]))
    own = attention([module.config.layer.attention] * len(module.layers))
    output = module.forward(0, model.embedding[tokens], module.main_hidden(hidden), positions, own)
    return model.logits(hidden), output, group.join(module.logits(0, output))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return folders(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(model: tuple[Path, Path], size: int) -> None:
    with torch.inference_mode():
        alone = read(*model, Group())
    ranks = together(size, lambda group: read(*model, group))
    for others in ranks[1:]:
        assert all(torch.equal(first, other) for first, other in zip(ranks[0], others, strict=True)), "other bits"
    for found, expected in zip(ranks[0], alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ranks_that_exchange_what_they_read(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for columns, a few matrices at a time: the weights are the same."""
    monkeypatch.setattr(weights, "_STAGED", 1 << 14)
    expected = together(2, lambda group: read(*model, group, torch.bfloat16))
    found = together(2, lambda group: read(*model, group, torch.bfloat16), fast=True)
    assert all(torch.equal(a, b) for rank in range(2) for a, b in zip(found[rank], expected[rank], strict=True))


def test_bf16_sums_are_rounded_once(model: tuple[Path, Path]) -> None:
    """The same bits on all ranks, and no further from fp32 than one process is."""
    with torch.inference_mode():
        exact, alone = read(*model, Group())[0], read(*model, Group(), torch.bfloat16)[0]
    first, other = together(2, lambda group: read(*model, group, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # of most rows: one for which a router chooses another expert is anywhere
    shared, single = ((found - exact).norm(dim=-1).median() for found in (first[0], alone))
    assert shared < 1.3 * single


@pytest.mark.parametrize(("family", "fast"), [("mimo_v2_flash", True), ("mimo_v2_flash", False), ("mimo", False)])
def test_a_rank_reads_its_share(family: Any, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more: what `inspect --tensor-parallel` says it would hold. fast: ranks exchange columns, and read none."""
    folder = make_tiny(tmp_path, family=family)
    config, mtp = loader.read_config(folder), loader.read_mtp_config(folder)
    taken, fill = Counter[int](), Checkpoint.fill

    def counted(self: Checkpoint, targets: Iterable[tuple[Part, Tensor]]) -> None:
        each = list(targets)
        taken[threading.get_ident()] += sum(tensor.nbytes for _, tensor in each)
        fill(self, each)

    monkeypatch.setattr(Checkpoint, "fill", counted)
    if fast:
        monkeypatch.setattr(checkpoint, "_read_columns", lambda *_: pytest.fail("columns are read"))
    together(2, lambda group: load(folder, folder, group, torch.bfloat16), fast=fast)
    share = loader.share(folder, config, mtp, 2)
    assert taken.total() == 2 * sum(share.weights.values())
    whole = loader.plan(folder, config, mtp)
    assert sum(share.weights.values()) < 0.75 * sum(whole.bytes_by_dtype.values())  # of a tiny model much is whole


def test_inspect_shows_what_eight_gpus_would_hold(tmp_path: Path) -> None:
    """Of MiMo-V2-Flash, 312 GB, from its config.json."""
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    result = CliRunner().invoke(main, ["inspect", "--quiet", str(tmp_path), "--tensor-parallel", "8", "--json", "-"])
    assert result.exit_code == 0, result.output
    share = json.loads(result.stdout)["share"]
    assert share["weights"]["output head"] == 19_072 * 4096 * 2
    assert share["weights"]["experts"] / 1e9 == pytest.approx(302.8 / 8, rel=0.001)
    assert share["kv_per_token"] == 9 * 320 * 2  # one of 4 key heads, which two ranks hold each
    assert share["gpus"] == {"80 GB": True, "141 GB": True}
    refused = CliRunner().invoke(main, ["inspect", "--quiet", str(tmp_path), "--tensor-parallel", "3"])
    assert (refused.exit_code, "does not divide" in refused.stderr) == (2, True)


def test_key_heads_are_repeated() -> None:
    """Each rank has those that its query heads read."""
    config = AttentionConfig(heads=64, kv_heads=4, qk_dim=192, v_dim=128, rope=RopeConfig(64, 1e4))
    for rank in range(8):
        shard = Shard(rank, 8)
        group = config.heads // config.kv_heads
        assert {head // group for head in shard.part(config.heads)} == set(shard.kv_heads(config))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_packed_scores_keep_their_order(values: list[float]) -> None:
    scores, tokens = torch.tensor(values), torch.arange(len(values)) * 7
    packed = pack(scores, tokens)
    back, named = unpack(packed)
    assert torch.equal(back, scores)
    assert torch.equal(named, tokens)
    assert int(packed.argmax()) == int(scores.argmax()), "of equal scores the first counts"
    assert torch.equal(back[packed.argsort()], scores.sort().values)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_choose_what_one_process_chooses(size: int) -> None:
    """From the same logits: the main model's token at every node, ties and temperatures included, and a drafter's tree."""
    logits, tree, batch = nearly_tied()
    level = Level(logits[:, :1], torch.arange(64), 1, 3, 3)

    def chosen(group: Group) -> tuple[VerifyResult, Growth]:
        part = group.shard.part(64)
        own = slice(part.start, part.stop)
        return verify(group, own), grow(group, own)

    def verify(group: Group, own: slice) -> VerifyResult:
        rule = MatchVerifier() if group.size == 1 else ShardedMatchVerifier(group)
        return rule.verify(tree, logits[..., own], batch)

    def grow(group: Group, own: slice) -> Growth:
        ops = TorchDraftOps(group=group)
        given = replace(level, logits=level.logits[..., own], ids=level.ids[own])
        return ops.grow(ops.start(batch, [(3, 3)], given.ids, 64), batch, given)

    expected, grown = chosen(Group())
    for found, tree_found in together(size, chosen):
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.path, expected.path)
        assert torch.equal(tree_found.tokens[1:], grown.tokens[1:])  # greedy rows may break ties differently
        torch.testing.assert_close(tree_found.scores, grown.scores)


def test_a_process_that_never_comes_is_told_at_once() -> None:
    """With the last line that it said."""
    store, begin = new_store(2), time.monotonic()
    children = Children("mtp_engine.parallel.nowhere", [b""])
    with pytest.raises(RankLost, match=r"rank 1 \(process \d+\) ended with code 1: .*nowhere.*; load the engine anew"):
        Processes(store, Shard(0, 2), CPU, children.lost)
    assert time.monotonic() < begin + 20
    children.close()


def test_a_signal_waits_for_the_step_and_the_second_does_not() -> None:
    reached = list[int]()

    def interrupted(times: int) -> None:
        with uninterrupted():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            reached.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            interrupted(times)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_messages_arrive_as_they_were_sent() -> None:
    codec = Codec(SamplingParams, Structure, TreeShape, EngineConfig, Plan)
    params = SamplingParams(
        temperature=0.1 + 0.2, seed=2**62, stop=("a\n\u00e9", "b"), bad_words=("x", (1, 2)), logit_bias={5: -1.5, 7: 1e-300},
        structure=Structure(json="{}"), tree=TreeShape.parse("tree:7"), allowed_token_ids=(3,),
    )  # fmt: skip
    for message in (
        params,
        EngineConfig(tree=TreeShape.parse("auto")),
        [(1, True), {"a": Path("/x")}, None, float("inf")],
        ((Plan(TreeShape.parse("tree:7"), 8), 4, 512, 1 / 3, None),),
    ):
        assert codec.read(codec.write(message)) == message
    for other in (Shard(0, 2), {1, 2}, print):
        with pytest.raises(TypeError, match="cannot hold"):
            codec.write([other])


class Telling:
    """A Leader that notes what it tells."""

    lost = ""

    def __init__(self) -> None:
        self.lock, self.told = threading.Lock(), list[Any]()

    def tell(self, message: Any) -> None:
        self.told.append(message)

    def check(self) -> None:
        pass


def test_what_all_do_alike_is_told_to_nobody(tmp_path: Path) -> None:
    """Requests that join, run and are ended while steps are timed; later ones are told, with the times of steps."""
    model, _ = load(*folders("llama", tmp_path), Group())
    leader: Any = Telling()
    loop = make_loop(model, RootDrafter(), ranks=LedLoop(leader, 0), slots=2)
    with loop.alike():
        first = loop.add([3, 5, 7], SamplingParams(max_tokens=60))
        for _ in range(3):
            loop.step()
        loop.remove(first)
    assert (first.finish_reason, leader.told) == ("abort", [])
    loop.work.times.append((1, 2, 0.5, 0.25))
    second = loop.add([4], SamplingParams(max_tokens=60, ignore_eos=True))
    loop.step()
    loop.remove(second)
    step, left = leader.told
    assert ([each.prompt for each in step.joined], step.times) == ([[4]], ((1, 2, 0.5, 0.25),))
    assert (left.number, left.reason, loop.work.times) == (second.number, "abort", [])


class Losing:
    """A rank ends in the midst of the third step or a later one (Ranks)."""

    WHY = "rank 1 was ended by SIGKILL; load the engine anew"

    def __init__(self) -> None:
        self.steps, self.lost, self.closed = 0, "", False

    def added(self, *_: Any) -> None:
        pass

    def ending(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, running: Any, times: Any) -> None:
        self.steps += 1

    def check(self) -> None:
        if self.lost:
            raise RankLost(self.lost)

    def failed(self, error: BaseException) -> str:
        return self.lost

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("when", ["decoding", "reading", "landed"])
def test_nothing_is_touched_once_a_rank_is_lost(
    drafts: bool, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU what was queued when it ended goes on with garbage, and then every call fails: everybody ends with one line."""
    model, module = load(*folders("llama", tmp_path), Group())
    ranks, drafter = Losing(), MTPDrafter(module, TreeShape.parse("2x1"), slots=3) if drafts else RootDrafter()
    loop = make_loop(model, drafter, ranks=ranks, slots=2)
    fatal = "read" if when == "reading" else "verify"
    for owner, name in ((ModelStep, fatal), *((Memory, name) for name in ("leave", "keep", "enter", "grow"))):
        _poison(monkeypatch, owner, name, ranks, ends=name == fatal, raises=name != fatal or when != "landed")
    first = loop.add([3, 5, 7], SamplingParams(max_tokens=60))
    for _ in range(2):
        loop.step()
    second = loop.add(list(range(1, 30)), SamplingParams(max_tokens=60))
    for _ in range(3):
        if loop.requests:
            loop.step()
    late = loop.add([4], SamplingParams(max_tokens=4))
    loop.step()
    for request in (first, second, late):
        assert (request.finish_reason, request.error) == ("error", Losing.WHY)
    with pytest.raises(EngineError, match="rank 1 was ended"):
        loop.step()
    loop.add([4], SamplingParams(max_tokens=4))
    loop.close()
    assert ranks.closed
    assert not loop.requests


def _poison(patch: pytest.MonkeyPatch, owner: type, name: str, ranks: Losing, *, ends: bool, raises: bool) -> None:
    """Once a rank is lost, or as it is lost by this very call, it fails as a GPU does."""
    good = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        if ends and ranks.steps > 2:
            ranks.lost = Losing.WHY
        if ranks.lost and raises:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return good(*args, **options)

    patch.setattr(owner, name, call)
