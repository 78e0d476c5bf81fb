"""What drafting and verifying cost on this machine: measured when a model is first loaded, kept for the next time."""

import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch

from mtp_engine.assemble.backend import Backend
from mtp_engine.assemble.loop import decode_loop
from mtp_engine.assemble.mtp import mtp_drafter
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import AUTO_NODES, EngineConfig, SamplingParams, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.hub.cache import cache_root
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.hub.identity import weights_identity
from mtp_engine.kernels.cpu.build import processor
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Progress
from mtp_engine.runtime import kept
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.planner import Costs, Planner
from mtp_engine.runtime.shapes import ShapeCosts, ShapePlanner
from mtp_engine.runtime.timing import time_shapes

C = TypeVar("C", Costs, ShapeCosts)
_VERSION = 3  # of what is kept
_ROUNDS = 20  # of steps with each tree that are timed at most; the best ones count
_TIMED_CONTEXT = 128  # tokens that it takes to time shapes; where there are fewer the largest is taken


def draft_costs(
    files: ModelFiles, model: Decoder, module: MTPModule, config: EngineConfig, backend: Backend, progress: Progress
) -> Costs:
    """What steps of one request cost, from an earlier start or measured now. model: not fused. module: its MTP layers, fused."""
    drafting = len(module.draft_ids), config.draft_int8, config.window_keys
    path = _plans(files, processor(), config.dtype, config.threads, *drafting, *_besides(config))

    def measure() -> Costs:
        progress("timing drafts", 0, None)
        fused = backend.fuse(replace(model, features=module.config.features))
        return measured_costs(fused, module, config, backend, model.group)

    return _agreed(Costs, path, measure, model)


def learn_costs(
    loop: DecodeLoop, model: Decoder, files: ModelFiles, config: EngineConfig, backend: Backend, progress: Progress
) -> None:
    """Let a loop that has recorded its steps know what they cost, from its own timing or an earlier one here."""
    planner = loop.work.shapes
    if not isinstance(planner, ShapePlanner) or loop.intake.max_context < _TIMED_CONTEXT:
        return
    batches = sorted({backend.bucket(size) for size in range(1, config.max_batch + 1)})
    names = [(batch, str(plan)) for batch in batches for plan in planner.plans(batch)]
    device = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else processor()
    about = device, config.dtype, config.max_context, config.draft_vocab, config.prefill_chunk, names, *_besides(config)

    def measure() -> ShapeCosts:
        with loop.alike():
            time_shapes(loop, planner, batches, min(config.prefill_chunk, backend.chunk_rows), progress)
        return planner.costs

    planner.know(_agreed(ShapeCosts, _plans(files, *about), measure, model))


def measured_costs(
    model: Decoder, module: MTPModule, config: EngineConfig, backend: Backend, group: Group = Group()  # noqa: B008
) -> Costs:  # fmt: skip
    """What drafting and verifying cost here, by a loop of its own that decodes nonsense; in two seconds, or somewhat more
    where a step takes long. model, module: fused. group: those who share them; all must measure together."""
    depth, tokens, seconds = module.config.depth, 512, 2.0
    planner = Planner(Costs([0.0] * (depth + 1), {}))
    config = replace(config, max_batch=1, tree=TreeShape.parse("auto"), verifier="match", candidates="auto")
    drafter = mtp_drafter(module, config, backend, planner)
    pages = Pages(slots=2, tokens=2 * tokens, page_size=16, device=model.embedding.device)
    cache = HybridKV(
        [layer.attention for layer in model.config.layers], pages, max_nodes=drafter.max_nodes, behind=drafter.depth + 1,
        dtype=model.embedding.dtype,
    )  # fmt: skip
    loop = decode_loop(
        model, cache, drafter, backend.verifier("match"), slots=1, max_context=tokens, eos_token_ids=(), prefill_chunk=64,
        device=model.embedding.device, attention=backend.attention, packs=backend.packs, planner=planner,
        shares=group.size > 1,
    )  # fmt: skip
    request = loop.add(
        [number % model.vocab_size for number in range(7, 71)], SamplingParams(max_tokens=tokens - 100, ignore_eos=True)
    )
    chains = [(levels, 1, levels) for levels in range(depth + 1)]
    end = time.perf_counter() + seconds
    for number in range(_ROUNDS):  # in turns, so that a disturbance is no single tree's
        for planner.forced in [*chains, (depth, AUTO_NODES, AUTO_NODES), (depth, 3, 7)]:
            count = request.stats.steps
            while request.stats.steps == count:
                loop.step()
                if request.finish_reason:
                    raise EngineError(f"a trial of the model failed: {request.error or request.finish_reason}")
        if not number:
            planner.tried.clear()  # it was to warm up
        elif group.first(b"enough" if time.perf_counter() > end else b"", model.embedding.device):
            break
    loop.close()
    return Costs.best_of(planner.tried)


def _agreed(kind: type[C], path: Path, measure: Callable[[], C], model: Decoder) -> C:
    """What an earlier start left in `path`, or what is measured now and left there. All ranks measure together, and go by what
    rank 0 has."""
    group, device = model.group, model.embedding.device
    known = kept.read(kind, path)
    if text := group.first(known.text().encode() if known else b"", device):
        return kind.parse(text.decode())
    measured = kind.parse(group.first(measure().text().encode(), device).decode())
    if not group.shard.rank:
        kept.write(measured, path)
    return measured


def _plans(files: ModelFiles, *about: object) -> Path:
    """Where what was measured with a model's weights is kept. about: what else it depends on."""
    key = (_VERSION, torch.__version__, weights_identity(files), *about)
    return cache_root() / "plans" / f"{sha256(repr(key).encode()).hexdigest()[:16]}.json"


def _besides(config: EngineConfig) -> tuple[int | str, ...]:
    """What costs depend on that is seldom set: how many processes they are of, and how experts are held."""
    ranks = (config.tensor_parallel,) if config.tensor_parallel > 1 else ()
    return ranks if config.experts == "auto" else (*ranks, config.experts)
