"""`mtp-engine inspect`: what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from mtp_engine.cli.output import JsonTarget, console, show
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import pairs

if TYPE_CHECKING:
    from mtp_engine.config import Experts
    from mtp_engine.hub.inspect import ModelReport


@click.command()
@click.argument("model")
@click.option("--mtp", metavar="DIR", help="A folder of MTP layers to use instead of the model's own.")
@click.option(
    "--tensor-parallel", "ranks", default=1, type=click.IntRange(1), help="Show what each of so many GPUs would hold."
)
@click.option(
    "--experts",
    default="auto",
    type=click.Choice(["auto", "int4"]),
    help="Show what memory takes with experts in 4 bits.",
)
@click.option(
    "--json", "json_file", metavar="FILE", help="Also write all of it as JSON; - for stdout, and nothing else there."
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def inspect(
    model: str, mtp: str | None, ranks: int, experts: "Experts", json_file: str | None, quiet: bool
) -> None:  # fmt: skip
    """Show what the checkpoint MODEL holds: a registered name, a folder, a .gguf file, or org/name on the hub.

    Weights are not loaded, and need not be there: a folder with config.json is enough. How many MTP layers the model has
    is then assumed, unless the index of the weights is there too. A registered model that is not cached yet is fetched
    first.

    \b
    Examples:
      mtp-engine inspect smollm2-135m-mtp3
      mtp-engine inspect ./my-model --json - | jq .parameters
      mtp-engine inspect ./MiMo-V2-Flash --tensor-parallel 2 --experts int4
    """
    target = JsonTarget.check(json_file) if json_file is not None else None
    with Waits(quiet=quiet) as waits:
        waits("starting", 0, None)
        from mtp_engine.hub.inspect import inspect_model

        report = inspect_model(model, mtp=mtp, ranks=ranks, experts=experts, progress=waits)
    if target:
        target.write(asdict(report))
    if target is None or target.path is not None:
        show(pairs(_rows(report)), console())


def _rows(report: "ModelReport") -> list[tuple[str, str]]:
    mtp = f"{report.mtp_layers}"
    if report.mtp_depth > report.mtp_layers:
        mtp += f" (used for {report.mtp_depth} depths)"
    mtp += _assumption(report)
    window = f" ({report.window_layers} with a sliding window)" if report.window_layers else ""
    return [
        ("model", report.name),
        ("folder", report.folder),
        ("family", report.family),
        ("layers", f"{report.layers}{window}"),
        ("MTP layers", mtp),
        ("hidden size", f"{report.hidden_size:,}"),
        ("vocabulary", f"{report.vocab_size:,}"),
        ("context", f"{report.max_context:,} tokens"),
        ("parameters", _parameters(report.parameters, report.dtypes)),
        ("MTP parameters", _parameters(report.mtp_parameters, report.mtp_dtypes)),
        *_plan(report),
        *_share(report),
        *_weights(report),
    ]


def _assumption(report: "ModelReport") -> str:
    """What the number of MTP layers rests on, where no weights tell it."""
    if report.mtp_source == "weights":
        return ""
    usual = f"published {report.family} models have {report.mtp_layers or 'none'}"
    source = "num_nextn_predict_layers of config.json" if report.mtp_source == "config" else usual
    return f" (assumed: {source}; neither weights nor an index are here)"


def _plan(report: "ModelReport") -> list[tuple[str, str]]:
    plan, context = report.plan, f"{report.max_context:,} tokens"
    table = "without the embedding table"
    if plan.active_parameters == plan.parameters:
        table = "all: the embedding table is the output head, too"
    rows = [("parameters per token", f"{plan.active_parameters:,} ({table})")]
    if report.mtp_layers:
        rows.append(("per MTP layer", f"{plan.mtp_layer_parameters:,}"))
    stored = ", ".join(f"{decimal(size)} {dtype}" for dtype, size in plan.bytes_by_dtype.items())
    rings = [(plan.kv_per_sequence, "main"), (plan.mtp_kv_per_sequence, "MTP")]
    return [
        *rows,
        ("bytes as published", f"{decimal(sum(plan.bytes_by_dtype.values()))} ({stored}){_other_format(report)}"),
        ("KV per token", ", ".join(f"{size:,} bytes in {dtype}" for dtype, size in report.kv_bytes_per_token.items())),
        ("KV per sequence", _rings(rings)),
        ("KV at full context", f"{plan.kv_full_context / 2**30:.2f} GiB in bf16 ({context})"),
        ("GPUs needed", ", ".join(f"{count} of {size}" for size, count in plan.gpus.items())),
    ]


def _share(report: "ModelReport") -> list[tuple[str, str]]:
    """What each of several processes holds."""
    if (share := report.share) is None:
        return []
    parts = ", ".join(f"{decimal(size)} {part}" for part, size in share.weights.items())
    fits = ", ".join(f"{'fits' if fits else 'does not fit'} {size}" for size, fits in share.gpus.items())
    kv = f"{share.kv_per_token:,} bytes per token, {decimal(share.kv_per_sequence)} per sequence"
    return [
        (
            f"each of {share.ranks}" if share.ranks > 1 else "in memory",
            f"{decimal(sum(share.weights.values()))} ({parts})",
        ),
        ("its KV", f"{kv}, {share.kv_full_context / 2**30:.2f} GiB at full context, all in bf16"),
        ("its memory", fits),
    ]


def _other_format(report: "ModelReport") -> str:
    """A word about files that hold the weights in other numbers than config.json calls for."""
    here = sum(report.files.values())
    if not here or report.dtypes.keys() <= report.plan.parameters_by_dtype.keys():
        return ""
    return f"; the files here hold {', '.join(report.dtypes)}, {decimal(here)}"


def _rings(rings: list[tuple[int, str]]) -> str:
    parts = [f"{decimal(size)} {what}" for size, what in rings if size]
    return f"{', '.join(parts)} in bf16" if parts else "nothing: no layer has a sliding window"


def _weights(report: "ModelReport") -> list[tuple[str, str]]:
    if not report.files:
        return [("weight files", "none here: this is what config.json calls for")]
    return [
        ("weight files", _files(report.files)),
        ("MTP weight files", _files(report.mtp_files) if report.mtp_layers else "none"),
    ]


def _parameters(total: int, dtypes: Mapping[str, int]) -> str:
    if not total:
        return "none"
    shares = (f"{name} {count / total:.1%}" for name, count in dtypes.items())
    return f"{total:,} ({', '.join(dtypes if len(dtypes) == 1 else shares)})"


def _files(files: Mapping[str, int]) -> str:
    return "\n".join(f"{name}  {decimal(size)}" for name, size in files.items()) or "in the model's own"
