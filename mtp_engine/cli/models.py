"""`mtp-engine models`: which models have a name, and fetching them."""

import click
from rich.filesize import decimal

from mtp_engine import hub
from mtp_engine.cli.output import console
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import pairs


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the models that have a name of their own, or fetch one.

    \b
    Examples:
      mtp-engine models
      mtp-engine models fetch smollm2-135m-mtp3
    """
    if context.invoked_subcommand is not None:
        return
    out = console()
    for model in hub.registry():
        size = decimal(model.download_bytes)
        out.print(model.name, style="bold")
        state = f"yes (fetched as {size})" if hub.is_cached(model.name) else f"no (first use fetches {size})"
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
