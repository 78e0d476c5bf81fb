"""The decode loop of a model and a drafter: caches, memory, scheduler, and the step that they serve."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtp_engine.assemble.backend import Backend
from mtp_engine.attention.rows import AttentionFactory
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import MAX_TREE_NODES, EngineConfig, ModelConfig, Structure
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter
from mtp_engine.models.decoder import Decoder
from mtp_engine.protocols import Drafter, StepPlanner, TargetModel, TreePlanner, Verifier
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.memory import Memory
from mtp_engine.runtime.ranks import Alone, Ranks
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.slots import SlotState
from mtp_engine.runtime.step import EagerRunner, ModelStep, RunnerFactory
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import NewDecoder
from mtp_engine.sampling.structure import Grammars
from mtp_engine.text.tokenizer import Tokenizer

_KV_BUDGET = 4 << 30  # bytes; the default cache holds a full context per slot up to this, and what is kept besides


def kv_tokens(model: ModelConfig, config: EngineConfig, slots: int) -> int:
    """How many tokens the paged KV cache holds: what config asks for, or full contexts as far as the budget goes, and what the
    prefix cache keeps."""
    context = config.max_context or model.max_context
    if config.kv_tokens:
        return config.kv_tokens
    each = sum(
        a.kv_size * (2 if config.dtype == "bf16" else 4)
        for a in (layer.attention for layer in model.layers)
        if a.window is None
    )
    running = min(slots * context, max(context, _KV_BUDGET // max(each, 1)))
    kept = prefix_bytes(config) // each if each else 0
    return running + kept + slots * (2 * MAX_TREE_NODES + config.page_size)


def prefix_bytes(config: EngineConfig) -> int:
    """The size of the prefix cache in bytes; 0 where there is none."""
    return int(config.prefix_cache_gb * 1e9) if config.prefix_cache else 0


def make_loop(
    model: Decoder, drafter: Drafter, config: EngineConfig, backend: Backend, *, slots: int, tokenizer: Tokenizer | None,
    ranks: Ranks = Alone(),  # noqa: B008  it holds nothing
) -> DecodeLoop:  # fmt: skip
    """The loop that config and backend ask for. config: settled. slots: how many requests run at a time, in place of its
    max_batch. Without a tokenizer a loop has no texts, no structures, and no tokens that end a text."""
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
        model, cache, drafter, verifier, processors, state, attention, device, planner, kernels, shapes, shares
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
