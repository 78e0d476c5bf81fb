"""`mtp-engine kernels`: compiling and checking the kernels that are built on the user's machine."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from mtp_engine.cli.output import console, show
from mtp_engine.cli.progress import Waits
from mtp_engine.errors import EngineError

if TYPE_CHECKING:
    from mtp_engine.kernels.attention_check import Checked

_Dims = tuple[int, int]


def _parse_dims(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[_Dims]:
    """Head sizes, queries' and keys' x values'; none given = all that are known to be needed."""
    from mtp_engine.kernels.flashinfer_build import HEAD_DIMS

    for text in texts:
        if tuple(text.split("x")) not in {(str(qk), str(v)) for qk, v in HEAD_DIMS}:
            known = ", ".join(f"{qk}x{v}" for qk, v in HEAD_DIMS)
            raise click.BadParameter(f"{text!r} is not one of {known}")
    return [dims for dims in HEAD_DIMS if not texts or f"{dims[0]}x{dims[1]}" in texts]


_dims = click.option(
    "--dims", metavar="QKxV", multiple=True, callback=_parse_dims, show_default="all",
    help="Size of the heads, queries' and values', as 192x128. May be repeated.",
)  # fmt: skip
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


@click.group()
def kernels() -> None:
    """Compile, and check, the attention kernel for --attention flashinfer. Everything else needs no building.

    It is compiled on first use otherwise: a few minutes, and the CUDA toolkit is needed.

    \b
    Examples:
      mtp-engine kernels build
      mtp-engine kernels check
    """


@kernels.command()
@_dims
@click.option(
    "--out", metavar="DIR", help="Also copy the files to DIR; MTP_ENGINE_KERNELS=DIR uses them, without FlashInfer."
)
@_quiet
def build(dims: list[_Dims], out: str | None, quiet: bool) -> None:
    """Compile the attention kernel for this GPU, unless that has been done. Prints the files.

    \b
    Examples:
      mtp-engine kernels build --dims 64x64
      mtp-engine kernels build --out ~/mtp-kernels
    """
    from mtp_engine.kernels.flashinfer_build import build as compile_module
    from mtp_engine.kernels.flashinfer_build import library_name

    folder = Path(out).expanduser() if out is not None else None
    if folder:
        if folder.exists() and not folder.is_dir():
            raise EngineError(f"{out}: is no folder; choose another for --out")
        folder.mkdir(parents=True, exist_ok=True)
    with Waits(quiet=quiet) as waits:
        for qk, v in dims:
            file = compile_module(qk, v, progress=waits)
            waits.close()
            if folder:
                file = Path(shutil.copyfile(file, folder / library_name(qk, v)))
            click.echo(str(file))


@kernels.command()
@_dims
@_quiet
def check(dims: list[_Dims], quiet: bool) -> None:
    """Run the attention kernel on random trees and compare it with plain PyTorch in float32.

    \b
    Examples:
      mtp-engine kernels check
      MTP_ENGINE_KERNELS=~/mtp-kernels mtp-engine kernels check --dims 192x128
    """
    from mtp_engine.kernels.attention_check import MAX_ERROR
    from mtp_engine.kernels.attention_check import check as run_checks

    wrong = 0
    with Waits(quiet=quiet) as waits:
        for qk, v in dims:
            rows = list(run_checks(qk, v, progress=waits))
            waits.close()
            show(_table(f"{qk}x{v}", rows), console())
            wrong += sum(not row.passed for row in rows)
    if wrong:
        raise EngineError(
            f"{wrong} results are off by more than {MAX_ERROR:g}: the build is broken; compile it again "
            "(mtp-engine kernels build), or use --attention exact"
        )


def _table(title: str, rows: "list[Checked]") -> Table:
    table = Table(title, "error", "us", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.what, f"{row.error:.1e}", f"{row.micros:.1f}", "ok" if row.passed else "WRONG")
    return table
