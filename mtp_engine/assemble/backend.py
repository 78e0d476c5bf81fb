"""What the engine runs on: torch alone, or kernels and CUDA graphs. Chosen once, when a model is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.drafters import Ranking, TorchDraftOps, TorchLevels
from mtp_engine.drafters.expand import MOST_CHILDREN, DraftOps
from mtp_engine.drafters.lazy import LevelsFactory
from mtp_engine.errors import EngineError
from mtp_engine.hub.cache import cache_root
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.weights import Makers
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Progress, Verifier
from mtp_engine.runtime.step import EagerRunner, RunnerFactory, explain
from mtp_engine.runtime.threads import pool_size
from mtp_engine.verifiers import (
    BlockVerifier,
    DeviceMatchVerifier,
    DeviceRRSVerifier,
    DeviceShardedMatchVerifier,
    MatchVerifier,
    NativeMatchVerifier,
    RejectionVerifier,
    RRSVerifier,
    ShardedMatchVerifier,
    TraversalVerifier,
    TypicalVerifier,
)

_GPU_CHUNK = 2048  # rows of a prompt, where products and attention are at the machine's speed
_RULES: dict[str, Callable[[], Verifier]] = {
    "match": MatchVerifier, "rejection": RejectionVerifier, "block": BlockVerifier, "rrs": RRSVerifier,
    "traversal": TraversalVerifier, "typical": TypicalVerifier,
}  # fmt: skip
_NO_MEMORY = "the memory is not enough for this model: lower --max-context, or choose a smaller one"


def _rule(name: str) -> Verifier:
    return _RULES[name]()


def _same_decoder(decoder: Decoder) -> Decoder:
    return decoder


def _same_module(module: MTPModule) -> MTPModule:
    return module


@final
@dataclass(frozen=True)
class Backend:
    """Parts that suit a device and how it is to be used. The defaults are torch's, for one process.

    attention: makes each step's attention.
    make: what weights become as they are read.
    runner: how steps are run, by how many slots a loop has.
    fuse, fuse_mtp: wrap the main model and its MTP layers.
    verifier: makes the verifier of a rule, by its name.
    ops: makes the drafting operations, by how candidates are picked.
    levels: makes the levels of an MTP module, where trees are grown as far as pays. None: steps have one of a few shapes.
    in_flight: steps that may be queued at a time.
    ring_page, ring_rows: the rings of windows are whole pages of so many rows, and take at least so many rows at a time.
    scratch_tokens: room that the scratch slot needs, in tokens; 0 where there is none.
    usual_chunk, chunk_rows: rows of prompts that are read at once where the user says nothing, and at most.
    packs: whether these rows may be several prompts'.
    kernels: whether caches and processors move rows by kernels.
    advance: see SlotState. None: by torch.
    bucket: how many requests the steps are recorded for that run so many.
    """

    attention: AttentionFactory = TorchAttention
    make: Makers = Makers()  # noqa: RUF009  frozen
    runner: Callable[[int], RunnerFactory] = lambda slots: EagerRunner
    fuse: Callable[[Decoder], Decoder] = _same_decoder
    fuse_mtp: Callable[[MTPModule], MTPModule] = _same_module
    verifier: Callable[[str], Verifier] = _rule
    ops: Callable[[Ranking], DraftOps] = TorchDraftOps
    levels: LevelsFactory | None = None
    in_flight: int = 1
    ring_page: int = 1
    ring_rows: int = 1
    scratch_tokens: int = 0
    usual_chunk: int = 256
    chunk_rows: int = 1 << 30
    packs: bool = True
    kernels: bool = False
    advance: Callable[..., Tensor] | None = None
    bucket: Callable[[int], int] = lambda size: size


def find_device(name: str) -> torch.device:
    """The device of a name; auto is the GPU if there is one. Raises EngineError for one that is not here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name == "cpu" or name in known:
        return torch.device(name)
    if name.split(":")[0] == "cuda" and not gpus:
        raise EngineError(f"device {name}: this torch sees no NVIDIA GPU; use --device cpu, or leave it out")
    raise EngineError(f"device {name!r} is not one that this engine runs on; here are: auto, {', '.join(known)}")


def describe_device(config: EngineConfig) -> str:
    """For people. config: settled, with a device that exists and its dtype."""
    device = torch.device(config.device)
    if device.type != "cuda":
        shared = f", {config.tensor_parallel} processes" if config.tensor_parallel > 1 else ""
        return f"{config.device}{shared}, {pool_size(config.threads)} threads, {config.dtype}"
    if config.tensor_parallel > 1:
        return f"{config.tensor_parallel} x {torch.cuda.get_device_name(device)}, {config.dtype}"
    return f"{config.device} ({torch.cuda.get_device_name(device)}), {config.dtype}, attention {config.attention}"


def make_backend(
    config: EngineConfig, device: torch.device, progress: Progress, group: Group = Group()  # noqa: B008  frozen
) -> Backend:  # fmt: skip
    """Raises EngineError where the kernels that config asks for cannot run here. group: the ranks that share the model."""
    if group.size > 1 and (device.type != "cuda" or config.attention == "torch"):
        return _shared(group, device)
    if device.type != "cuda" and config.attention == "flashinfer":
        raise EngineError("FlashInfer needs an NVIDIA GPU, and this runs on the CPU: leave --attention out")
    if config.dtype == "int8":
        return _native(config)
    if device.type != "cuda":
        return Backend(levels=lambda module: TorchLevels(module, TorchAttention))
    if config.attention == "torch":
        return Backend()
    _check_gpu(device)
    return _kernels_of_a_gpu(config, device, progress, group)


def _shared(group: Group, device: torch.device) -> Backend:
    """For one of the ranks that share a model, by torch's operations."""
    return Backend(
        verifier=lambda rule: ShardedMatchVerifier(group) if rule == "match" else _rule(rule),
        ops=lambda ranking: TorchDraftOps(ranking, group),
        levels=None if device.type == "cuda" else lambda module: TorchLevels(module, TorchAttention),
    )


def _check_gpu(device: torch.device) -> None:
    """Raises EngineError where our kernels cannot run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise EngineError("Triton is missing: install it (pip install triton), or use --attention torch") from None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise EngineError(
            f"{torch.cuda.get_device_name(device)} is of compute capability {capability[0]}.{capability[1]}; the kernels "
            "need 8.0 (Ampere) or above: use --attention torch --dtype fp32"
        )


def _kernels_of_a_gpu(config: EngineConfig, device: torch.device, progress: Progress, group: Group) -> Backend:
    from mtp_engine.attention.exact import MOST_ROWS, exact_attention
    from mtp_engine.drafters.device import DeviceDraftOps
    from mtp_engine.kernels.compiling import wake
    from mtp_engine.kernels.state import advance
    from mtp_engine.models.fused import fuse, fuse_mtp
    from mtp_engine.runtime.cuda_graph import GraphRunner, bucket
    from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS

    wake()  # while weights are read
    attention: AttentionFactory = exact_attention
    refresh = None
    if config.attention == "flashinfer":
        if config.dtype == "fp32":
            raise EngineError("FlashInfer computes in bf16: use --dtype bf16, or --attention exact")
        from mtp_engine.attention.flashinfer import FlashInferAttention

        attention = FlashInferAttention(progress)
        refresh = attention.refresh

    def runner(slots: int) -> RunnerFactory:
        return partial(
            GraphRunner, in_flight=config.steps_in_flight, scratch=slots, device=device, refresh=refresh,
            chunk=config.prefill_chunk or _GPU_CHUNK, progress=progress,
        )  # fmt: skip

    most = bucket(config.max_batch)
    rules: dict[str, Callable[[], Verifier]] = {
        **_RULES, "match": lambda: DeviceMatchVerifier(most, device), "rrs": DeviceRRSVerifier,
        "rejection": DeviceRRSVerifier,
    }  # fmt: skip
    if group.size > 1:
        rules["match"] = lambda: DeviceShardedMatchVerifier(group, most, device)
    return Backend(
        attention=attention,
        runner=runner,
        fuse=fuse,
        fuse_mtp=fuse_mtp,
        verifier=lambda rule: rules[rule](),
        ops=lambda ranking: DeviceDraftOps(most, device, ranking, group),
        in_flight=config.steps_in_flight,
        ring_page=config.page_size,
        ring_rows=MOST_ROWS,
        scratch_tokens=SCRATCH_TOKENS,
        usual_chunk=_GPU_CHUNK,
        kernels=True,
        advance=advance,
        bucket=bucket,
    )


def _native(config: EngineConfig) -> Backend:
    """int8 on a CPU. Raises EngineError where the library cannot be made."""
    from mtp_engine.attention.native import NativeAttention
    from mtp_engine.drafters.native import NativeDraftOps, NativeLevels
    from mtp_engine.kernels.cpu.build import NoCompiler
    from mtp_engine.kernels.cpu.calls import PackedLinear, PackedStack, Team
    from mtp_engine.models.native import NativeMTP, fuse, fuse_mtp

    try:
        team = Team(pool_size(config.threads), _kernels())
    except NoCompiler as error:
        raise EngineError(f"{error}; or use --dtype fp32") from None
    torch.set_num_threads(1)  # what is left to torch is small, and its threads would wait for the team's
    linear = partial(PackedLinear, team)
    return Backend(
        attention=NativeAttention,
        make=Makers(linear, lambda weight: PackedStack([linear(each) for each in weight])),
        fuse=partial(fuse, team=team),
        fuse_mtp=partial(fuse_mtp, team=team),
        verifier=lambda rule: NativeMatchVerifier(team) if rule == "match" else _rule(rule),
        ops=lambda ranking: NativeDraftOps(team) if ranking == "noise" else TorchDraftOps(ranking),
        levels=lambda module: NativeLevels(cast(NativeMTP, module), team),
        advance=team.advance,
        packs=False,  # beyond 16 rows the library's time is that of its rows
    )


def _kernels() -> Path:
    return cache_root() / "kernels"


def cannot_compile() -> str:
    """Why the CPU's library cannot be made; empty if it can, and then it is made."""
    from mtp_engine.kernels.cpu.build import NoCompiler, compiled

    try:
        compiled(_kernels())
    except NoCompiler as error:
        return f"int8 needs a library that is compiled on first use, but {error}"
    return ""


def check_tree(shape: TreeShape, config: EngineConfig, device: str) -> None:
    """Raises EngineError for a tree that the drafting kernels cannot grow. device: its type, such as "cuda".

    Candidates ranked otherwise than by noise are picked by torch operations where a tree is too wide for the kernels.
    """
    kernels = device == "cuda" and config.attention != "torch" and config.ranking == "noise"
    widest = max(shape.widths, default=0)  # tree:N is made to fit, see level_sizes
    if kernels and widest > MOST_CHILDREN:
        raise EngineError(
            f"tree shape {shape} gives a node {widest} children, and the GPU's kernels take at most {MOST_CHILDREN}: use a "
            "narrower tree, or --attention torch"
        )


@contextmanager
def gpu_errors() -> Iterator[None]:
    """What CUDA says, and what a full memory says, as something the user can act on."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise EngineError(explain(error)) from error
    except MemoryError as error:
        raise EngineError(f"{_NO_MEMORY} ({error})") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise EngineError(f"{_NO_MEMORY} ({str(error).splitlines()[0]})") from error
