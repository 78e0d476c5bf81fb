"""Putting an engine's parts together: caches, drafter, decode loop. The only place, with backend.py, that names them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from mtp_engine.attention.rows import AttentionFactory
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.backend import Backend
from mtp_engine.cache import HybridKV
from mtp_engine.config import MAX_TREE_NODES, EngineConfig, ModelConfig, Structure
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Drafter, Progress, TargetModel, Verifier
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.slots import SlotState
from mtp_engine.runtime.step import EagerRunner, ModelStep, RunnerFactory
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import NewDecoder
from mtp_engine.sampling.structure import Grammars
from mtp_engine.text.tokenizer import Tokenizer

_KV_BUDGET = 4 << 30  # bytes; the default cache holds a full context per slot up to this


def kv_tokens(model: ModelConfig, config: EngineConfig, slots: int) -> int:
    context = config.max_context or model.max_context
    if config.kv_tokens:
        return config.kv_tokens
    each = sum(
        a.kv_heads * (a.qk_dim + a.v_dim) * (2 if config.dtype == "bf16" else 4)
        for a in (layer.attention for layer in model.layers)
        if a.window is None
    )
    return min(slots * context, max(context, _KV_BUDGET // max(each, 1))) + slots * (
        2 * MAX_TREE_NODES + config.page_size
    )


def make_loop(
    model: Decoder, drafter: Drafter, config: EngineConfig, backend: Backend, *, slots: int, tokenizer: Tokenizer | None
) -> DecodeLoop:
    """Without a tokenizer a loop has no texts, no structures, and no tokens that end a text."""
    if isinstance(drafter, MTPDrafter):
        model = replace(model, features=drafter.module.config.features)
    layers, embedding = [layer.attention for layer in model.config.layers], model.embedding
    eos = tokenizer.eos_ids if tokenizer else ()
    cache = HybridKV(
        layers, slots=slots + 1, page_size=config.page_size, ring_page=backend.ring_page,
        tokens=kv_tokens(model.config, config, slots) + backend.scratch_tokens + config.page_size,
        max_nodes=max(drafter.max_nodes, backend.ring_rows), kernels=backend.kernels,
        dtype=embedding.dtype, device=embedding.device,
    )  # fmt: skip
    if backend.scratch_tokens:
        cache.reserve(slots, backend.scratch_tokens)
        drafter.reserve(slots, backend.scratch_tokens)
    return decode_loop(
        model, cache, drafter, backend.verifier(config.verifier), slots=slots, eos_token_ids=eos,
        max_context=config.max_context or model.config.max_context, max_waiting=config.max_waiting,
        prefill_chunk=min(config.prefill_chunk, backend.chunk_rows),
        device=embedding.device, attention=backend.attention, runner=backend.runner(slots), kernels=backend.kernels,
        text=tokenizer.stream if tokenizer else None, spell=tokenizer.spellings if tokenizer else None,
        grammars=Grammars(tokenizer.folder, model.config.vocab_size, eos).start if tokenizer else None,
    )  # fmt: skip


def decode_loop(
    model: TargetModel, cache: HybridKV, drafter: Drafter, verifier: Verifier, *, slots: int, max_context: int,
    eos_token_ids: Sequence[int], prefill_chunk: int, device: torch.device, max_waiting: int = 1024,
    attention: AttentionFactory = TorchAttention, runner: RunnerFactory = EagerRunner, kernels: bool = False,
    text: NewDecoder | None = None, spell: Callable[[str], Iterable[Sequence[int]]] | None = None,
    grammars: Callable[[Structure], Constraint] | None = None, clock: Callable[[], float] = time.monotonic,
) -> DecodeLoop:  # fmt: skip
    """A loop of given parts. text, spell, grammars: see Intake. clock: seconds, for timeouts."""
    work = ModelStep(  # the last slot is scratch, with which runners pad batches
        model, cache, drafter, verifier, Processors(slots=slots + 1, eos_token_ids=eos_token_ids, device=device),
        SlotState(slots + 1, device, kernels=kernels), attention, device,
    )  # fmt: skip
    runs = runner(work)
    work.ahead = drafter.max_nodes * runs.in_flight  # rows of steps that run past the end
    intake = Intake(model.vocab_size, max_context, work.capacity, frozenset(eos_token_ids), text, spell, grammars)
    scheduler = Scheduler(work, slots=slots, chunk=prefill_chunk, max_waiting=max_waiting, clock=clock)
    return DecodeLoop(work, runs, scheduler, intake)


def make_drafter(
    files: ModelFiles, model: Decoder, config: EngineConfig, backend: Backend, progress: Progress
) -> Drafter:
    if config.drafter == "root" or config.tree is None:
        return RootDrafter()
    slots = config.max_batch + 1  # the last is scratch
    if config.drafter == "ngram":
        length, device = len(config.tree.widths), model.embedding.device
        return NgramDrafter(length, slots=slots, max_context=config.max_context, device=device)
    assert files.mtp_folder is not None, "checked in _settle"
    module = loader.load_mtp(
        files.mtp_folder, model, config.draft_vocab, progress,
        dequantize=config.dequantize, window_keys=config.window_keys, rounded=config.draft_int8,
    )  # fmt: skip
    return mtp_drafter(module, model.config, config, backend)


def mtp_drafter(module: MTPModule, model: ModelConfig, config: EngineConfig, backend: Backend) -> MTPDrafter:
    """The drafter of a main model's MTP layers, for config.tree."""
    assert config.tree is not None
    slots = config.max_batch + 1  # the last is scratch
    return MTPDrafter(
        backend.fuse_mtp(module), config.tree, slots=slots, page_size=config.page_size, attention=backend.attention,
        tokens=kv_tokens(model, config, slots) + backend.scratch_tokens, ops=backend.ops(config.ranking),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows,
    )  # fmt: skip
