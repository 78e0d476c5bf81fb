"""What the engine runs on: torch alone, or kernels and CUDA graphs. Chosen once, when a model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch

from mtp_engine.attention import AttentionFactory, TorchAttention
from mtp_engine.config import EngineConfig
from mtp_engine.decode_loop import Draft, EagerRunner, Runner, Verify
from mtp_engine.errors import EngineError
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule

RunnerFactory = Callable[[Draft, Verify], Runner]


def _same_decoder(decoder: Decoder) -> Decoder:
    return decoder


def _same_module(module: MTPModule) -> MTPModule:
    return module


@final
@dataclass(frozen=True)
class Backend:
    """attention: makes each step's attention. runner: for a loop of so many slots. fuse, fuse_mtp: wrap the modules.

    ring_page, ring_rows: rings are whole pages and take at least so many rows at a time. scratch_tokens: room that the
    scratch slot needs; 0 = there is none.
    """

    attention: AttentionFactory = TorchAttention
    runner: Callable[[int], RunnerFactory] = lambda slots: EagerRunner
    fuse: Callable[[Decoder], Decoder] = _same_decoder
    fuse_mtp: Callable[[MTPModule], MTPModule] = _same_module
    ring_page: int = 1
    ring_rows: int = 1
    scratch_tokens: int = 0


def make_backend(config: EngineConfig, device: torch.device) -> Backend:
    """Raises EngineError where the kernels that config asks for cannot run here."""
    if device.type != "cuda" or config.attention == "torch":
        return Backend()
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
    from mtp_engine.cuda_attention import MOST_ROWS, exact_attention
    from mtp_engine.cuda_graph import SCRATCH_TOKENS, GraphRunner
    from mtp_engine.models.fused import fuse, fuse_mtp

    def runner(slots: int) -> RunnerFactory:
        return partial(GraphRunner, in_flight=config.steps_in_flight, scratch=slots, device=device)

    return Backend(
        exact_attention, runner, fuse, fuse_mtp,
        ring_page=config.page_size, ring_rows=MOST_ROWS, scratch_tokens=SCRATCH_TOKENS,
    )  # fmt: skip
