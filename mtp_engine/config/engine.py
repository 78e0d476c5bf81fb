"""How the engine runs."""

from dataclasses import dataclass
from typing import Literal, final

from mtp_engine.config.checks import check_types
from mtp_engine.config.shape import TreeShape
from mtp_engine.errors import EngineError

DType = Literal["auto", "fp32", "bf16", "int8"]
Experts = Literal["auto", "int4"]

DEFAULT_MODEL = "smollm2-135m-mtp3"
DRAFT_VOCAB = 16384  # tokens that MTP layers may propose, where nothing else is said
MAX_THREADS = 1024  # with a hundred times as many torch crashes the process


@final
@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field has a default that suits one user on one machine.

    drafter: who proposes tokens: the model's MTP layers; ngram, what followed the same words earlier in the text; or root:
        nobody, which is plain decoding.
    tree: the shape of what is drafted, which may be given as text, such as "chain:3". None is what measured fastest for the
        device and the drafter.
    draft_vocab: how many tokens, the most frequent ones, MTP layers may propose. 0 is all; None is what measured fastest:
        8,192 in int8 on a CPU, else 16,384.
    draft_int8: with dtype fp32 on a CPU, let the MTP layers run in int8, which is faster and costs a little acceptance.
    verifier: the rule by which drafts are kept; verifiers/VERIFIERS.md compares the rules.
    candidates: how MTP layers pick drafts: by their probabilities and the noise of the main model's own choice ("noise"),
        drawn from their probabilities by fresh noise (for rules that use these), or the most probable ones ("best"). auto
        suits the rule.
    allow_lossy: permit a rule that changes the distribution of what is said.

    device: cpu, cuda, cuda:1, ...; auto is the GPU if there is one.
    dtype: the number format. auto is bf16 on a GPU. On a CPU it is int8: weights of 8 bits, activations of up to 16, and a
        step as one call of a library that a C compiler makes on first use; a row is the same bits in every batch, tree and
        chunk. Where there is no compiler, or the model's sizes do not suit, it is fp32.
    attention: on a GPU. exact is our kernel, whose rows are the same bits in every batch and tree, so that bf16 text does
        not depend on drafting; flashinfer is FlashInfer's; torch needs neither Triton nor FlashInfer, and runs without
        CUDA graphs.
    steps_in_flight: on a GPU, how many steps are queued before the host looks at the first one's tokens. With 1 the GPU
        waits for the host after every step.
    capture: on a GPU, when steps become CUDA graphs: "load", all at once, which takes seconds and memory, and then nobody
        ever waits for one; or "lazy", each when it first comes.
    threads: of the CPU. 0 is one per core that this process may use; more than that are never started.

    max_batch: how many requests run at a time.
    max_waiting: how many more may wait for room; one beyond them is refused as busy.
    max_context: tokens of a prompt and its answer together; 0 is the model's own limit.
    kv_tokens: the size of the paged KV cache in tokens; 0 is max_batch full contexts, of 4 GiB at most where one fits in
        that, and prefix_cache_gb more.
    prefix_cache: keep the beginnings of texts, so that prompts that begin alike are not read again.
    prefix_cache_gb: how much of them is kept, in 1e9 bytes.
    page_size: tokens in a page of the KV cache; only full pages are shared.
    prefill_chunk: how many tokens of prompts are read at a time; 0 is 2,048 on a GPU with our kernels, else 256. Short
        prompts share it (not in int8): many that arrive together are read in one pass.

    dequantize: turn FP8 weights into `dtype` when they are loaded: faster on a CPU, two or four times the memory.
    experts: int4 holds the experts of a mixture in 4 bits (kernels/int4.py): about half of FP8's memory and time, for some
        quality. They are rounded as they are read; all other weights stay what they are. Not with dtype int8.
    window_keys: how many keys a query of a sliding-window layer sees, itself included; 0 is the family's reading of
        config.json (for MiMo-V2 sliding_window + 1, as in SGLang and transformers; vLLM and lmdeploy count
        sliding_window keys).
    tensor_parallel: how many processes share the model, each with its part of every layer: one per GPU, or several on a
        CPU (fp32), which share its threads. They are started by the engine, or by torchrun.

    Raises EngineError for values that are out of range, and for settings that contradict each other.
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
