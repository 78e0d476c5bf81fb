"""The engine: the only place that names concrete classes. Loads a model, builds the loop, runs prompts through it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch

from mtp_engine.backend import Backend, check_tree, gpu_errors, make_backend
from mtp_engine.cache import HybridKV
from mtp_engine.config import (
    DEFAULT_MODEL,
    MAX_TREE_NODES,
    SAMPLE_STEPS,
    EngineConfig,
    ModelConfig,
    SamplingParams,
    TreeShape,
)
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Drafter, Progress
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Request
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.sampling.stops import FinishReason, VisibleText
from mtp_engine.sampling.structure import Grammars
from mtp_engine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Raw text, token ids, or chat messages ({"role": ..., "content": ...}) for the model's chat template."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KV_BUDGET = 4 << 30  # bytes; the default cache holds a full context per slot up to this
_RULE_TREES = {
    rule: TreeShape.parse(tree)
    for rule, tree in (("rejection", "chain:3"), ("block", "chain:3"), ("rrs", "4x2x2"), ("traversal", "4x2x2"))
}
_DEFAULT_TREES = {  # what measured fastest, see bench/LOG.md
    "cpu": {"mtp": TreeShape.parse("tree:7"), "ngram": TreeShape.parse("chain:4")},
    "cuda": {"mtp": TreeShape.parse("tree:15"), "ngram": TreeShape.parse("chain:4")},
}


@final
@dataclass(frozen=True)
class Generation:
    """A finished answer. drafted[i]: token i was an accepted draft, not the main model's own. The text leaves special
    tokens out and ends before a stop string; token_ids hold them, the stop included. logprobs: one per token where they
    were asked for. others: the further answers to the same prompt, where n > 1."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: tuple[TokenLogprob, ...] = ()
    others: tuple["Generation", ...] = ()


@final
@dataclass(frozen=True)
class Chunk:
    """What one step added to answer `sample` (of n) of prompt `index`. `finished` comes with each answer's last chunk;
    `stats` are the request's own and go on counting."""

    index: int
    text: str
    token_ids: list[int]
    drafted: list[bool]
    stats: GenerationStats
    finished: Generation | None
    sample: int = 0


@final
class Engine:
    """A loaded model with its decode loop.

    >>> engine = Engine.load("smollm2-135m-mtp3")
    >>> [answer] = engine.generate([[{"role": "user", "content": "Why is the sky blue?"}]])
    """

    def __init__(
        self, model: Decoder, loop: DecodeLoop, tokenizer: Tokenizer, config: EngineConfig, backend: Backend
    ) -> None:
        self.model, self.loop, self.tokenizer, self.config, self.backend = model, loop, tokenizer, config, backend

    @classmethod
    @gpu_errors()
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        mtp: str | None = None,
        progress: Progress = hub.silent,
    ) -> "Engine":
        """Load a registered model, a local folder, a GGUF file or `org/name` from the hub.

        mtp: a folder of MTP layers to use instead of the model's own. Raises EngineError for everything a user can mend.
        """
        config = config or EngineConfig()
        device = _device(config)
        torch.set_num_threads(config.threads or os.cpu_count() or 1)
        files = hub.locate(name, mtp=mtp, progress=progress)
        tokenizer = Tokenizer.load(files.folder)
        if files.mtp_folder is None and config.drafter == "mtp" and loader.has_mtp(files.folder):
            files = replace(files, mtp_folder=files.folder)
        config = _settle(config, files)
        model = loader.load_main(
            files.folder, _DTYPES[config.dtype], device, progress,
            dequantize=config.dequantize, window_keys=config.window_keys,
        )  # fmt: skip
        backend = make_backend(config, device, progress)
        drafter = _drafter(files, model, config, backend, progress)
        model = backend.fuse(model)
        loop = make_loop(model, drafter, config, backend, slots=config.max_batch, tokenizer=tokenizer)
        return cls(model, loop, tokenizer, config, backend)

    @property
    def model_config(self) -> ModelConfig:
        return self.model.config

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Special-token strings in text stay text."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.chat(cast(Sequence[Mapping[str, Any]], prompt))
        return list(cast(Sequence[int], prompt))

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """Answer all prompts; more than max_batch of them wait their turn. One `params` for all, or one each."""
        answers: list[dict[int, Generation]] = [{} for _ in prompts]
        for chunk in self.stream(prompts, params):
            if chunk.finished:
                answers[chunk.index][chunk.sample] = chunk.finished
        samples = [[found[sample] for sample in sorted(found)] for found in answers]
        return [replace(first, others=tuple(others)) for first, *others in samples]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Chunk]:
        """Yield committed tokens as they come. Closing the iterator drops what is unfinished and frees its slots."""
        encoded = [self.encode(prompt) for prompt in prompts]
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(encoded)
        waiting = [
            (index, sample, tokens, wanted)
            for index, (tokens, given) in enumerate(zip(encoded, each, strict=True))
            for sample, wanted in enumerate(self._samples(given))
        ][::-1]
        running: dict[Request, tuple[int, int, VisibleText]] = {}
        try:
            while waiting or running:
                while waiting and self.loop.has_room:
                    index, sample, tokens, wanted = waiting.pop()
                    with gpu_errors():
                        request = self.loop.add(tokens, wanted)
                    running[request] = (index, sample, VisibleText(self.tokenizer.stream(), request.ends.strings))
                with gpu_errors():
                    outputs = self.loop.step()
                for out in outputs:
                    if out.request not in running:
                        continue  # somebody else's request in the same loop
                    index, sample, visible = running[out.request]
                    finished = self._finished(out.request)
                    text = visible.push(out.tokens, ended=finished is not None)
                    if finished:
                        del running[out.request]
                    yield Chunk(index, text, out.tokens, out.drafted, out.request.stats, finished, sample)
        finally:
            for request in running:
                self.loop.remove(request)

    def _finished(self, request: Request) -> Generation | None:
        if request.finish_reason is None:
            return None
        strings = request.ends.strings
        text = strings.finish() if strings else self.tokenizer.decode(request.output)
        return Generation(
            text, request.output, request.drafted, request.finish_reason, request.stats, tuple(request.logprobs)
        )

    def _samples(self, params: SamplingParams) -> list[SamplingParams]:
        """What each of the n answers is decoded with: bad words as token ids, seeds one apart (vLLM's ParentRequest)."""
        words = [
            word
            for given in params.bad_words
            for word in ([given] if not isinstance(given, str) else self.tokenizer.spellings(given))
        ]
        seeds = [None if params.seed is None else (params.seed + sample) % 2**63 for sample in range(params.n)]
        return [replace(params, bad_words=tuple(words), seed=seed, n=1) for seed in seeds]

    def plain(self, prompt: Prompt, params: SamplingParams, *, max_steps: int | None = None) -> Request:
        """Decode without drafting on a loop of its own, for comparison: at most `max_steps` tokens, timed alike."""
        matching = replace(self.config, verifier="match", candidates="auto")
        loop = make_loop(self.model, RootDrafter(), matching, self.backend, slots=1, tokenizer=self.tokenizer)
        request = loop.add(self.encode(prompt), self._samples(params)[0])
        while request.finish_reason is None and (max_steps is None or len(request.output) < max_steps):
            loop.step()
        return request

    def compare(self, prompt: Prompt, params: SamplingParams, answer: Generation, *, full: bool) -> None:
        """Measure plain decoding of the same prompt in this process and note it in the answer's statistics.

        full decodes everything and checks that the tokens are identical; otherwise SAMPLE_STEPS tokens are timed.
        """
        same_seed = replace(params, seed=answer.stats.seed)
        plain = self.plain(prompt, same_seed, max_steps=None if full else SAMPLE_STEPS)
        answer.stats.plain_tokens_per_s = plain.stats.tokens_per_s
        answer.stats.identical_to_plain = plain.output == answer.token_ids if full else None


def _device(config: EngineConfig) -> torch.device:
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise EngineError(f"device {config.device!r} is unknown: use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError("device cuda was asked for, but this torch sees no NVIDIA GPU: use --device cpu")
    return device


def kv_tokens(model: ModelConfig, config: EngineConfig, slots: int) -> int:
    context = config.max_context or model.max_context
    if config.kv_tokens:
        return config.kv_tokens
    each = sum(
        a.kv_heads * (a.qk_dim + a.v_dim) * _DTYPES[config.dtype].itemsize
        for a in (layer.attention for layer in model.layers)
        if a.window is None
    )
    return min(slots * context, max(context, _KV_BUDGET // max(each, 1))) + slots * (
        2 * MAX_TREE_NODES + config.page_size
    )


def make_loop(
    model: Decoder, drafter: Drafter, config: EngineConfig, backend: Backend, *, slots: int, tokenizer: Tokenizer | None
) -> DecodeLoop:
    """Without a tokenizer a loop has no stop strings, no structures, and no tokens that end a text."""
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
    return DecodeLoop(
        model, cache, drafter, backend.verifier(config.verifier), slots=slots, eos_token_ids=eos,
        max_context=config.max_context or model.config.max_context, prefill_chunk=config.prefill_chunk,
        device=embedding.device, attention=backend.attention, runner=backend.runner(slots), kernels=backend.kernels,
        text=tokenizer.stream if tokenizer else None,
        grammars=Grammars(tokenizer.folder, model.config.vocab_size, eos).start if tokenizer else None,
    )  # fmt: skip


def _settle(config: EngineConfig, files: hub.ModelFiles) -> EngineConfig:
    """Fill in what depends on the model, and refuse what does not fit it, before any weight is read."""
    model = loader.read_config(files.folder, config.window_keys)
    if config.max_context > model.max_context:
        raise EngineError(f"max_context is {config.max_context}; {files.name} was made for {model.max_context} tokens")
    device = torch.device(config.device).type
    if config.dtype == "auto":
        config = replace(config, dtype="bf16" if device == "cuda" else "fp32")
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


def _drafter(
    files: hub.ModelFiles, model: Decoder, config: EngineConfig, backend: Backend, progress: Progress
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
