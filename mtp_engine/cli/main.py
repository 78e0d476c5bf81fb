"""`mtp-engine`: the group of commands, and the one place where errors become a line on stderr and an exit code.

Exit codes: 0 done, 1 internal error or the reader of our output went away, 2 something the user can mend, 130 Ctrl-C.
"""

import os
import sys
from contextlib import suppress
from typing import Any, final

import click

from mtp_engine import __version__
from mtp_engine.cli.conformance import conformance
from mtp_engine.cli.generate import generate
from mtp_engine.cli.inspect import inspect
from mtp_engine.cli.kernels import kernels
from mtp_engine.cli.models import models
from mtp_engine.cli.output import one_line
from mtp_engine.cli.train import train
from mtp_engine.errors import EngineError

_NAME = "mtp-engine"  # also for `python -m mtp_engine.cli`
_TRACEBACK = "MTP_ENGINE_TRACEBACK"


@final
class _CommandLine(click.Group):
    """A click group whose every failure is one line `error: ...`, never a traceback."""

    def main(self, args: Any = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        """Run and exit; click calls this both for the script and in its test runner."""
        extra.pop("standalone_mode", None)
        try:
            code = super().main(args, _NAME, standalone_mode=False, **extra)
        except SystemExit:  # click's answer to a broken pipe
            _let_go_of_stdout()
            raise
        except BaseException as error:
            code = _report(error)
        sys.exit(code or 0)


def _report(error: BaseException) -> int:
    """Say what went wrong in one line; returns the exit code. Raises what the developer asked to see raised."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return 130
    code = 2
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else _NAME
        message = f"{error.format_message().rstrip('.')} (see '{where} --help')"
    elif isinstance(error, click.ClickException):
        message = error.format_message()
    elif isinstance(error, EngineError):
        message = str(error)
    elif isinstance(error, OSError):
        _let_go_of_stdout()
        message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)
    elif os.environ.get(_TRACEBACK):
        raise error
    else:
        code = 1
        what = f"{type(error).__name__}: {error}"
        message = f"internal error: {what}; run with {_TRACEBACK}=1 for the traceback"
    with suppress(OSError):  # nobody may be reading stderr either
        click.echo(f"error: {one_line(message)}", err=True)
    return code


def _let_go_of_stdout() -> None:
    """What stdout could not take must not fail once more, noisily, when the interpreter flushes it at exit."""
    with suppress(OSError, ValueError):  # in tests stdout is no file, and it may be closed
        taken = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, taken)
        os.close(null)


@click.group(
    cls=_CommandLine,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Lossless speculative decoding with Multi-Token Prediction layers.

    \b
    Examples:
      mtp-engine generate "Why is the sky blue?"
      mtp-engine models
      mtp-engine inspect smollm2-135m-mtp3
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(generate)
main.add_command(models)
main.add_command(inspect)
main.add_command(kernels)
main.add_command(conformance)
main.add_command(train)
