"""`mtp-engine conformance`: does an engine say what plain decoding says?"""

import time
from typing import TYPE_CHECKING, Any

import click

from mtp_engine.cli.options import build, setting, settings
from mtp_engine.cli.output import note, one_line
from mtp_engine.cli.progress import Waits
from mtp_engine.config import EngineConfig, TreeShape

if TYPE_CHECKING:
    from mtp_engine.conformance.case import Verdict


_ENGINE = settings(
    setting(EngineConfig, "drafter", "Who drafts, for --engine ours."),
    setting(EngineConfig, "tree", "What is drafted per step, for --engine ours.", kind=str, unset="suits the drafter"),
    setting(EngineConfig, "verifier", "The rule that keeps drafts, for --engine ours."),
    setting(EngineConfig, "device", "Of --engine ours and the baseline: cpu, cuda, ..., or auto."),
)


@click.command()
@click.option("--engine", default="ours", metavar="ours|hf|openai:URL", help="Whom to test.")
@click.option(
    "--model", default=None, metavar="NAME|PATH", help="The weights that all run.  [default: the default model]"
)
@click.option("--prompts", default=4, type=click.IntRange(1, 10), help="How many of the built-in prompts.")
@click.option("--draws", default=200, type=click.IntRange(min=20), help="Texts per test of a distribution.")
@_ENGINE
def conformance(engine: str, model: str | None, prompts: int, draws: int, **options: Any) -> None:
    """Test an engine against plain decoding of the same weights: texts, distributions, every parameter, stops, logprobs,
    seeds.

    Each check says what it saw as soon as it is done: about a minute on two CPU cores for each prompt, most of it for
    --draws. Exit code 1 if a check fails.

    \b
    Examples:
      mtp-engine conformance
      mtp-engine conformance --verifier block --tree chain:3 --draws 1000
      mtp-engine conformance --engine hf
      mtp-engine conformance --engine openai:http://localhost:8000/v1 --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    tree = None if options["tree"] is None else TreeShape.parse(options["tree"])
    config = build(EngineConfig, {**options, "tree": tree}, max_context=1024)
    failed, begin = 0, time.monotonic()
    with Waits(quiet=False) as waits:
        waits("starting", 0, None)
        from mtp_engine.conformance.run import is_exact, verdicts
        from mtp_engine.conformance.suite import count_checks

        total = count_checks(exact=is_exact(engine, config))
        found = verdicts(engine, model, prompts=prompts, draws=draws, config=config, progress=waits)
        for number, verdict in enumerate(found, 1):
            waits.close()
            click.echo(f"{verdict.check:<29} {_word(verdict):<6}  {one_line(verdict.detail)}")
            waits("testing", number, total)
            failed += verdict.passed is False
    note(f"{number - failed} of {number} checks without a fault, {time.monotonic() - begin:.0f} s")
    if failed:
        raise click.exceptions.Exit(1)


def _word(verdict: "Verdict") -> str:
    return {True: "ok", False: "FAILED", None: "open"}[verdict.passed]
