"""Putting an engine's parts together: caches, drafter, decode loop. The only place, with backend.py, that names them."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

import torch

from mtp_engine.attention.rows import AttentionFactory
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.backend import Backend, check_tree
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import MAX_TREE_NODES, EngineConfig, ModelConfig, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.hub.cache import cache_root
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Drafter, Progress, TargetModel, Verifier
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.memory import Memory
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.slots import SlotState
from mtp_engine.runtime.step import EagerRunner, ModelStep, RunnerFactory
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import NewDecoder
from mtp_engine.sampling.structure import Grammars
from mtp_engine.text.tokenizer import Tokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RULE_TREES = {
    rule: TreeShape.parse(tree)
    for rule, tree in (("rejection", "chain:3"), ("block", "chain:3"), ("rrs", "4x2x2"), ("traversal", "4x2x2"))
}
_DEFAULT_TREES = {  # what measured fastest, see bench/LOG.md
    "cpu": {"mtp": TreeShape.parse("tree:7"), "ngram": TreeShape.parse("chain:4")},
    "cuda": {"mtp": TreeShape.parse("tree:15"), "ngram": TreeShape.parse("chain:4")},
}
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
    model: Decoder, drafter: Drafter, config: EngineConfig, backend: Backend, *, slots: int, tokenizer: Tokenizer | None
) -> DecodeLoop:
    """Without a tokenizer a loop has no texts, no structures, and no tokens that end a text."""
    if isinstance(drafter, MTPDrafter):
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
        prefix_bytes=prefix_bytes(config), share_pages=backend.kernels,
        device=embedding.device, attention=backend.attention, runner=backend.runner(slots), kernels=backend.kernels,
        text=tokenizer.stream if tokenizer else None, spell=tokenizer.spellings if tokenizer else None,
        grammars=Grammars(tokenizer.folder, model.config.vocab_size, eos).start if tokenizer else None,
    )  # fmt: skip


def decode_loop(
    model: TargetModel, cache: HybridKV, drafter: Drafter, verifier: Verifier, *, slots: int, max_context: int,
    eos_token_ids: Sequence[int], prefill_chunk: int, device: torch.device, max_waiting: int = 1024,
    prefix_bytes: int = 0, share_pages: bool = False,
    attention: AttentionFactory = TorchAttention, runner: RunnerFactory = EagerRunner, kernels: bool = False,
    text: NewDecoder | None = None, spell: Callable[[str], Iterable[Sequence[int]]] | None = None,
    grammars: Callable[[Structure], Constraint] | None = None, clock: Callable[[], float] = time.monotonic,
) -> DecodeLoop:  # fmt: skip
    """A loop of given parts. text, spell, grammars: see Intake. clock: seconds, for timeouts. prefix_bytes, share_pages:
    see Memory."""
    drafter.attach(cache.pages, cache.behind)
    processors = Processors(slots=slots + 1, eos_token_ids=eos_token_ids, device=device)
    state = SlotState(slots + 1, device, kernels=kernels)  # the last slot is scratch, with which runners pad batches
    work = ModelStep(model, cache, drafter, verifier, processors, state, attention, device)
    runs = runner(work)
    rows = max(drafter.max_nodes, drafter.scratch_rows if drafter.cache and drafter.cache.paged else 0)
    memory = Memory(
        cache, drafter, processors, state, vocab=model.vocab_size, chunk=prefill_chunk, prefix_bytes=prefix_bytes,
        shares=share_pages, ahead=rows + drafter.max_nodes * (runs.in_flight - 1),
    )  # fmt: skip
    intake = Intake(model.vocab_size, max_context, memory.capacity, frozenset(eos_token_ids), text, spell, grammars)
    scheduler = Scheduler(memory, slots=slots, chunk=prefill_chunk, max_waiting=max_waiting, clock=clock)
    return DecodeLoop(work, runs, scheduler, intake, memory)


def settle(config: EngineConfig, files: ModelFiles) -> EngineConfig:
    """Fill in what depends on the model, and refuse what does not fit it, before any weight is read."""
    model = loader.read_config(files.folder, config.window_keys)
    if config.max_context > model.max_context:
        raise EngineError(f"max_context is {config.max_context}; {files.name} was made for {model.max_context} tokens")
    device = torch.device(config.device).type
    if config.dtype == "auto":
        config = replace(config, dtype="bf16" if device == "cuda" else "fp32")
    if config.dtype == "int8" and device == "cuda":
        raise EngineError("int8 is for CPUs: use --dtype bf16 on a GPU, or --device cpu")
    if config.drafter == "root":
        return config
    defaults = _DEFAULT_TREES[device][config.drafter]
    shape = config.tree or (_RULE_TREES if config.drafter == "mtp" else {}).get(config.verifier, defaults)
    if config.drafter == "mtp":
        if files.mtp_folder is None:
            raise EngineError(
                f"{files.name} has no MTP layers: use --drafter ngram or root, or name a folder of them (--mtp)"
            )
        mtp = loader.read_mtp_config(files.mtp_folder, config.window_keys)
        if len(shape.widths) > mtp.depth and not mtp.reused:
            raise EngineError(f"tree shape {shape} is deeper than the model's {mtp.depth} MTP layers")
        check_tree(shape, config, device)
    return replace(config, tree=shape, max_context=config.max_context or model.max_context)


def load_models(
    files: ModelFiles, config: EngineConfig, tokenizer: Tokenizer, device: torch.device, progress: Progress
) -> tuple[Decoder, MTPModule | None]:
    """The main model; of int8 graphs its MTP layers, too, since both are made for each other."""
    if config.dtype == "int8":
        return _load_graphs(files, config, tokenizer, progress)
    model = loader.load_main(
        files.folder, _DTYPES[config.dtype], device, progress,
        dequantize=config.dequantize, window_keys=config.window_keys,
    )  # fmt: skip
    return model, None


def _load_graphs(
    files: ModelFiles, config: EngineConfig, tokenizer: Tokenizer, progress: Progress
) -> tuple[Decoder, MTPModule | None]:
    """The main model and, for a drafter that needs them, its MTP layers as int8 graphs, with the interfaces of Decoder and
    MTPModule. They are written once and kept in the cache, which takes a minute. Raises EngineError where there are none."""
    try:
        from mtp_engine.models.onnx import load, session
        from mtp_engine.models.onnx.blocks import Precision
    except ImportError as error:
        raise EngineError(f"int8 needs {error.name}: pip install onnxruntime onnx, or use --dtype fp32") from error
    if not session.steady():
        raise EngineError(
            "onnxruntime's vector code depends on where a number stands on this processor: use --dtype fp32"
        )
    torch.set_num_threads(1)  # what is left to torch is small, and its threads would wait for the graphs'
    threads, precision = config.threads or os.cpu_count() or 1, Precision(weights=session.weight_bits())
    root, mtp = cache_root() / "graphs", files.mtp_folder if config.drafter == "mtp" else None
    features, texts = loader.read_mtp_config(mtp).features if mtp else (), list[list[int]]()
    with suppress(EngineError):  # no chat template: weights are rounded one by one
        texts = [tokenizer.chat(each, add_generation_prompt=False) for each in load.calibration()]
    progress("preparing int8 graphs", 0, None)
    main = load.load_main(files.folder, root, threads=threads, precision=precision, features=features, texts=texts)
    module = None
    if mtp:
        module = load.load_mtp(
            files.folder, mtp, main, root, threads=threads, precision=precision, draft_vocab=config.draft_vocab
        )
    return cast(Decoder, main), cast(MTPModule | None, module)


def make_drafter(
    files: ModelFiles, model: Decoder, config: EngineConfig, backend: Backend, progress: Progress,
    graph: MTPModule | None = None,
) -> Drafter:  # fmt: skip
    """graph: MTP layers that are loaded already (load_models)."""
    if config.drafter == "root" or config.tree is None:
        return RootDrafter()
    slots = config.max_batch + 1  # the last is scratch
    if config.drafter == "ngram":
        length, device = len(config.tree.widths), model.embedding.device
        return NgramDrafter(length, slots=slots, max_context=config.max_context, device=device)
    assert files.mtp_folder is not None, "checked in settle"
    module = graph or loader.load_mtp(
        files.mtp_folder, model, config.draft_vocab, progress,
        dequantize=config.dequantize, window_keys=config.window_keys, rounded=config.draft_int8,
    )  # fmt: skip
    return mtp_drafter(module, config, backend)


def mtp_drafter(module: MTPModule, config: EngineConfig, backend: Backend) -> MTPDrafter:
    """The drafter of a main model's MTP layers, for config.tree."""
    assert config.tree is not None
    slots = config.max_batch + 1  # the last is scratch
    return MTPDrafter(
        backend.fuse_mtp(module), config.tree, slots=slots, attention=backend.attention, ops=backend.ops(config.ranking),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows,
    )  # fmt: skip
