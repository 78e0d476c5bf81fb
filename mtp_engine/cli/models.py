"""`mtp-engine models`: which models have a name, and fetching them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from mtp_engine.cli.output import console
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import pairs
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub

if TYPE_CHECKING:
    from mtp_engine.models.make_tiny import Family


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the models that have a name of their own, fetch one, or make a tiny random one.

    \b
    Examples:
      mtp-engine models
      mtp-engine models fetch smollm2-135m-mtp3
      mtp-engine models make-tiny /tmp/tiny --fp8
    """
    if context.invoked_subcommand is not None:
        return
    out = console()
    for model in hub.registry():
        size = decimal(model.download_bytes)
        out.print(model.name, style="bold")
        fetched = f"yes (fetched as {size})" if hub.is_cached(model.name) else f"no (first use fetches {size})"
        state = fetched if model.download_bytes else "yes (comes with the package)"
        rows = [("cached", state), ("licence", model.licence), ("source", model.source), ("what", model.description)]
        out.print(pairs([(f"  {what}", value) for what, value in rows]))


@models.command()
@click.argument("name")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def fetch(name: str, quiet: bool) -> None:
    """Fetch the model NAME into the cache, so that later runs need no network. Prints the folder it is in.

    \b
    Examples:
      mtp-engine models fetch smollm2-135m-mtp3
      mtp-engine models fetch HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with Waits(quiet=quiet) as waits:
        files = hub.locate(name, progress=waits)
    click.echo(str(files.folder))


@models.command()
@click.argument("folder", metavar="DIR")
@click.option("--family", type=click.Choice(["mimo_v2_flash", "mimo"]), default="mimo_v2_flash", help="Whose layout.")
@click.option("--fp8", is_flag=True, help="Block-FP8 weights, as on the hub; otherwise BF16.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The same seed gives the same weights.")
def make_tiny(folder: str, family: "Family", fp8: bool, seed: int) -> None:
    """Write a tiny random model to DIR, in the hub's format and with MTP layers: to try and to test the engine with.

    \b
    Examples:
      mtp-engine models make-tiny /tmp/tiny --fp8
      mtp-engine generate --model /tmp/tiny --max-tokens 40 "Hello"
      mtp-engine inspect /tmp/tiny
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise EngineError(f"{folder}: exists already; choose a new folder")
    if fp8 and family == "mimo":
        raise EngineError("MiMo-7B is not published in FP8: leave --fp8 out")
    from mtp_engine.models.make_tiny import make_tiny as write

    click.echo(str(write(target, family=family, fp8=fp8, seed=seed)))
