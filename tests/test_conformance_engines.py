"""The adapters: what goes over the wire to a server, and what is made of its answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_engine.config import SamplingParams
from mtp_engine.conformance import Case, Unsupported
from mtp_engine.conformance.engines import openai_server
from mtp_engine.errors import EngineError

LETTERS: Any = SimpleNamespace(
    tokenizer=SimpleNamespace(
        encode=lambda text: [ord(c) for c in text],
        decode=lambda ids: "".join(map(chr, ids)),
        spellings=lambda text: [tuple(ord(c) for c in text.strip()), tuple(ord(c) for c in " " + text.strip())],
    )
)


class Server(BaseHTTPRequestHandler):
    """Says "ab", with the ids only if it is vLLM, and refuses min_p."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012
    tells_ids = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        self.send_response(400 if "min_p" in body else 200)
        self.end_headers()
        choice: dict[str, Any] = {"text": "ab", "finish_reason": "length"}
        if self.tells_ids:
            choice["token_ids"] = [97, 98]
        if "logprobs" in body:
            choice["logprobs"] = {
                "token_logprobs": [-1.0, -0.5], "top_logprobs": [{"c": -0.7, "a": -1.0}, {"b": -0.5, "token_id:99": -2.0}],
            }  # fmt: skip
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    Server.asked, Server.tells_ids = [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.mark.parametrize("tells", [True, False])
def test_a_completion(url: str, tells: bool) -> None:
    Server.tells_ids = tells
    params = SamplingParams(
        max_tokens=2, temperature=0.5, seed=3, logprobs=2, stop=("x",), logit_bias={5: 1.5}, bad_words=((99, 100),)
    )
    [sample] = openai_server(url, "name", LETTERS)([Case((1, 2), params)])
    assert (sample.tokens, sample.text, sample.finish_reason) == ((97, 98), "ab", "length")
    assert [(e.token, e.logprob, e.rank, e.top) for e in sample.logprobs] == [
        (97, -1.0, 2, ((99, -0.7), (97, -1.0))), (98, -0.5, 1, ((98, -0.5), (99, -2.0))),
    ]  # fmt: skip
    assert Server.asked == [
        {
            "path": "/v1/completions", "model": "name", "prompt": [1, 2], "max_tokens": 2, "temperature": 0.5, "seed": 3,
            "logprobs": 2, "stop": ["x"], "logit_bias": {"5": 1.5}, "bad_words": ["cd"], "return_token_ids": True,
        }
    ]  # fmt: skip


def test_a_refusal_is_one(url: str) -> None:
    with pytest.raises(Unsupported, match="400"):
        openai_server(url, "name", LETTERS)([Case((1,), SamplingParams(min_p=0.1))])


def test_no_server_is_an_error() -> None:
    with pytest.raises(EngineError, match="is the server running"):
        openai_server("http://127.0.0.1:9/v1", "name", LETTERS)([Case((1,), SamplingParams())])
