"""The parts of an engine: main model, drafter, decode loop, tokenizer."""

import logging
from dataclasses import dataclass, replace
from typing import final

import torch

from mtp_engine.assemble.backend import Backend, make_backend
from mtp_engine.assemble.costs import draft_costs, learn_costs
from mtp_engine.assemble.loop import make_loop
from mtp_engine.assemble.mtp import mtp_drafter, shaped_drafter
from mtp_engine.config import EngineConfig
from mtp_engine.drafters import NgramDrafter, RootDrafter
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.kernels.linear import rounded_linear
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.weights import Makers
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Drafter, Progress
from mtp_engine.runtime.lead import Team
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.planner import Planner
from mtp_engine.text.tokenizer import Tokenizer

_LOG = logging.getLogger("mtp_engine")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


@final
@dataclass(frozen=True)
class Parts:
    """What an engine, or one rank of it, consists of. model: as the loop runs it. config: settled, with its prefill_chunk.
    captured: what capturing CUDA graphs took, in words; empty where none were."""

    model: Decoder
    loop: DecodeLoop
    tokenizer: Tokenizer
    config: EngineConfig
    backend: Backend
    captured: str


def make_parts(files: ModelFiles, config: EngineConfig, team: Team, progress: Progress) -> Parts:
    """Load a model and make ready to run it. config: settled. All ranks of the team do this together."""
    device, group = torch.device(config.device), team.group
    tokenizer = Tokenizer.load(files.folder)
    backend = make_backend(config, device, progress, group)
    config = replace(config, prefill_chunk=config.prefill_chunk or backend.usual_chunk)
    model = load_main(files, config, backend, progress, group)
    drafter = make_drafter(files, model, config, backend, progress)
    model = backend.fuse(model)
    loop = make_loop(model, drafter, config, backend, slots=config.max_batch, tokenizer=tokenizer, ranks=team.ranks())
    captured = ""
    if config.capture == "load":
        with torch.inference_mode():
            captured = loop.runner.capture(config.max_batch, loop.intake.max_context, progress)
        learn_costs(loop, model, files, config, backend, progress)
    group.join(torch.zeros(1, device=device))  # when all have come so far
    return Parts(model, loop, tokenizer, config, backend, captured)


def load_main(
    files: ModelFiles, config: EngineConfig, backend: Backend, progress: Progress, group: Group = Group()  # noqa: B008
) -> Decoder:  # fmt: skip
    """The main model, not fused yet. group: the ranks that share it, each of which reads its part."""
    return loader.load_main(
        files.folder, _DTYPES[config.dtype], torch.device(config.device), progress,
        dequantize=config.dequantize or config.dtype == "int8", window_keys=config.window_keys, experts=config.experts,
        make=backend.make, group=group,
    )  # fmt: skip


def make_drafter(
    files: ModelFiles, model: Decoder, config: EngineConfig, backend: Backend, progress: Progress
) -> Drafter:
    """Who proposes tokens. model: not fused yet, as `load_main` returns it. config: settled. A tree that plans itself has its
    costs measured here, unless they are known, and nothing drafts where that cannot pay."""
    if config.drafter == "root" or config.tree is None:
        return RootDrafter()
    slots = config.max_batch + 1  # the last is scratch
    if config.drafter == "ngram":
        length, device = len(config.tree.widths), model.embedding.device
        return NgramDrafter(length, slots=slots, max_context=config.max_context, device=device)
    assert files.mtp_folder is not None, "checked in settle"
    assert config.draft_vocab is not None, "filled in by settle"
    rounds = config.draft_int8 and config.dtype == "fp32"
    module = loader.load_mtp(
        files.mtp_folder, model, config.draft_vocab, progress,
        dequantize=config.dequantize or config.dtype == "int8", window_keys=config.window_keys,
        make=Makers(linear=rounded_linear) if rounds else backend.make, shared_head=not rounds,
    )  # fmt: skip
    module = backend.fuse_mtp(module)
    if not config.tree.auto:
        return mtp_drafter(module, config, backend)
    if not backend.levels:
        return shaped_drafter(module, config, backend)
    costs = draft_costs(files, model, module, config, backend, progress)
    if costs.hopeless:
        _LOG.info(
            "nothing is drafted: it would gain too little here even if every draft were accepted; --tree chain:3 drafts"
        )
        return RootDrafter()
    return mtp_drafter(module, config, backend, Planner(costs))
