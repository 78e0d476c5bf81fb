"""Engines that several processes share: the text of one process, drafted or not, and one line when a process ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import folders

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape, team
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.runtime import kept
from mtp_engine.runtime.answer import Generation
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.planner import Costs

CONFIG = EngineConfig(
    tensor_parallel=2, device="cpu", dtype="fp32", tree=TreeShape.parse("2x2x1"), max_context=128, max_batch=3,
    page_size=16, prefill_chunk=16, threads=1, prefix_cache_gb=0.01,
)  # fmt: skip
PROMPTS = [[5, 9, 2, 40, 17, 33, 8], [3], [7] * 4 + [11, 30] * 17, [60, 21], list(range(1, 40)), [12, 50, 44]]
PORT = 29500 + os.getpid() % 2000  # where hosts meet
LONG = SamplingParams(max_tokens=25, ignore_eos=True)
PARAMS = [
    LONG,
    replace(LONG, temperature=0.8, seed=1, tree=TreeShape.parse("chain:3")),
    replace(LONG, temperature=0.8, seed=2, max_tokens=7, top_p=0.8, logprobs=2),
    replace(LONG, frequency_penalty=0.7, bad_words=((4, 5), (9,)), min_tokens=5, max_tokens=40),
    replace(LONG, temperature=1.1, seed=4, tree=TreeShape.parse("2x1")),
    replace(LONG, temperature=0.5, seed=5, speculate=False, top_k=7),
]


def tokens(answers: Sequence[Generation]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module", params=["mimo", "mimo-fp8", "mimo-7b", "llama-untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    root = tmp_path_factory.mktemp("shared")
    folder, mtp = folders(request.param, root / "model", scale=0.3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            shutil.copy(make_tiny(root / "tokenizer") / name, folder)
    return folder, None if mtp == folder else str(mtp)


@pytest.fixture(scope="module")
def engine(model: tuple[Path, str | None]) -> Iterator[Engine]:
    folder, mtp = model
    with Engine.load(str(folder), replace(CONFIG, kv_tokens=140), mtp=mtp) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(model: tuple[Path, str | None]) -> list[Generation]:
    """What one process says without drafts."""
    folder, mtp = model
    with Engine.load(str(folder), replace(CONFIG, tensor_parallel=1, tree=None, drafter="root"), mtp=mtp) as one:
        return one.generate(PROMPTS, PARAMS)


def test_all_say_what_one_process_says(engine: Engine, alone: list[Generation]) -> None:
    """More requests than slots, of all kinds, in trees of several shapes; memory runs short, and who comes again finds what
    was kept."""
    with engine.undrafted(max_batch=1) as plain:
        assert tokens(plain.generate(PROMPTS, PARAMS)) == tokens(alone)
    first, again = (engine.generate(PROMPTS, PARAMS) for _ in range(2))
    assert tokens(first) == tokens(again) == tokens(alone)
    assert sum(answer.stats.accepted_per_depth[0] for answer in first if answer.stats.accepted_per_depth) > 0
    assert sum(answer.stats.preemptions for answer in (*first, *again)) > 0
    assert again[0].stats.cached_tokens == len(PROMPTS[0]) - 1
    for found, expected in zip(first[2].logprobs, alone[2].logprobs, strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]


class Wavering(list[tuple[Any, ...]]):
    """Times of steps, as if drafts were dear for some steps, and cheap for some more."""

    count = 0

    def append(self, spent: tuple[Any, ...]) -> None:
        nodes, batch, _, _ = spent
        self.count += 1
        super().append((nodes, batch, 2.0 if self.count // 20 % 2 else 0.01, 1.0))


@pytest.mark.parametrize("model", ["mimo"], indirect=True)
def test_ranks_plan_alike(
    model: tuple[Path, str | None], alone: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All grow the same trees, whatever their own clocks and files say: here only rank 0 has a file, and its times change.
    Requests join, leave, run out of memory and come again."""
    folder, mtp = model
    monkeypatch.setattr(kept, "read", lambda kind, path: Costs([0.0, 0.1, 0.2, 0.3], {1: 1.0, 4: 1.1, 16: 1.4}))
    config = replace(CONFIG, tree=TreeShape.parse("auto"), kv_tokens=140)
    with Engine.load(str(folder), config, mtp=mtp) as engine:
        engine.loop.work.times = Wavering()
        stream = engine.stream([PROMPTS[0]], replace(LONG, max_tokens=90))
        next(stream)
        stream.close()
        first, again = (engine.generate(PROMPTS, PARAMS) for _ in range(2))
        with engine.undrafted(max_batch=1) as plain:
            assert tokens(plain.generate(PROMPTS[:2], PARAMS[:2])) == tokens(alone)[:2]
    assert tokens(first) == tokens(again) == tokens(alone)
    answers, trees = [*first, *again], sum((answer.stats.trees for answer in (*first, *again)), Counter())
    assert sum(answer.stats.preemptions for answer in answers) > 0
    assert len({depth for depth, _ in trees}) > 2, "the planner did not change its mind"
    assert sum(answer.stats.accepted_per_depth[0] for answer in answers if answer.stats.accepted_per_depth) > 0


def test_ranks_time_together() -> None:
    """Where no costs are kept all measure them at load, in the same steps, and go by those of rank 0."""
    config = replace(CONFIG, tree=TreeShape.parse("auto"), draft_int8=False)
    with Engine.load(hub.NANO, config) as engine:
        assert engine.config.tree == config.tree
        [answer] = engine.generate(["Once upon a time"], LONG)
        with engine.undrafted(max_batch=1) as plain:
            assert tokens([answer]) == tokens(plain.generate(["Once upon a time"], LONG))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("model", ["mimo-fp8", "mimo-7b"], indirect=True)
def test_two_gpus_draft_what_they_say_plainly(model: tuple[Path, str | None]) -> None:
    """As above, through kernels and graphs: requests of all kinds, more than slots, memory running short, prefix hits."""
    folder, mtp = model
    config = replace(CONFIG, device="cuda", dtype="bf16", kv_tokens=300)
    with Engine.load(str(folder), config, mtp=mtp) as engine:
        with engine.undrafted(max_batch=1) as plain:
            expected = plain.generate(PROMPTS, PARAMS)
        first, again = (engine.generate(PROMPTS, PARAMS) for _ in range(2))
        runner = engine.loop.runner
    assert tokens(first) == tokens(again) == tokens(expected)
    assert sum(answer.stats.accepted_per_depth[0] for answer in first if answer.stats.accepted_per_depth) > 0
    assert again[0].stats.cached_tokens > 0
    assert isinstance(runner, GraphRunner)
    assert (runner.replayed > 0, runner.slow) == (True, 0), "something did not run as graphs"


@pytest.mark.parametrize("model", ["mimo-fp8"], indirect=True)
def test_who_leaves_takes_nothing_along(engine: Engine, alone: list[Generation]) -> None:
    """Closed streams, time that runs out, a sink that fails: the others go on, and so do the ranks."""
    stream = engine.stream([PROMPTS[0]], replace(LONG, max_tokens=90))
    next(stream)
    late = engine.requests(PROMPTS[1], replace(LONG, max_tokens=90, timeout=0.05))
    broken = engine.requests(PROMPTS[3], replace(LONG, max_tokens=90))
    broken[0].sink = lambda _: 1 / 0  # type: ignore[assignment,return-value]
    turn = engine.turns.new()
    with turn.lock:
        turn.wait()
        engine.loop.submit([*late, *broken])
    next(stream)
    time.sleep(0.06)
    stream.close()
    assert tokens(engine.generate(PROMPTS, PARAMS)) == tokens(alone)
    assert (late[0].finish_reason, broken[0].finish_reason) == ("timeout", "abort")


@pytest.mark.parametrize("model", ["mimo-fp8"], indirect=True)
def test_texts_are_scored(engine: Engine, alone: list[Generation]) -> None:
    prompt, answer = PROMPTS[2], alone[2]
    with engine.undrafted(max_batch=1) as plain:
        scores = plain.loop.score([*prompt, *answer.token_ids], 0, 1)[len(prompt) - 1 :]
    assert [each.token for each in scores] == answer.token_ids
    for found, expected in zip(scores, answer.logprobs, strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.parametrize(("rule", "tree"), [("rrs", "3x2"), ("block", "chain:3"), ("traversal", "3x2")])
def test_rules_that_want_whole_distributions(rule: Any, tree: str) -> None:
    """Of the drafter and of the main model: the same tokens in as many steps as in one process."""
    config = replace(CONFIG, verifier=rule, tree=TreeShape.parse(tree), draft_int8=False)
    params = [SamplingParams(max_tokens=15, temperature=0.8, seed=seed) for seed in range(2)]
    found = []
    for size in (1, 2):
        with Engine.load(hub.NANO, replace(config, tensor_parallel=size)) as engine:
            found.append(engine.generate(["Once upon a time", "The little dog"], params))
    assert tokens(found[0]) == tokens(found[1])
    assert [answer.stats.steps for answer in found[0]] == [answer.stats.steps for answer in found[1]]
    assert sum(answer.stats.accepted_per_depth[0] for answer in found[1]) > 0


def test_four_processes_repeat_key_heads(tmp_path: Path) -> None:
    folder, _ = folders("mimo-fp8", tmp_path / "model")
    with Engine.load(
        str(folder), replace(CONFIG, tensor_parallel=4, tree=TreeShape.parse("tree:6"), candidates="best")
    ) as engine:
        assert {layer.attention.kv_heads for layer in engine.model_config.layers} == {1}
        answers = engine.generate(PROMPTS[:3], PARAMS[:3])
        with engine.undrafted() as plain:
            assert tokens(answers) == tokens(plain.generate(PROMPTS[:3], PARAMS[:3]))


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 3, "3, which does not divide the model's 8 attention heads"),
        ({"vocab_size": 265}, 2, "2, which does not divide the model's 265 tokens of the vocabulary"),
        ({"fp8": True}, 4, "4, which does not divide the model's 96 columns of a feed-forward layer in blocks of 16"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "swa_num_attention_heads": 12}, 2, "3 key heads"),
    ],
)
def test_counts_that_do_not_divide(tmp_path: Path, changes: dict[str, int], size: int, said: str) -> None:
    folder = make_tiny(tmp_path, **changes)  # type: ignore[arg-type]
    for weights in tmp_path.glob("*.safetensors"):
        weights.chmod(0o000 if os.geteuid() else 0o600)
    with pytest.raises(EngineError, match=said):
        Engine.load(str(folder), replace(CONFIG, tensor_parallel=size))


def test_gpus_that_do_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few, unlike, too full: said before anything is started or read."""
    config, files = replace(CONFIG, device="cuda"), hub.locate(hub.NANO)
    names, free = ["H100", "H100"], 10**9
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 10**9))
    monkeypatch.setattr(team, "Children", lambda *_: pytest.fail("started"))
    free = 10**6
    with pytest.raises(EngineError, match=r"each of 2 ranks holds 0.0 GB of weights, and cuda:0 has 0.0 GB free"):
        team.form_team(config, files)
    names[1] = "A100"
    with pytest.raises(EngineError, match="not alike \\(A100, H100\\)"):
        team.form_team(config, files)
    del names[1]
    with pytest.raises(EngineError, match="needs 2 GPUs here, and there are 1"):
        team.form_team(config, files)
    with pytest.raises(EngineError, match="--device cuda:1 is one GPU"):
        team.form_team(replace(config, device="cuda:1"), files)


def test_what_several_processes_cannot(tmp_path: Path) -> None:
    for changes, said in (({"dtype": "int8"}, "int8 runs in one process"), ({"attention": "flashinfer"}, "one GPU")):
        with pytest.raises(EngineError, match=said):
            Engine.load(hub.NANO, replace(CONFIG, **changes))  # type: ignore[arg-type]


COMMAND = [
    sys.executable, "-m", "mtp_engine.cli", "generate", "--model", hub.NANO, "--tensor-parallel", "2", "--device", "cpu",
    "--tree", "chain:3", "--compare", "off", "--max-tokens", "4000", "--min-tokens", "3999", "Once upon a time",
]  # fmt: skip


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


TWO_GPUS = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
)


@pytest.fixture(params=["cpu", TWO_GPUS])
def running(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A command in the midst of an answer."""
    command = [request.param if word == "cpu" else word for word in COMMAND]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(40)
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux shows them")
@pytest.mark.parametrize(("victim", "code"), [("rank 1", 2), ("rank 0", -9), ("interrupted", 130)])
def test_when_one_ends_all_do(running: subprocess.Popen[str], victim: str, code: int) -> None:
    [other] = children(running.pid)
    begin = time.monotonic()
    if victim == "interrupted":
        running.send_signal(signal.SIGINT)
    else:
        os.kill(other if victim == "rank 1" else running.pid, signal.SIGKILL)
    _, errors = running.communicate(timeout=10)
    while alive(other) and time.monotonic() < begin + 10:
        time.sleep(0.05)
    assert running.returncode == code, errors
    assert not alive(other)
    said = [line for line in errors.splitlines() if line.startswith("error")]
    assert said == (
        [f"error: rank 1 (process {other}) was ended by SIGKILL; load the engine anew"] if code == 2 else []
    )
    assert "Traceback" not in errors


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux shows them")
def test_a_server_ends_with_its_ranks() -> None:
    """Also where nobody asks it anything at the time."""
    command = [*COMMAND[:3], "serve", *COMMAND[4:12], "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("Ctrl-C ends that" in line for line in process.stderr)
        [other] = children(process.pid)
        os.kill(other, signal.SIGKILL)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (
        2,
        f"error: rank 1 (process {other}) was ended by SIGKILL; load the engine anew\n",
    )


def test_torchrun_on_two_hosts() -> None:
    """It starts the ranks itself; the first of them answers. On one host: test_readme.py."""
    told = ["--drafter", "root", "--compare", "off", "--max-tokens", "20", "--raw", "--quiet", "Once upon a time"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{PORT}", "--rdzv-id", "two"]
    started = []
    for number in range(2):
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number), *meeting]
        run = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "mtp_engine.cli"]
        started.append(
            subprocess.Popen([*run, *COMMAND[3:10], *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    with Engine.load(hub.NANO, replace(CONFIG, tensor_parallel=1, tree=None, drafter="root")) as one:
        [answer] = one.generate(["Once upon a time"], SamplingParams(max_tokens=20))
    assert [out for out, _ in said] == [answer.text + "\n", ""]
