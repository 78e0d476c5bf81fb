"""Putting an engine's parts together: caches, drafter, decode loop. The only place, with backend.py, that names them."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.backend import Backend
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import (
    AUTO_NODES,
    MAX_TREE_NODES,
    EngineConfig,
    ModelConfig,
    SamplingParams,
    Structure,
    TreeShape,
)
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.hub.cache import cache_root
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.hub.identity import weights_identity
from mtp_engine.kernels.cpu.build import processor
from mtp_engine.kernels.linear import rounded_linear
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.weights import Makers
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Drafter, Progress, StepPlanner, TargetModel, TreePlanner, Verifier
from mtp_engine.runtime import kept
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.memory import Memory
from mtp_engine.runtime.planner import Costs, Planner
from mtp_engine.runtime.ranks import Alone, Ranks
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.shapes import Offer, ShapeCosts, ShapePlanner
from mtp_engine.runtime.slots import SlotState
from mtp_engine.runtime.step import EagerRunner, ModelStep, RunnerFactory
from mtp_engine.runtime.timing import time_shapes
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import NewDecoder
from mtp_engine.sampling.structure import Grammars
from mtp_engine.text.tokenizer import Tokenizer

_LOG = logging.getLogger("mtp_engine")
C = TypeVar("C", Costs, ShapeCosts)
_COSTS = 3  # version of what is kept of them
_ROUNDS = 20  # of steps with each tree that are timed at most; the best ones count
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
_SHAPES = (  # beside a chain of all levels: on a GPU, what steps of so many requests at least, and at most, may draft
    (TreeShape.parse("chain:1"), 24, 1 << 30),
    (TreeShape.parse("tree:7"), 1, 32),
    (TreeShape.parse("tree:15"), 1, 8),
)
_TIMED_CONTEXT = 128  # tokens that it takes to time shapes; where there are fewer the largest is taken
_LATE = 32  # rows that MTP layers may have to come after steps without drafts
_KV_BUDGET = 4 << 30  # bytes; the default cache holds a full context per slot up to this, and what is kept besides


def kv_tokens(model: ModelConfig, config: EngineConfig, slots: int) -> int:
    context = config.max_context or model.max_context
    if config.kv_tokens:
        return config.kv_tokens
    each = sum(
        a.kv_heads * (a.qk_dim + a.v_dim) * (2 if config.dtype == "bf16" else 4)
        for a in (layer.attention for layer in model.layers)
        if a.window is None
    )
    running = min(slots * context, max(context, _KV_BUDGET // max(each, 1)))
    kept = prefix_bytes(config) // each if each else 0
    return running + kept + slots * (2 * MAX_TREE_NODES + config.page_size)


def prefix_bytes(config: EngineConfig) -> int:
    """Of the prefix cache; 0 where there is none."""
    return int(config.prefix_cache_gb * 1e9) if config.prefix_cache else 0


def make_loop(
    model: Decoder, drafter: Drafter, config: EngineConfig, backend: Backend, *, slots: int, tokenizer: Tokenizer | None,
    ranks: Ranks = Alone(),  # noqa: B008  it holds nothing
) -> DecodeLoop:  # fmt: skip
    """Without a tokenizer a loop has no texts, no structures, and no tokens that end a text."""
    if isinstance(drafter, (MTPDrafter, LazyMTPDrafter)):
        model = replace(model, features=drafter.module.config.features)
    layers, embedding = [layer.attention for layer in model.config.layers], model.embedding
    eos = tokenizer.eos_ids if tokenizer else ()
    tokens = kv_tokens(model.config, config, slots) + backend.scratch_tokens + config.page_size
    pages = Pages(slots=slots + 1, tokens=tokens, page_size=config.page_size, device=embedding.device)
    cache = HybridKV(
        layers, pages, ring_page=backend.ring_page, max_nodes=max(drafter.max_nodes, backend.ring_rows),
        behind=backend.in_flight * (drafter.depth + 1), kernels=backend.kernels, dtype=embedding.dtype,
    )  # fmt: skip
    pages.reserve(slots, backend.scratch_tokens)
    return decode_loop(
        model, cache, drafter, backend.verifier(config.verifier), slots=slots, eos_token_ids=eos,
        max_context=config.max_context or model.config.max_context, max_waiting=config.max_waiting,
        prefill_chunk=min(config.prefill_chunk or backend.usual_chunk, backend.chunk_rows),
        packs=backend.packs, prefix_bytes=prefix_bytes(config), share_pages=backend.kernels,
        device=embedding.device, attention=backend.attention, runner=backend.runner(slots), kernels=backend.kernels,
        advance=backend.advance,
        text=tokenizer.stream if tokenizer else None, spell=tokenizer.spellings if tokenizer else None,
        grammars=Grammars(tokenizer.folder, model.config.vocab_size, eos).start if tokenizer else None,
        planner=drafter.planner if isinstance(drafter, LazyMTPDrafter) else None,
        shapes=drafter.planner if isinstance(drafter, MTPDrafter) else None,
        ranks=ranks, shares=config.tensor_parallel > 1 and config.verifier == "match",
    )  # fmt: skip


def decode_loop(
    model: TargetModel, cache: HybridKV, drafter: Drafter, verifier: Verifier, *, slots: int, max_context: int,
    eos_token_ids: Sequence[int], prefill_chunk: int, device: torch.device, max_waiting: int = 1024,
    packs: bool = True, prefix_bytes: int = 0, share_pages: bool = False,
    attention: AttentionFactory = TorchAttention, runner: RunnerFactory = EagerRunner, kernels: bool = False,
    advance: Callable[..., Tensor] | None = None,
    text: NewDecoder | None = None, spell: Callable[[str], Iterable[Sequence[int]]] | None = None,
    grammars: Callable[[Structure], Constraint] | None = None, clock: Callable[[], float] = time.monotonic,
    planner: TreePlanner | None = None, shapes: StepPlanner | None = None,
    ranks: Ranks = Alone(), shares: bool = False,  # noqa: B008  it holds nothing
) -> DecodeLoop:  # fmt: skip
    """A loop of given parts. text, spell, grammars: see Intake. clock: seconds, for timeouts. packs: see Scheduler.
    prefix_bytes, share_pages: see Memory. planner, shapes: the drafter's, if it has one. advance: see SlotState. shares: see
    ModelStep."""
    drafter.attach(cache.pages, cache.behind)
    processors = Processors(
        slots=slots + 1, vocab=model.vocab_size, eos_token_ids=eos_token_ids, device=device, kernels=kernels
    )
    state = SlotState(slots + 1, device, advance)  # the last slot is scratch, with which runners pad batches
    work = ModelStep(
        model,
        cache,
        drafter,
        verifier,
        processors,
        state,
        attention,
        device,
        planner,
        kernels,
        shapes,
        shares,
    )
    runs = runner(work)
    rows = max(drafter.max_nodes, drafter.scratch_rows if drafter.cache and drafter.cache.paged else 0)
    memory = Memory(
        cache, drafter, processors, state, chunk=prefill_chunk, prefix_bytes=prefix_bytes, shares=share_pages,
        ahead=rows + drafter.max_nodes * (runs.in_flight - 1),
    )  # fmt: skip
    intake = Intake(model.vocab_size, max_context, memory.capacity, frozenset(eos_token_ids), text, spell, grammars)
    scheduler = Scheduler(
        memory, slots=slots, chunk=prefill_chunk, max_waiting=max_waiting, packs=packs, clock=clock,
        pace=shapes.rows if shapes else lambda: None, dismissing=ranks.ending,
    )  # fmt: skip
    return DecodeLoop(work, runs, scheduler, intake, memory, ranks)


def load_main(
    files: ModelFiles, config: EngineConfig, backend: Backend, progress: Progress, group: Group = Group()  # noqa: B008
) -> Decoder:  # fmt: skip
    return loader.load_main(
        files.folder, _DTYPES[config.dtype], torch.device(config.device), progress,
        dequantize=config.dequantize or config.dtype == "int8", window_keys=config.window_keys, experts=config.experts,
        make=backend.make, group=group,
    )  # fmt: skip


def make_drafter(
    files: ModelFiles, model: Decoder, config: EngineConfig, backend: Backend, progress: Progress
) -> Drafter:
    """model: not fused yet."""
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
    drafting = len(module.draft_ids), config.draft_int8, config.window_keys
    path = _plans(files, processor(), config.dtype, config.threads, *drafting, *_besides(config))

    def measure() -> Costs:
        progress("timing drafts", 0, None)
        fused = backend.fuse(replace(model, features=module.config.features))
        return measured_costs(fused, module, config, backend, model.group)

    costs = _agreed(Costs, path, measure, model)
    if costs.hopeless:
        _LOG.info(
            "nothing is drafted: it would gain too little here even if every draft were accepted; --tree chain:3 drafts"
        )
        return RootDrafter()
    return mtp_drafter(module, config, backend, Planner(costs))


def _besides(config: EngineConfig) -> tuple[int | str, ...]:
    """What costs depend on that is seldom set: how many processes they are of, and how experts are held."""
    ranks = (config.tensor_parallel,) if config.tensor_parallel > 1 else ()
    return ranks if config.experts == "auto" else (*ranks, config.experts)


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
    key = (_COSTS, torch.__version__, weights_identity(files), *about)
    return cache_root() / "plans" / f"{sha256(repr(key).encode()).hexdigest()[:16]}.json"


def shaped_drafter(module: MTPModule, config: EngineConfig, backend: Backend) -> MTPDrafter:
    """One whose steps take one of a few shapes, or none, as a planner says. It knows nothing of their costs yet."""
    depth = module.config.depth
    chain = TreeShape(widths=(1,) * depth)
    others = [(shape, least, most) for shape, least, most in _SHAPES if shape != chain]
    offers = [Offer(chain, depth + 1), *(Offer(shape, shape.max_nodes, *batches) for shape, *batches in others)]
    planner = ShapePlanner(
        sorted(offers, key=lambda offer: offer.nodes),
        depth=depth,
        room=_LATE,
        costs=ShapeCosts(),
        bucket=backend.bucket,
    )
    return MTPDrafter(
        module, chain, slots=config.max_batch + 1, attention=backend.attention, ops=backend.ops("noise"),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows, others=[shape for shape, *_ in others], late=_LATE,
        planner=planner,
    )  # fmt: skip


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


def mtp_drafter(
    module: MTPModule, config: EngineConfig, backend: Backend, planner: Planner | None = None
) -> MTPDrafter | LazyMTPDrafter:
    """The drafter of a main model's MTP layers, fused, for config.tree."""
    assert config.tree is not None
    slots = config.max_batch + 1  # the last is scratch
    if backend.levels and config.ranking == "noise":
        return LazyMTPDrafter(module, config.tree, backend.levels, slots=slots, planner=planner)
    return MTPDrafter(
        module, config.tree, slots=slots, attention=backend.attention, ops=backend.ops(config.ranking),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows,
    )  # fmt: skip


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
