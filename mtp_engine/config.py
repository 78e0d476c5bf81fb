"""Frozen settings: what a model is, how the engine runs it, how a request is sampled. Read once at the top."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from mtp_engine.checks import check_types
from mtp_engine.errors import EngineError

DType = Literal["auto", "fp32", "bf16", "int8"]
Experts = Literal["auto", "int4"]

DEFAULT_MODEL = "smollm2-135m-mtp3"
MOST_ANSWERS = 1024  # to one prompt
MOST_BIAS = 1e6  # of a logit; OpenAI's API goes to 100
DRAFT_VOCAB = 16384  # tokens that MTP layers may propose, where nothing else is said
AUTO_NODES = 16  # at most, of a tree that is planned step by step
MAX_TREE_NODES = 64  # a tree mask is 64 bits per node in the CUDA kernels
MAX_THREADS = 1024  # with a hundred times as many torch crashes the process


@final
@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding over the first `dim` dimensions of a head, half-split layout.

    `scaling` is None, ("linear", factor) or ("llama3", factor, low_freq_factor, high_freq_factor, original_context).
    """

    dim: int
    theta: float
    scaling: tuple[str | float, ...] | None = None


@final
@dataclass(frozen=True)
class AttentionConfig:
    """One attention layer. `window` counts the keys a query sees, itself included; None means all."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    rope: RopeConfig
    window: int | None = None
    sink: bool = False
    value_scale: float = 1.0
    bias: bool = False


@final
@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each token goes through `per_token` of `experts`, chosen by sigmoid scores plus a bias.

    The weights are the scores without the bias, divided by their sum if `normalise`, times `scale`.
    int4: the engine holds the experts in 4 bits, however they are stored.
    """

    experts: int
    per_token: int
    normalise: bool = True
    scale: float = 1.0
    int4: bool = False


@final
@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: attention and a gated FFN of width `intermediate`, or a mixture of such FFNs."""

    attention: AttentionConfig
    intermediate: int
    moe: MoEConfig | None = None


@final
@dataclass(frozen=True)
class MTPConfig:
    """The MTP layers and the switches in which published families differ.

    chained: layer k > 0 reads layer k-1's output, not the main model's hidden state.
    reused: one layer serves every depth (its rows then move one position per depth).
    hidden: the main model's hidden state is taken before or after its final norm.
    concat: order of the two halves that eh_proj reads.
    own_norm: each layer ends in its own norm; otherwise the main model's final norm is shared.
    features: layers of the main model whose outputs are mixed into the hidden state that the MTP layers read (the idea of
    EAGLE-3, Li et al. 2025, arXiv 2503.01840); none in any published MTP checkpoint.
    """

    depth: int
    layer: LayerConfig
    chained: bool = False
    reused: bool = False
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
    concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    own_norm: bool = True
    features: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class ModelConfig:
    """A main model and, if it has any, its MTP layers. fp8_block: rows and columns that share a scale, where weights
    are stored as FP8."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tied_head: bool
    max_context: int
    eos_token_ids: tuple[int, ...]
    mtp: MTPConfig | None = None
    fp8_block: int | None = None


@final
@dataclass(frozen=True)
class TreeShape:
    """How many candidates a drafter proposes at each depth, or how many nodes it may spend.

    widths: every node at depth d gets widths[d] children (chain:K is K widths of one).
    best: instead, the `best` drafted nodes with the highest joint draft probability, chosen anew in every step.
    auto: every step's tree is as deep and has as many of these nodes as pays at that moment, perhaps none.
    """

    widths: tuple[int, ...] = ()
    best: int = 0
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> "TreeShape":
        """Read `auto`, `chain:K`, `4x2x2` or `tree:N`. Raises EngineError for anything else or above 64 nodes."""
        if text == "auto":
            return cls(best=AUTO_NODES, auto=True)
        if match := re.fullmatch(r"chain:(\d+)", text):
            shape = cls(widths=(1,) * int(match[1]))
        elif match := re.fullmatch(r"tree:(\d+)", text):
            shape = cls(best=int(match[1]))
        elif re.fullmatch(r"\d+(x\d+)*", text):
            shape = cls(widths=tuple(int(width) for width in text.split("x")))
        else:
            raise EngineError(f"tree shape {text!r} is not one of auto, chain:K, WxWxW (for example 4x2x2) or tree:N")
        if shape.best == 0 and (not shape.widths or 0 in shape.widths):
            raise EngineError(f"tree shape {text!r} drafts nothing: use at least one node, or --drafter root")
        if shape.max_nodes > MAX_TREE_NODES:
            raise EngineError(
                f"tree shape {text!r} has {shape.max_nodes} nodes with its root; at most {MAX_TREE_NODES}"
            )
        return shape

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest tree, root included."""
        if self.best:
            return self.best + 1
        total, level = 1, 1
        for width in self.widths:
            level *= width
            total += level
        return total

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        if self.best:
            return f"tree:{self.best}"
        return f"chain:{len(self.widths)}" if set(self.widths) == {1} else "x".join(map(str, self.widths))


@final
@dataclass(frozen=True)
class Structure:
    """What an answer must match: one of a JSON schema (its text), a regular expression, or a Lark/EBNF grammar.

    The three of vLLM's StructuredOutputsParams. Needs the extra `grammar`.

    within: tokens, the end-of-text token included, in which a JSON answer is to be whole: what would not end in time is
    closed the shortest way, so that max_tokens does not cut it off. 0 is off.
    """

    json: str = ""
    regex: str = ""
    grammar: str = ""
    within: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if sum(bool(text) for text in (self.json, self.regex, self.grammar)) != 1:
            raise EngineError("a structure is one of json, regex and grammar: give exactly one")
        if self.within < 0:
            raise EngineError(f"within is {self.within}; it must be 0 (off) or above")


@final
@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. The defaults leave everything but max_tokens off; names and meanings are vLLM's
    (vllm.SamplingParams, 0.11), which follow OpenAI's completions API where that has them.

    The same seed gives the same tokens whichever drafter and tree are used, and without drafting. Without a seed one
    is drawn and reported in the statistics.

    temperature: 0 is greedy. OpenAI, vLLM.
    top_k, top_p, min_p: top-k keeps every token that fewer than k tokens beat; top-p every token with less than p
        probability mass above it; min-p those with at least min_p times the largest probability. All see the
        distribution after temperature; ties are kept together. top_p is OpenAI's, the others vLLM's.
    repetition_penalty: logits of tokens in the prompt or the answer so far are divided by it if positive, else
        multiplied (Keskar et al. 2019, "CTRL"; vLLM counts the prompt too, and so do we).
    frequency_penalty, presence_penalty: subtracted per occurrence, and once, of a token in the answer so far; the
        prompt does not count. OpenAI, vLLM.
    logit_bias: {token id: what is added to its logit}, before penalties. OpenAI, vLLM.
    allowed_token_ids: only these may be chosen. vLLM.
    bad_words: texts, or tuples of token ids, that must not appear: the last token of one is forbidden where the answer
        ends in the others. A text is tried with and without a space in front. vLLM.
    min_tokens: before that many tokens neither end-of-text nor stop_token_ids may be chosen, and stop strings do not
        end the answer. vLLM.
    stop: the answer ends where one of these texts is complete; `text` is cut before it, token_ids end with the token
        that completed it. OpenAI, vLLM.
    stop_token_ids: the answer ends with such a token, which stays in token_ids. vLLM.
    n: answers per prompt; answer i uses seed + i, as in vLLM.
    logprobs: log-probabilities of every emitted token and of that many best ones, of the main model's own softmax,
        before temperature, penalties and masks (vLLM's default logprobs_mode, "raw_logprobs"). None is off.
    structure: what the answer must match.
    speculate, tree: drafting for this request only: off, or a smaller tree than the engine's (ours). The tree may be
        given as text, such as "chain:3".
    priority: of the requests that wait for room the lowest number runs first; among equals the first to come. vLLM's
        argument of the same name.
    timeout: seconds from its arrival after which the request ends, waiting or running, with finish_reason "timeout" and
        what it has said so far (ours). None is never.

    Lists count as tuples, and stop="x" as ("x",).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    n: int = 1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logprobs: int | None = None
    structure: Structure | None = None
    speculate: bool = True
    tree: TreeShape | None = None
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        moderate = all(abs(bias) <= MOST_BIAS for bias in self.logit_bias.values())
        for ok, message in (
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be at least 1"),
            (
                0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}; it must be 0 (greedy) or above",
            ),
            (self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or above"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must be between 0 and 1"),
            (self.seed is None or 0 <= self.seed < 2**63, f"seed is {self.seed}; it must be between 0 and 2**63 - 1"),
            (
                0 < self.repetition_penalty <= 10,
                f"repetition_penalty is {self.repetition_penalty}; above 0, at most 10",
            ),
            (abs(self.frequency_penalty) <= 2, f"frequency_penalty is {self.frequency_penalty}; from -2 to 2"),
            (abs(self.presence_penalty) <= 2, f"presence_penalty is {self.presence_penalty}; from -2 to 2"),
            (
                moderate,
                f"logit_bias holds a bias beyond {MOST_BIAS:g}; forbid tokens with bad_words or allowed_token_ids",
            ),
            (self.allowed_token_ids != (), "allowed_token_ids is empty; name at least one token"),
            (all(self.bad_words), "bad_words holds an empty word"),
            (all(self.stop), "stop holds an empty text"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}; it must be between 0 and max_tokens",
            ),
            (1 <= self.n <= MOST_ANSWERS, f"n is {self.n}; it must be between 1 and {MOST_ANSWERS}"),
            (self.logprobs is None or 0 <= self.logprobs <= 64, f"logprobs is {self.logprobs}; from 0 to 64"),
            (
                self.timeout is None or 0 < self.timeout < float("inf"),
                f"timeout is {self.timeout}; it must be above 0 and finite, in seconds",
            ),
        ):
            if not ok:
                raise EngineError(message)


@final
@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field has a default that suits one user on one machine.

    tree None picks the shape that measured fastest for the device and drafter; it may be given as text, such as "chain:3".
    draft_vocab is the number of most frequent tokens the MTP layers may propose; 0 means all, and None what measured fastest:
    8,192 in int8 on a CPU, else 16,384. draft_int8 lets the MTP layers run in int8 on a CPU, which is faster and costs a
    little acceptance. max_context 0 means the model's own limit.
    max_batch is how many requests run at a time, and max_waiting how many more may wait for room; one beyond them is
    refused as busy. prefill_chunk is how many tokens of prompts are read at a time; 0 means 2,048 on a GPU with our
    kernels, else 256. Short prompts share it (not in int8): many that arrive together are read in one pass.
    device: cpu, cuda, cuda:1, ...; auto is the GPU if there is one. threads: of the CPU; 0 is one per core
    that this process may use, and more than that are never started.

    kv_tokens is the size of the paged KV cache in tokens; 0 means max_batch full contexts, and prefix_cache_gb more.
    prefix_cache: keep the beginnings of texts, so that prompts that begin alike are not read again; prefix_cache_gb is how
    much of them (1e9 bytes).
    dequantize turns FP8 weights into `dtype` when they are loaded: faster on a CPU, two or four times the memory.
    experts int4 holds the experts of a mixture in 4 bits (kernels/int4.py): about half of FP8's memory and time, for some
    quality. They are rounded as they are read; all other weights stay what they are. Not with dtype int8.
    window_keys is how many keys a query of a sliding-window layer sees, itself included; 0 is the family's reading of
    config.json (for MiMo-V2 sliding_window + 1, as in SGLang and transformers; vLLM and lmdeploy count sliding_window
    keys).
    verifier: which drafts are kept; VERIFIERS.md compares the rules. allow_lossy lets one run that changes the output's
    distribution. candidates: how MTP layers pick them: by their probabilities and the noise of the main model's own choice,
    drawn from their probabilities by fresh noise (rules that use q), or the most probable ones; auto suits the rule.

    dtype auto is bf16 on a GPU. On a CPU it is int8: weights of 8 bits, activations of up to 16, and a step as one call of a
    library that a C compiler makes on first use; a row is the same bits in every batch, tree and chunk. Where there is no
    compiler, or the model's sizes do not suit, it is fp32.

    On a GPU: attention exact is our kernel, whose rows are the same bits in every
    batch and tree, so that bf16 text does not depend on drafting; flashinfer is FlashInfer's; torch needs neither Triton
    nor FlashInfer, and runs without CUDA graphs. steps_in_flight is how many steps are queued before the host looks at
    the first one's tokens: with 1 the GPU waits for the host after every step. capture: when steps become CUDA graphs: all at
    load, which takes seconds and memory, and then nobody ever waits for one; or lazy, each when it first comes.

    tensor_parallel: how many processes share the model, each with its part of every layer: one per GPU, or several on a CPU
    (fp32), which share its threads. They are started by the engine, or by torchrun.
    """

    drafter: Literal["mtp", "ngram", "root"] = "mtp"
    tree: TreeShape | None = None
    draft_vocab: int | None = None
    draft_int8: bool = True
    verifier: Literal["match", "rejection", "block", "rrs", "traversal", "typical"] = "match"
    candidates: Literal["auto", "noise", "drawn", "best"] = "auto"
    allow_lossy: bool = False
    device: str = "auto"
    dtype: DType = "auto"
    attention: Literal["exact", "flashinfer", "torch"] = "exact"
    steps_in_flight: int = 2
    capture: Literal["load", "lazy"] = "lazy"
    threads: int = 0
    max_batch: int = 8
    max_waiting: int = 1024
    max_context: int = 0
    kv_tokens: int = 0
    prefix_cache: bool = True
    prefix_cache_gb: float = 1.0
    page_size: int = 64
    prefill_chunk: int = 0
    dequantize: bool = False
    experts: Experts = "auto"
    window_keys: int = 0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for least, names in (
            (0, ("draft_vocab", "threads", "max_context", "kv_tokens", "window_keys", "prefill_chunk")),
            (1, ("max_batch", "max_waiting", "page_size", "steps_in_flight", "tensor_parallel")),
        ):
            for name in names:
                if getattr(self, name) is not None and not least <= getattr(self, name) < 1 << 31:
                    raise EngineError(f"{name} is {getattr(self, name)}; it must be at least {least} and below 2**31")
        if not 0 < self.prefix_cache_gb < 1e6:
            raise EngineError(
                f"prefix_cache_gb is {self.prefix_cache_gb}; it must be above 0 (prefix_cache=False turns the cache off)"
            )
        if self.threads > MAX_THREADS:
            raise EngineError(f"threads is {self.threads}; it must be at most {MAX_THREADS}")
        if self.drafter == "ngram" and self.tree and set(self.tree.widths) != {1}:
            raise EngineError(f"the ngram drafter drafts chains: use --tree chain:K, not {self.tree}")
        if self.drafter == "root" and self.tree:
            raise EngineError("the root drafter drafts nothing: leave --tree out")
        self._check_rule()

    def _check_rule(self) -> None:
        if self.verifier == "typical" and not self.allow_lossy:
            raise EngineError("the typical rule is lossy: it changes what the model says; ask for it with allow_lossy")
        if self.verifier in ("rejection", "block") and self.tree and set(self.tree.widths) != {1}:
            raise EngineError(f"the {self.verifier} rule checks chains: use chain:K, not {self.tree}")
        if self.verifier == "match" and self.candidates == "drawn":
            raise EngineError("the match rule has no use for drawn candidates: use noise or best")
        if self.tree and self.tree.auto and (self.verifier != "match" or self.candidates != "auto"):
            raise EngineError("trees that plan themselves are for the match rule: use --tree tree:N or chain:K")
        if self.candidates == "drawn" and self.tree and self.tree.best:
            raise EngineError(
                f"candidates cannot be drawn for {self.tree}, whose shape depends on them: use chain:K or WxW"
            )

    @property
    def ranking(self) -> Literal["noise", "drawn", "best"]:
        """How candidates are picked, once `tree` is settled: auto couples them to the match rule's noise, draws them
        for a rule that uses q where the tree's shape does not depend on them, and else takes the best."""
        if self.candidates != "auto":
            return self.candidates
        if self.verifier == "match":
            return "noise"
        return "best" if self.verifier == "typical" or self.tree is None or self.tree.best else "drawn"
