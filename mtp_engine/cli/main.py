"""`mtp-engine`: the group of commands, and the one place where errors become a line on stderr and an exit code.

Exit codes: 0 done, 1 internal error, a failed check or nobody reads our output any more, 2 something the user can mend,
3 an answer cut off before it matched its structure, 4 other tokens than there must be, 130 Ctrl-C, 143 SIGTERM.
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Any, final

import click

from mtp_engine import __version__
from mtp_engine.cli.chat import chat
from mtp_engine.cli.conformance import conformance
from mtp_engine.cli.dynamo import dynamo_worker
from mtp_engine.cli.exits import INTERNAL, USER, EndingSignals, interrupt_code
from mtp_engine.cli.experiment import experiment
from mtp_engine.cli.generate import generate
from mtp_engine.cli.inspect import inspect
from mtp_engine.cli.kernels import kernels
from mtp_engine.cli.models import models
from mtp_engine.cli.output import one_line
from mtp_engine.cli.serve import serve
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
        log = logging.getLogger("mtp_engine")
        if not (
            log.handlers or os.environ.get(_TRACEBACK)
        ):  # what the engine logs of a step that failed is a traceback
            log.addHandler(logging.NullHandler())
        signals = EndingSignals()
        try:
            with signals:
                if "stdout" in _reopen():
                    raise EngineError("stdout is closed: send it to a file, or to /dev/null")
                code = super().main(args, _NAME, standalone_mode=False, **extra)
        except SystemExit:  # click's answer to a broken pipe
            _let_go_of_stdout()
            raise
        except BaseException as error:
            swallowed = signals.last if isinstance(error, ImportError) else None
            code = 128 + swallowed if swallowed else _report(error)
        sys.exit(code or 0)


def _report(error: BaseException) -> int:
    """Say what went wrong in one line; returns the exit code. Raises what the developer asked to see raised."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return interrupt_code(error.__cause__ if isinstance(error, click.Abort) else error)
    code = USER
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
        code = INTERNAL
        what = f"{type(error).__name__}: {error}"
        message = f"internal error: {what}; run with {_TRACEBACK}=1 for the traceback"
    with suppress(OSError):  # nobody may be reading stderr either
        click.echo(f"error: {one_line(message)}", err=True)
    return code


def _reopen() -> list[str]:
    """Have standard streams that the caller closed lead nowhere, so that no file of ours gets their number; their names."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        number, mode = {"stdin": (0, "r"), "stdout": (1, "w"), "stderr": (2, "w")}[name]
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  as long as we live
    return closed


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
      mtp-engine generate "Explain why the sky is blue."
      mtp-engine chat
      mtp-engine serve
      mtp-engine models
      mtp-engine inspect smollm2-135m-mtp3
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (generate, chat, serve, dynamo_worker, models, inspect, kernels, conformance, experiment, train):
    main.add_command(_command)
