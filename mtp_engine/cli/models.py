"""`mtp-engine models`: which models have a name, and what the cache holds of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from mtp_engine.cli.output import console, show
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import pairs
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub

if TYPE_CHECKING:
    from mtp_engine.models.make_tiny import Family


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the models that have a name of their own; fetch, check or remove one, or make a tiny random one.

    \b
    Examples:
      mtp-engine models
      mtp-engine models fetch smollm2-135m-mtp3
      mtp-engine models verify smollm2-135m-mtp3
      mtp-engine models remove smollm2-135m-mtp3
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
        show(pairs([(f"  {what}", value) for what, value in rows]), out)


@models.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Convert it again, and fetch it again if the kept download is damaged.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def fetch(name: str, force: bool, quiet: bool) -> None:
    """Fetch the model NAME into the cache, so that later runs need no network. Prints the folder it is in.

    What is there already is checked, every byte, and made again where it is damaged.

    \b
    Examples:
      mtp-engine models fetch smollm2-135m-mtp3
      mtp-engine models fetch --force smollm2-135m-mtp3
      mtp-engine models fetch HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with Waits(quiet=quiet) as waits:
        files = hub.locate(name, force=force, progress=waits)
        if hub.discard_damaged(files.folder, waits):
            files = hub.locate(name, progress=waits)
    click.echo(str(files.folder))


@models.command()
@click.argument("name")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def verify(name: str, quiet: bool) -> None:
    """Read every byte that is kept of the model NAME, a registered name or a .gguf file, and compare its hashes.

    Exit code 2 if anything is damaged.

    \b
    Examples:
      mtp-engine models verify smollm2-135m-mtp3
    """
    with Waits(quiet=quiet) as waits:
        found = hub.verify(name, waits)
    for each in found:
        click.echo(f"{each.path}: {'DAMAGED: ' + ', '.join(each.damaged) if each.damaged else 'ok'}")
    if not found:
        click.echo(f"{name}: nothing of it is in the cache")
    if any(each.damaged for each in found):
        ours = [each for each in found if each.damaged and hub.is_packaged(each.path)]
        remedy = "install the package anew" if ours else f"mtp-engine models fetch --force {name}"
        raise EngineError(f"{name} is damaged; to mend it: {remedy}")


@models.command()
@click.argument("name")
def remove(name: str) -> None:
    """Delete what the cache holds of the model NAME, a registered name or a .gguf file, which itself stays.

    \b
    Examples:
      mtp-engine models remove smollm2-135m-mtp3
    """
    freed = hub.remove(name)
    click.echo(f"{decimal(freed)} freed" if freed else f"{name}: nothing of it is in the cache")


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
