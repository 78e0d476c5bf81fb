"""`mtp-engine serve`: a model behind OpenAI's HTTP API, until a signal ends it."""

import ipaddress
from typing import Any

import click

from mtp_engine.cli import answer as answers
from mtp_engine.cli import request
from mtp_engine.cli.options import build, setting, settings
from mtp_engine.cli.output import note
from mtp_engine.cli.progress import Waits
from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.errors import EngineError

_ROOM = settings(
    setting(EngineConfig, "max_batch", "Requests that run at a time."),
    setting(EngineConfig, "max_waiting", "Requests that may wait beyond those; one more is answered 503."),
    setting(
        EngineConfig,
        "kv_tokens",
        "Tokens that the KV cache holds; 0 is max-batch full contexts.",
        kind=click.IntRange(0),
    ),
    click.option(
        "--capture",
        type=click.Choice(["load", "lazy"]),
        default="load",
        help="When steps become CUDA graphs, on a GPU.",
    ),
    setting(EngineConfig, "prefix_cache_gb", "How much of the beginnings of texts is kept (1e9 bytes)."),
)
_NET = settings(
    click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="The interface to listen on."),
    click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes a free one."),
    click.option(
        "--api-key", "api_keys", multiple=True, metavar="KEY", envvar="MTP_ENGINE_API_KEY",
        help="Ask every client for this key; several times.",
    ),
    click.option("--insecure", is_flag=True, help="Listen on other interfaces than loopback without a key."),
    click.option("--served-model-name", "name", metavar="NAME", help="What clients call the model.  [default: MODEL]"),
)  # fmt: skip
_BOUNDS = settings(
    click.option(
        "--default-max-tokens", "default_tokens", default=512, type=click.IntRange(1), help="Where none is asked."
    ),
    click.option("--max-body", "body_bytes", default=4_000_000, type=click.IntRange(1), help="Bytes of a request."),
    click.option(
        "--answer-timeout", "answer_s", default=600.0, type=click.FloatRange(0.01), help="Seconds for an answer."
    ),
    click.option(
        "--drain", "drain_s", default=30.0, type=click.FloatRange(0.01), help="Seconds to end answers at SIGTERM."
    ),
)


@click.command()
@_NET
@_ROOM
@_BOUNDS
@request.ENGINE
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, and no address.")
def serve(**options: Any) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, completions and responses, and a page to try it at /.

    SIGTERM or Ctrl-C lets the answers that run end first (--drain); a second one ends at once.

    \b
    Examples:
      mtp-engine serve
      mtp-engine serve --model mimo-nano --port 8080 --max-batch 16
      mtp-engine serve --host 0.0.0.0 --api-key secret
      MTP_ENGINE_API_KEY=secret mtp-engine serve --host 0.0.0.0
    """
    runner = _runner()
    check_exposure(options["host"], options["api_keys"], insecure=options["insecure"])
    limits = build(runner.Limits, options)
    tree = None if options["tree"] is None else TreeShape.parse(options["tree"])
    config = build(EngineConfig, {**options, "tree": tree})
    with runner.listen(options["host"], options["port"]) as listening, Waits(quiet=options["quiet"]) as waits:
        engine = answers.load_engine(options["model"], config, options["mtp"], waits)
        waits.close()
        if not options["quiet"]:
            if engine.captured:
                note(engine.captured)
            note(f"{options['model']} on {engine.device_note}; http://{listening.address} serves it, Ctrl-C ends that")
        hosts = {options["host"].lower(), "localhost", "127.0.0.1", "[::1]"} if not options["api_keys"] else set()
        runner.serve(
            engine,
            listening,
            name=options["name"] or options["model"],
            limits=limits,
            api_keys=options["api_keys"],
            hosts=sorted(hosts) if not options["insecure"] else (),
        )


def check_exposure(host: str, api_keys: tuple[str, ...], *, insecure: bool) -> None:
    """Raises EngineError where anybody who reaches the machine could use the model."""
    if any(not key.strip() or not key.isascii() for key in api_keys):
        raise EngineError("--api-key is empty or not ASCII: give it letters and digits")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host.lower() == "localhost"
    if not (loopback or api_keys or insecure):
        raise EngineError(
            f"--host {host} lets other machines in, and there is no key: give --api-key KEY, or --insecure if that is meant"
        )


def _runner() -> Any:
    try:
        from mtp_engine.serve import run
    except ModuleNotFoundError as error:
        raise EngineError(f"serving needs {error.name}: pip install 'mtp-engine[serve]'") from None
    return run
