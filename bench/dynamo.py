"""A worker is killed in mid-answer: does the client get the text of an undisturbed run?

    python bench/dynamo.py                # needs the extra `dynamo` and ai-dynamo
    python bench/dynamo.py --kills 5

Dynamo's frontend and two workers on this machine (file discovery, tcp, zmq). Each round streams an answer, kills the worker
that writes it (SIGKILL) after a random number of chunks, and starts another; the frontend moves the request. Its text is
compared with that of the same request undisturbed. Every other round names no seed. Structures are left out: Dynamo 1.6.1
moves no request that has one (tests/test_migration.py shows that the worker could take it over).
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import click
import httpx
from common import COUNT, ROOT, conditions, require_commit, run

from mtp_engine.hub import hub
from mtp_engine.serve.migration import read

PROMPTS = [
    "Once upon a time",
    "The old bridge over the river",
    "In a small town by the sea there lived",
    "How do bees find",
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.8}, {"temperature": 0.0}, {"temperature": 1.0, "frequency_penalty": 1.2, "presence_penalty": 0.4},
    {"temperature": 0.9, "stop": [" a bright red", "ever after, "]}, {"temperature": 0.7, "min_tokens": 100},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}, {"temperature": 0.6, "presence_penalty": 1.0},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.02}, {"temperature": 1.3, "top_p": 0.8},
]  # fmt: skip
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
_PORT = re.compile(rb"shared TCP server on [\d.]+:(\d+)")
OURS = [sys.executable, "-m", "mtp_engine.cli", "dynamo-worker", "--model", hub.NANO, "--threads", "1"]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@final
@dataclass
class Cluster:
    """A frontend, and workers that are replaced when they are killed. A worker's log says which requests it got."""

    folder: Path
    port: int = field(default_factory=free_port)
    workers: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)  # by their logs
    started: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def process(self, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
        local = {"DYN_FILE_KV": str(self.folder / "files"), "DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_LOG": "info"}
        with log.open("wb") as out:
            return subprocess.Popen(
                command, env={**os.environ, **local}, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )

    @contextmanager
    def running(self, workers: int) -> Iterator["Cluster"]:
        command = [
            sys.executable,
            "-m",
            "dynamo.frontend",
            "--http-port",
            str(self.port),
            "--migration-limit",
            "10",
            *PLANES,
        ]
        with ExitStack() as stack:
            frontend = self.process(command, self.folder / "frontend.log")
            stack.callback(self.stop, frontend)
            stack.callback(lambda: [self.stop(worker) for worker in self.workers.values()])
            for _ in range(workers):
                self.start()
            self.wait()
            yield self

    @staticmethod
    def stop(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()

    def start(self) -> None:
        log = self.folder / f"worker-{self.started}.log"
        self.started += 1
        self.workers[log] = self.process([*OURS, *PLANES], log)

    def wait(self) -> None:
        """Until the frontend knows the workers that live; the dead it forgets in some 10 s, and tries till then."""
        for _ in range(1200):
            logs = [_PORT.search(log.read_bytes()) for log in self.workers]
            alive = {found[1].decode() for found in logs if found}
            try:
                known = httpx.get(f"{self.url}/health").json().get("instances", [])
            except (httpx.HTTPError, ValueError):
                known = []
            ports = {each["transport"]["tcp"].split("/")[0].rpartition(":")[2] for each in known}
            if len(alive) == len(self.workers) and alive <= ports:
                return
            time.sleep(0.1)
        raise SystemExit(f"the cluster did not come up: see {self.folder}")

    def kill(self, request_id: str) -> None:
        """Kill the worker that has the request, and start another."""
        for log, worker in list(self.workers.items()):
            if request_id.encode() in log.read_bytes():
                worker.send_signal(signal.SIGKILL)
                worker.wait()
                del self.workers[log]
                self.start()
                return
        raise SystemExit(f"no worker has request {request_id}")


def answer(cluster: Cluster, body: dict[str, Any], kill_after: int | None) -> tuple[str, str]:
    """The text and the request's id. kill_after: chunks after which the worker that writes it is killed. Raises
    RuntimeError if the answer ends before that."""
    text, request_id, chunks, reason = "", "", 0, None
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json={**body, "stream": True}, timeout=120) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.read().decode()[:300]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not event.get("choices"):
                continue
            request_id = event["id"].split("-", 1)[1]
            text += event["choices"][0].get("text") or ""
            reason = event["choices"][0].get("finish_reason") or reason
            chunks += 1
            if chunks == kill_after:
                cluster.kill(request_id)
    if kill_after is not None and chunks < kill_after:
        raise RuntimeError(f"the answer ended after {chunks} chunks")
    return text if reason else f"{text} [broken off]", request_id


def round_of(cluster: Cluster, number: int, rng: random.Random) -> dict[str, Any]:
    kind = dict(KINDS[(number // 2) % len(KINDS)])
    body: dict[str, Any] = {
        "model": hub.NANO,
        "prompt": rng.choice(PROMPTS),
        "max_tokens": 160,
        "ignore_eos": True,
        **kind,
    }
    if seeded := number % 2 == 0:
        body["seed"] = rng.randrange(2**31)
    at = rng.randrange(1, 30)
    while True:
        try:
            text, request_id = answer(cluster, body, at)
            break
        except RuntimeError:  # too short an answer: another moment
            at = max(1, at // 2)
    if not seeded:  # what the worker drew from the request's id
        turn = read({"token_ids": [1], "sampling_options": {}}, request_id, 100, None)
        body["seed"] = turn.params.seed
    cluster.wait()
    expected, _ = answer(cluster, body, None)
    told = {"round": number, "kind": kind, "seeded": seeded, "killed_after": at, "characters": len(text)}
    return {**told, "same": True} if text == expected else {**told, "same": False, "texts": [text, expected]}


@click.command()
@click.option("--kills", default=20, type=COUNT)
@click.option("--first", default=0, type=COUNT, help="Round to begin with.")
@click.option("--seed", default=0)
def main(kills: int, first: int, seed: int) -> None:
    commit = require_commit()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)).running(2) as cluster:
        rounds = []
        for number in range(first, first + kills):
            rounds.append(round_of(cluster, number, rng))
            click.echo(json.dumps(rounds[-1]))
    same = sum(each["same"] for each in rounds)
    moved = {"bench": "dynamo", "model": hub.NANO, "kills": kills, "identical": same, "rounds": rounds, "workers": 2}
    click.echo(json.dumps({**moved, **conditions(commit)}))
    raise SystemExit(same < kills)


if __name__ == "__main__":
    run(main)
