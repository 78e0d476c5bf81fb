"""Experiments: prompt sets, grids, rows that survive being killed, recordings that say what decoding does, reports."""

import errno
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from serving import engine, serving

from mtp_engine.cli.main import main
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.experiments import analyse, report, workers
from mtp_engine.experiments.ask import Question, Recording
from mtp_engine.experiments.costs import PLAIN, PLANNER, Costs
from mtp_engine.experiments.grid import Case, Grid
from mtp_engine.experiments.prompts import read_prompts
from mtp_engine.experiments.run import Engines, run_case, run_cases
from mtp_engine.experiments.store import CaseFolder, Experiment
from mtp_engine.hub import files
from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.tree import DraftTree
from mtp_engine.verifiers import BlockVerifier, RejectionVerifier

TEXTS = ["The cat sat", "Why is the sky blue?", "Count to ten: one, two,", "A dog and a boy went to the", "Hello"]
TREES = ["chain:3", "4x2", "tree:2", "tree:7", "tree:31", "tree:63"]
EXACT = ["id", "category", "seed", "tokens", "steps", "nodes", "clean_tokens", "clean_steps", "finish_reason"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "short.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


def settings(prompts: str, **more: Any) -> dict[str, Any]:
    return {"model": "mimo-nano", "prompts": prompts, "max_tokens": 16, "threads": 1, "batch": 3, **more}


@pytest.fixture(scope="module")
def recorded(prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Recordings at temperatures 0 and 0.9, and real decoding of the same."""
    base = settings(prompts, temperature=[0.0, 0.9])
    cases = Grid.of({**base, "mode": "record"}).cases + Grid.of({**base, "tree": TREES}).cases
    experiment = Experiment.begin(tmp_path_factory.mktemp("experiment") / "out", cases, {})
    run_cases(experiment, "cpu")
    return experiment


def recording(experiment: Experiment, temperature: float) -> Recording:
    [folder] = [f for f in experiment.folders if f.case.mode == "record" and f.case.temperature == temperature]
    return Recording.load(folder)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("tree", TREES)
def test_a_recording_says_what_decoding_does(recorded: Experiment, tree: str, temperature: float) -> None:
    """Step for step: both are exact. The real one drafts this very tree; the recording never saw it."""
    [real] = [f.frame("requests") for f in recorded.folders if (f.case.tree, f.case.temperature) == (tree, temperature)]
    kept = recording(recorded, temperature)
    answer = kept.answer(Question(TreeShape.parse(tree)))
    assert [list(ids) for ids in real["token_ids"]] == [list(ids) for ids in kept.requests["token_ids"]]
    for name in ("tokens", "steps", "clean_tokens", "clean_steps"):
        assert answer[name].tolist() == real[name].tolist(), name
    for computed, counted in zip(answer["accepted"], real["accepted"], strict=True):
        assert computed[: len(counted)].tolist() == list(counted)
    assert real["steps"].sum() < real["tokens"].sum(), "nothing was drafted"
    assert kept.requests["missing"].max() == 0


def test_what_a_recording_cannot_say(recorded: Experiment) -> None:
    kept = recording(recorded, 0.0)
    for shape, more, message in (
        ("chain:4", {}, "deeper"), ("chain:3", {"vocabulary": 77}, "was not recorded"),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=message):
            kept.answer(Question(TreeShape.parse(shape), **more))
    for shape, more, message in (
        ("4x2x2", {"rule": "traversal"}, "decode for real"), ("tree:7", {"rule": "rejection"}, "chains"),
        ("tree:7", {"candidates": "best"}, "ranked by noise"),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=message):
            Question(TreeShape.parse(shape), **more)


@pytest.mark.parametrize(("rule", "verifier"), [("rejection", RejectionVerifier()), ("block", BlockVerifier())])
def test_rules_with_noise_of_their_own(rule: str, verifier: Any) -> None:
    """Averaged over texts that p draws, the chance to accept d drafts is that with which the rule itself accepts them."""
    generator, many, vocab = torch.Generator().manual_seed(1), 40_000, 4
    p = torch.rand(3, vocab, generator=generator).softmax(-1) ** 2
    q = torch.rand(2, vocab, generator=generator).softmax(-1) ** 3
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    drafts = torch.stack([torch.multinomial(row, many, True, generator=generator) for row in q], 1)
    tree = DraftTree.chain(torch.cat([torch.zeros(many, 1).long(), drafts], 1), torch.full((many,), 3))
    whole = torch.cat([q, torch.zeros(1, vocab)])[None].expand(many, -1, -1)
    tree = DraftTree(tree.tokens, tree.parents, tree.depths, tree.size, 2, draft=whole)
    sampling = SamplingBatch.build([SamplingParams(temperature=1.0)] * many, range(many), torch.device("cpu"))
    batch = Batch(torch.arange(many), torch.zeros(many).long(), torch.full((many,), 5), 5, sampling)
    counts = verifier.verify(tree, p.log()[None].expand(many, -1, -1), batch).counts
    real = [float((counts > depth).float().mean()) for depth in (1, 2)]

    said = torch.stack([torch.multinomial(row, many, True, generator=generator) for row in p[:2]], 1)
    columns = {
        "p": torch.stack([p[d].log()[said[:, d]] for d in range(2)], 1).flatten().numpy(),
        "q": torch.stack([torch.stack([q[e].log()[said[:, d]] for e in range(2)], 1) for d in range(2)], 1)
        .reshape(2 * many, 2, 1).numpy(),
        "rank": np.zeros((2 * many, 2, 1)),
    }  # fmt: skip
    kept = Recording({"vocabularies": FakeColumn()}, 1.0, np.arange(0, 2 * many + 1, 2), columns)
    survival = kept.survival(Question(TreeShape((1, 1)), rule, "drawn"))[::2]
    assert np.allclose(survival.mean(0), real, atol=0.012)
    assert 0.1 < real[1] < real[0] < 0.97, "the test could not fail"


class FakeColumn:
    iloc: ClassVar[list[list[int]]] = [[4]]


def same_rows(one: CaseFolder, other: CaseFolder) -> bool:
    """But for times."""
    first, second = one.frame("requests"), other.frame("requests")
    steps = ["prompt", "step", "at", "emitted", "nodes", "loop"]
    return (
        first[EXACT].equals(second[EXACT])
        and [list(x) for x in first["token_ids"]] == [list(x) for x in second["token_ids"]]
        and bool(one.frame("steps")[steps].equals(other.frame("steps")[steps]))
    )


def test_killed_three_times(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are those of an undisturbed run, whatever the moment; every time something of what was done is kept."""
    monkeypatch.setattr("mtp_engine.experiments.run._PART", 1)
    cases = Grid.of(settings(prompts, tree=["chain:2", "tree:4"], temperature=[0.0, 1.0], max_tokens=5)).cases
    whole = Experiment.begin(tmp_path / "whole", cases, {})
    run_cases(whole, "cpu")
    killed = Experiment.begin(tmp_path / "killed", cases, {})
    done = [0]
    for kill in (2, 9, 13):

        def tick(finished: int, total: int, at: int = kill) -> None:
            if finished >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_cases(killed, "cpu", tick=tick)
        done.append(sum(len(folder.done) for folder in killed.folders))
    assert done == sorted(set(done)), "a killed run lost something"
    run_cases(killed, "cpu")
    for one, other in zip(whole.folders, killed.folders, strict=True):
        assert same_rows(one, other)
    before = [len(folder.sessions) for folder in killed.folders]
    run_cases(killed, "cpu")  # nothing is left to do
    assert [len(folder.sessions) for folder in killed.folders] == before


def test_cases_spread_over_processes(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped half way, and with one device that there is not: the rows are those of one process."""
    monkeypatch.setattr(workers, "_LOOK", 0.2)
    cases = Grid.of(settings(prompts, tree=["chain:2", "tree:4"], temperature=[0.0, 1.0], max_tokens=24)).cases
    whole, spread = (Experiment.begin(tmp_path / name, cases, {}) for name in ("whole", "spread"))
    run_cases(whole, "cpu")

    def stop(done: int, total: int) -> None:
        assert total == 4 * len(TEXTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run_workers(spread, ["cpu", "cpu"], stop)
    assert not all(folder.finished for folder in spread.folders)
    with pytest.raises(EngineError, match="device 'cuda:99' is not here"):
        workers.run_workers(spread, ["cpu", "cuda:99"], stop)
    monkeypatch.setattr(workers, "devices_here", lambda: ["cpu", "cuda:99"])
    with pytest.raises(EngineError, match=r"on cuda:99: .*; run again to go on"):
        workers.run_workers(spread, ["cuda:99", "cpu"], lambda done, total: None)
    assert all(folder.finished for folder in spread.folders), "one failed, and the other did not do its work"
    assert all(same_rows(*pair) for pair in zip(whole.folders, spread.folders, strict=True))
    workers.run_workers(spread, ["cpu", "cpu"], lambda done, total: None)  # who finds nothing to do ends well


def test_a_worker_ends_with_who_started_it(prompts: str, tmp_path: Path) -> None:
    """Or a killed run's workers would hold its cases."""
    cases = Grid.of(settings(prompts, tree="chain:2", max_tokens=400)).cases
    experiment = Experiment.begin(tmp_path / "out", cases, {})
    with (tmp_path / "words").open("wb") as words:
        worker = workers._start(experiment, "cpu", words)
        while not (tmp_path / "out" / cases[0].id).is_dir() and worker.poll() is None:
            time.sleep(0.05)
        assert worker.stdin
        worker.stdin.close()
        assert worker.wait(20) == 130, (tmp_path / "words").read_text()
    assert not experiment.folders[0].finished


def test_a_full_disk_loses_nothing(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_engine.experiments.run._PART", 2)
    experiment = Experiment.begin(tmp_path / "out", Grid.of(settings(prompts, tree="chain:2", max_tokens=3)).cases, {})
    whole, calls = files.write_whole, []

    def write(path: Path, fill: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, fill)

    monkeypatch.setattr(files, "write_whole", write)
    with pytest.raises(EngineError, match=r"No space left on device\): free space and run again"):
        run_cases(experiment, "cpu")
    monkeypatch.setattr(files, "write_whole", whole)
    [folder] = experiment.folders
    assert len(folder.done) == 2
    run_cases(experiment, "cpu")
    assert folder.frame("requests")["prompt"].tolist() == list(range(len(TEXTS)))


def test_a_damaged_part_is_decoded_anew(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other is touched."""
    monkeypatch.setattr("mtp_engine.experiments.run._PART", 2)
    experiment = Experiment.begin(tmp_path / "out", Grid.of(settings(prompts, tree="chain:2", max_tokens=3)).cases, {})
    run_cases(experiment, "cpu")
    [folder] = experiment.folders
    whole, [first, *others] = folder.frame("requests"), folder.parts("requests")
    kept = [path.read_bytes() for path in others]
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(EngineError, match="only its prompts are decoded anew"):
        run_cases(experiment, "cpu")
    first.unlink()
    assert not folder.finished
    run_cases(experiment, "cpu")
    assert [path.read_bytes() for path in others] == kept
    assert folder.frame("requests")[EXACT].equals(whole[EXACT])
    assert folder.finished


def test_forms_of_prompt_sets(tmp_path: Path) -> None:
    def read(name: str, *rows: Any) -> list[tuple[str, str, tuple[Mapping[str, str], ...]]]:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
        return [(item.id, item.category, item.messages) for item in read_prompts(str(tmp_path / name))]

    asked = {"role": "user", "content": "Why?"}
    assert read("spec.jsonl", {"question_id": 7, "category": "qa/x", "turns": ["Why?", "And?"]}) == [
        ("7", "qa", (asked,))
    ]
    system = {"role": "system", "content": "Be short."}
    chat = [system, asked, {"role": "assistant", "content": "So."}]
    assert read("chat.jsonl", {"messages": chat}) == [("0", "chat", (system, asked))]
    shared = {"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    assert read("shared.json", shared, shared) == [("a", "shared", (asked,)), ("a#2", "shared", (asked,))]
    assert read("plain.jsonl", {"prompt": "Why?"}) == [("0", "plain", (asked,))]
    for name, rows in (("bad.jsonl", [{"turns": []}]), ("worse.jsonl", [3]), ("none.jsonl", [{"messages": chat[:1]}])):
        with pytest.raises(EngineError, match="item 1 is no prompt"):
            read(name, *rows)


def test_prompts_that_ship() -> None:
    every = read_prompts("builtin")
    assert len(every) == 592
    assert {item.category for item in every} == {
        "code", "code_mbpp", "math", "mt_bench", "rag", "summarization", "translation",
    }  # fmt: skip
    assert len({item.id for item in every}) == len(every)
    assert {item.category for item in read_prompts("builtin:code,math", 10)} == {"code", "math"}


def test_grids() -> None:
    grid = Grid.of({"drafter": ["root", "mtp"], "tree": ["chain:3", "tree:7"], "verifier": ["match", "rejection"]})
    assert len(grid.cases) == 1 + 3
    assert len(grid.left_out) == 1
    assert "tree:7" in grid.left_out[0]
    assert len({case.id for case in grid.cases}) == 4
    assert Grid.of({}).cases == (Case(),)
    assert len(Grid.of({"mode": "record", "tree": ["chain:1", "chain:2"]}).cases) == 1, "a recording has no tree"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tree": "treee:3"}, "tree shape"),
        ({"teperature": 1}, "which are no settings"),
        ({"temperature": [0, -1]}, "temperature is -1"),
        ({"temperature": []}, "an empty list"),
        ({"batch": 0}, "max_batch is 0"),
        ({"drafter": "eagle"}, "one of mtp, ngram, root"),
        ({"engine": "vllm"}, "openai:URL"),
        ({"verifier": "rejection", "tree": "tree:7"}, "no case that can run"),
        ({"limit": "all"}, "limit is 'all'"),
        ({"mode": "record", "drafter": "ngram"}, "only our engine's MTP layers"),
    ],
)
def test_bad_grids(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Grid.of(given)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["experiment", *map(str, arguments)])


def test_what_users_get_wrong_is_one_line(tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.toml").write_text("tree = [")
    (tmp_path / "table.toml").write_text("[tree]\nshape = 1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    fresh = tmp_path / "fresh"
    for arguments, message in (
        (("run", "--out", fresh, "--prompts", tmp_path / "empty.jsonl"), "the file is empty"),
        (("run", "--out", fresh, "--prompts", tmp_path / "none.txt"), "cannot be read (No such file"),
        (("run", "--out", fresh, "--prompts", "builtin:poems"), "there are: code"),
        (("run", tmp_path / "bad.toml", "--out", fresh), "is no TOML"),
        (("run", tmp_path / "table.toml", "--out", fresh), "is a table"),
        (("run", tmp_path / "none.toml", "--out", fresh), "name a grid file"),
        (("run", "--out", tmp_path / "other"), "holds other files"),
        (("run", "--out", fresh, "--model", "no-such-model", "--prompts", prompts), "no-such-model"),
        (("report", tmp_path / "other"), "holds no experiment"),
        (("ask", fresh), "nothing was recorded here"),
        (("report", fresh), "no case has rows yet"),
        (("compare", tmp_path, fresh), "holds no experiment"),
    ):
        result = command(*arguments)
        said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, len(said)) == (2, 1), (arguments, result.output)
        assert message in said[0], said
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    result = command("run", "--out", fresh)
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("pip install 'mtp-engine[experiments]'")


def test_intervals_cover_as_they_say() -> None:
    """Of samples whose mean is known, about 95% of the intervals hold it."""
    random, held = np.random.default_rng(3), 0
    for _ in range(200):
        steps = random.integers(5, 15, 40)
        estimate = analyse.ratio(steps * 2.0 + random.normal(0, 3, 40), steps)
        held += estimate.low <= 2.0 <= estimate.high
    assert 178 <= held <= 199


def with_rows(results: Sequence[analyse.Result], steps: float) -> list[analyse.Result]:
    """Results whose requests took `steps` times as many steps, one prompt like another but for a little."""
    changed = []
    for each in results:
        frame = each.frame.copy()
        frame["clean_steps"] = frame["clean_steps"] * (steps + 0.001 * frame["prompt"])
        changed.append(analyse.Result(each.case, frame, each.recorded))
    return changed


def thrice(result: analyse.Result) -> analyse.Result:
    """Three times as many prompts."""
    frame = result.frame.loc[result.frame.index.repeat(3)].reset_index(drop=True)
    frame["prompt"] = range(len(frame))
    return analyse.Result(result.case, frame, result.recorded)


def test_comparing(recorded: Experiment) -> None:
    few = analyse.results(recorded)
    assert {row.verdict for row in analyse.compare(few, with_rows(few, 1.2))} == {"too few prompts to say"}
    found = [thrice(result) for result in few]
    same = analyse.compare(found, found)
    assert same
    assert {row.verdict for row in same} == {"no difference shown"}
    worse = analyse.compare(found, with_rows(found, 1.2))
    assert {row.verdict for row in worse} == {"the second accepts less"}
    assert all(row.difference.high < 0 for row in worse)
    with pytest.raises(EngineError, match="no setting in common"):
        analyse.compare(found, [])


def test_a_report_needs_nothing_else(recorded: Experiment, tmp_path: Path) -> None:
    page = report.write_report(recorded, tmp_path / "report")
    text = page.read_text()
    assert page.stat().st_size < 3_000_000
    for outside in ("http:", "https:", "src=", "@import", "<script", "<link"):
        bare = text.replace("http://www.w3.org", "").replace('xlink:href="#', "")
        assert outside not in bare, outside
    for name in ("by-category", "by-depth", "nodes", "temperature", "entropy"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert text.count("<svg") == 5
    table = (tmp_path / "report" / "summary.md").read_text()
    assert "| tree:7 T=0 |" in table
    assert r"\toprule" in (tmp_path / "report" / "summary.tex").read_text()
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "pictures share identifiers"


def test_what_steps_cost(recorded: Experiment, tmp_path: Path) -> None:
    """Of a folder that holds recordings; a second call adds trees. The report predicts from timed steps and the planner's."""
    folder = shutil.copytree(recorded.path, tmp_path / "out")
    for tree in ("chain:3", "tree:2"):
        result = command("costs", folder, "--tree", tree, "--batch", 1, "--batch", 3)
        assert result.exit_code == 0, result.output
    costs = Costs.load(folder)
    trees = {tree + source for tree in (PLAIN, "chain:3", "tree:2") for source in ("", PLANNER)}
    assert set(costs.seconds["mimo-nano"]) == trees
    assert all(set(row) == {1, 3} and min(row.values()) > 0 for row in costs.seconds["mimo-nano"].values())
    for source in ("", PLANNER):
        steps = [costs.seconds["mimo-nano"][name + source][3] for name in (PLAIN, "tree:2")]
        assert costs.speedup("mimo-nano", "tree:2", 1.5, source)[3] == pytest.approx(1.5 * steps[0] / steps[1])
    assert costs.speedup("mimo-nano", "tree:7", 1.5) == {}
    more = costs.with_measured("mimo-nano", {PLAIN: {2: 9.0}, "tree:7": {1: 8.0}}).seconds["mimo-nano"]
    assert more[PLAIN] == {**costs.seconds["mimo-nano"][PLAIN], 2: 9.0}
    assert set(more) == {*trees, "tree:7"}
    page = report.write_report(Experiment.open(folder), tmp_path / "report").read_text()
    assert f"chain:3{PLANNER}".replace("'", "&#x27;") in page
    assert (tmp_path / "report" / "speed-up.png").is_file()
    (folder / "costs.json").write_text("[]")
    assert "measure it again" in command("report", folder).stderr


def test_asking_at_the_command_line(recorded: Experiment) -> None:
    result = command("ask", recorded.path, "--tree", "3x2x1", "--tree", "tree:12")
    assert result.exit_code == 0, result.output
    assert "3x2x1 T=0.9" in result.stdout
    for rule in ("match", "rejection", "block"):
        for more in ((), ("--candidates", "best")):
            result = command("ask", recorded.path, "--tree", "chain:2", "--verifier", rule, *more)
            assert result.exit_code == 0, result.output
            assert result.stdout.count("chain:2") == 2
    for rule in ("rrs", "traversal", "typical", "nonsense"):
        result = command("ask", recorded.path, "--tree", "chain:2", "--verifier", rule)
        assert (result.exit_code, result.stderr.count("decode for real")) == (2, 1), result.output
    assert command("compare", recorded.path, recorded.path).stdout.count("too few") > 10  # in however wide a table


class Server(BaseHTTPRequestHandler):
    """Streams as vLLM and SGLang do. What stands behind the model's name says whose statistics it gives."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["model"] == "broken":
            self.send_error(404, "no such model")
            return
        if body["model"] == "old" and "draft_metrics" in body:
            self.send_error(400, "unknown field")
            return
        self.send_response(200)
        self.end_headers()
        if body["model"] in ("fails", "odd"):
            said: Any = {"error": {"message": "out of memory"}} if body["model"] == "fails" else ["what?"]
            self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
            return
        chunks: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": "x"}}]} for _ in range(3)]
        last: dict[str, Any] = {"choices": [{"delta": {}, "finish_reason": "length"}]}
        usage: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 11}}
        if body["model"] == "vllm":
            usage["metrics"] = {"speculative_decoding": {
                "mean_acceptance_length": 2.5, "acceptance_histogram": [1, 1, 1, 1], "num_spec_steps": 4,
                "num_accepted_draft_tokens": 6, "num_draft_tokens": 12}}  # fmt: skip
        if body["model"] == "sglang":
            last["choices"][0]["meta_info"] = {"spec_verify_ct": 5, "spec_accept_length": 2.2, "completion_tokens": 11}
        for chunk in [*chunks, last, usage]:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_other_engines(url: str, prompts: str, tmp_path: Path) -> None:
    Server.bodies.clear()
    base = {"engine": f"openai:{url}", "prompts": prompts, "temperature": 0.5, "seed": 3, "batch": 2}
    experiment = Experiment.begin(tmp_path / "out", Grid.of({**base, "model": ["vllm", "sglang", "silent"]}).cases, {})
    run_cases(experiment, "cpu")
    assert {(body["seed"], body["messages"][0]["content"]) for body in Server.bodies} == set(
        zip(range(3, 8), TEXTS, strict=True)
    )
    frames = {folder.case.model: folder.frame("requests") for folder in experiment.folders}
    assert all(frame["tokens"].tolist() == [11] * 5 for frame in frames.values())
    lengths = {each.case.model: each.accepted_length() for each in analyse.results(experiment) if len(each.rows())}
    assert {name: round(length.value, 3) for name, length in lengths.items()} == {"vllm": 2.5, "sglang": 2.2}
    vllm = next(each for each in analyse.results(experiment) if each.case.model == "vllm")
    assert [round(each.value, 3) for each in vllm.acceptance(conditional=False)] == [0.75, 0.5, 0.25]
    page = report.write_report(experiment, tmp_path / "report")
    assert "silent" in page.read_text()

    assert all(body["draft_metrics"] for body in Server.bodies)
    old = Experiment.begin(tmp_path / "old", Grid.of({**base, "model": "old"}).cases, {})
    run_cases(old, "cpu")  # which takes no fields that it does not know
    assert old.folders[0].frame("requests")["tokens"].tolist() == [11] * 5
    for model, message in (("fails", "failed at prompt .*: out of memory"), ("odd", "no chat completion")):
        case = Grid.of({**base, "model": model}).cases[0]
        with pytest.raises(EngineError, match=message):
            run_case(CaseFolder(tmp_path / model, case), Engines("cpu"), lambda done, total: None)

    broken = Experiment.begin(tmp_path / "broken", Grid.of({**base, "model": "broken"}).cases, {})
    with pytest.raises(EngineError, match="answered 404"):
        run_cases(broken, "cpu")
    gone = Grid.of({**base, "engine": "openai:http://127.0.0.1:9/v1", "model": "x"}).cases[0]
    with pytest.raises(EngineError, match="is the server running"):
        run_case(CaseFolder(tmp_path, gone), Engines("cpu"), lambda done, total: None)


def test_our_own_server(prompts: str, tmp_path: Path) -> None:
    """Says of every request what the engine itself does: the same tokens in as many steps, side by side with it."""
    base = {
        "model": "mimo-nano",
        "prompts": prompts,
        "max_tokens": 12,
        "temperature": [0.0, 0.9],
        "seed": 4,
        "batch": 3,
    }
    ours = Experiment.begin(tmp_path / "ours", Grid.of({**base, "tree": "chain:3", "threads": 1}).cases, {})
    run_cases(ours, "cpu")
    with engine() as running, serving(running) as url:
        there = Experiment.begin(tmp_path / "there", Grid.of({**base, "engine": f"openai:{url}/v1"}).cases, {})
        run_cases(there, "cpu")
    for one, other in zip(ours.folders, there.folders, strict=True):
        first, second = one.frame("requests"), other.frame("requests")
        for name in ("prompt", "tokens", "steps", "emitted", "nodes", "finish_reason", "prompt_tokens"):
            assert first[name].tolist() == second[name].tolist(), name
        accepted = [[[n for n in row if n] for row in frame["accepted"]] for frame in (first, second)]
        assert accepted[0] == accepted[1]
        assert any(accepted[0])
    found = analyse.compare(analyse.results(ours), analyse.results(there))
    assert [row.name for row in found] == [f"chain:3 T={t}, openai:{url}/v1 T={t}" for t in ("0", "0.9")]
    assert all(row.difference.value == 0 for row in found)
