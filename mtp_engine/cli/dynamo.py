"""`mtp-engine dynamo-worker`: one of many workers behind NVIDIA Dynamo's frontend."""

import os
from pathlib import Path
from typing import Any

import click

from mtp_engine.cli import answer as answers
from mtp_engine.cli import request
from mtp_engine.cli.options import build, setting, settings
from mtp_engine.cli.output import note
from mtp_engine.cli.progress import Waits
from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.errors import EngineError

_FILES = "DYN_FILE_KV"  # Dynamo's own variable: where it keeps what the file backend knows
_PLANES = settings(
    click.option("--namespace", default="dynamo", help="Dynamo's namespace."),
    click.option("--component", default="backend", help="Dynamo's component."),
    click.option("--endpoint", default="generate", help="Dynamo's endpoint."),
    click.option("--discovery-backend", default="etcd", type=click.Choice(["etcd", "file", "kubernetes", "mem"])),
    click.option("--request-plane", default="tcp", type=click.Choice(["tcp", "nats", "http"])),
    click.option("--event-plane", default="zmq", type=click.Choice(["zmq", "nats"])),
    click.option("--served-model-name", "name", metavar="NAME", help="What clients call the model.  [default: MODEL]"),
    click.option(
        "--requests", metavar="DIR",
        help="A folder that all workers share, where running requests are noted, so that those with penalties, stop strings "
        f"or structures move with the same text, too.  [default: requests in {_FILES}, with the file backend]",
    ),
)  # fmt: skip
_ROOM = settings(
    setting(EngineConfig, "max_batch", "Requests that run at a time."),
    setting(EngineConfig, "max_waiting", "Requests that may wait beyond those."),
)


@click.command("dynamo-worker")
@_PLANES
@_ROOM
@request.ENGINE
def dynamo_worker(**options: Any) -> None:
    """Join NVIDIA Dynamo (extra `dynamo`): its frontend routes requests here, and moves them on if this worker dies.

    \b
    Examples:
      python -m dynamo.frontend --discovery-backend file --event-plane zmq --migration-limit 3
      mtp-engine dynamo-worker --model mimo-nano --discovery-backend file
    """
    try:
        from mtp_engine.serve import dynamo
        from mtp_engine.serve.migration import Ledger
    except ModuleNotFoundError as error:
        raise EngineError(
            f"a Dynamo worker needs {error.name}: pip install 'mtp-engine[dynamo]' and pip install --no-deps ai-dynamo==1.6.1"
        ) from None
    folder = options["requests"] or _beside_files(options["discovery_backend"])
    tree = None if options["tree"] is None else TreeShape.parse(options["tree"])
    with Waits(quiet=False) as waits:
        engine = answers.load_engine(
            options["model"], build(EngineConfig, {**options, "tree": tree}), options["mtp"], waits
        )
    note(f"{options['model']} on {engine.device_note}; a Dynamo worker now")
    planes = ("namespace", "component", "endpoint", "discovery_backend", "request_plane", "event_plane")
    ledger = Ledger(Path(folder)) if folder else None
    dynamo.run(engine, options["name"] or options["model"], ledger, **{plane: options[plane] for plane in planes})


def _beside_files(backend: str) -> str | None:
    place = os.environ.get(_FILES)
    return str(Path(place) / "requests") if backend == "file" and place else None
