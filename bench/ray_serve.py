"""Our app behind Ray Serve, on a cluster of two nodes: the app is an ingress as it is.

    python bench/ray_serve.py            # needs ray[serve]

Two nodes of a `ray.cluster_utils.Cluster` on this machine, one replica on each. Answers through Ray's proxy are compared with
the engine's own, streams with wholes, and both replicas must have answered.
"""

import asyncio
import json
import time
from typing import Any

import click
import httpx
import ray
from common import ROOT, SOME, conditions, require_commit, run
from ray import serve
from ray.cluster_utils import Cluster

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.hub import hub

PORT = 8123


def make_app() -> Any:
    """Called in a replica: its own engine, and the app over it."""
    from mtp_engine.serve import build_app

    return build_app(Engine.load(hub.NANO, EngineConfig(threads=1)), name=hub.NANO)


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=16)
@serve.ingress(make_app)
class Served:
    """One replica. `serve.ingress` takes an ASGI app, or what builds one where it runs."""


def bodies(requests: int) -> list[dict[str, Any]]:
    return [
        {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.8, "seed": seed} for seed in range(requests)
    ]


def alone(requests: int) -> list[str]:
    with Engine.load(hub.NANO, EngineConfig(drafter="root", threads=1)) as engine:
        params = [SamplingParams(max_tokens=16, temperature=0.8, seed=seed) for seed in range(requests)]
        return [answer.text for answer in engine.generate(["Once upon a time"] * requests, params)]


async def ask(url: str, sent: list[dict[str, Any]]) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def one(body: dict[str, Any], *, stream: bool) -> str:
            reply = await http.post("/v1/completions", json={**body, "stream": stream})
            if not stream:
                return str(reply.json()["choices"][0]["text"])
            events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            return "".join(event["choices"][0]["text"] for event in events)

        return await asyncio.gather(*(one(body, stream=index % 2 == 0) for index, body in enumerate(sent)))


@click.command()
@click.option("--requests", default=32, type=SOME)
def main(requests: int) -> None:
    commit = require_commit()
    expected = alone(requests)
    begin = time.perf_counter()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}})
        nodes = len([node for node in ray.nodes() if node["Alive"]])
        serve.start(http_options={"host": "127.0.0.1", "port": PORT}, proxy_location="HeadOnly")
        serve.run(Served.bind())
        ready = time.perf_counter() - begin
        found = asyncio.run(ask(f"http://127.0.0.1:{PORT}", bodies(requests)))
        status = serve.status().applications["default"].deployments["Served"].replica_states
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    same = sum(text == other for text, other in zip(found, expected, strict=True))
    told = {
        "bench": "ray_serve",
        "ray": ray.__version__,
        "nodes": nodes,
        "replicas": {str(key): value for key, value in status.items()},
    }
    click.echo(
        json.dumps(
            {**told, "requests": requests, "same_as_alone": same, "up_after_s": round(ready, 1), **conditions(commit)}
        )
    )
    raise SystemExit(same < requests)


if __name__ == "__main__":
    run(main)
