"""Other decoders of the same model, for bench/decode.py: llama.cpp and transformers, greedy."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

import torch

from mtp_engine import EngineError
from mtp_engine.hub import hub


@final
@dataclass(frozen=True)
class Run:
    """One answer. ids: of its tokens, empty where a peer does not say. prompt_s: until its first token; decode_s: of all
    its tokens, as if the first took as long as the others."""

    tokens: int
    prompt_s: float
    decode_s: float
    ids: tuple[int, ...] = ()
    steps: int = 0


Decode = Callable[[list[int], int], Run]
"""(prompt, most tokens) -> what came of it."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """int8 leaves torch with one thread, which is not what a peer would run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def transformers_decoder(model: str, dtype: str, device: str, longest: int, threads: int) -> Decode:
    """transformers' generate, greedy. On a CPU with its dynamic cache, and in fp32 where we have int8. On a GPU with a static
    cache of `longest` tokens, with which it compiles decoding by itself (torch.compile, reduce-overhead); the cache is kept
    from prompt to prompt, as a new one would have the CUDA graphs recorded anew. The streamer costs it one copy of a token
    per step."""
    from transformers import LlamaForCausalLM, StaticCache
    from transformers.generation.streamers import BaseStreamer

    folder = hub.locate(model).folder
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    reference = reference.to(device).eval()
    cache = StaticCache(config=reference.config, max_cache_len=longest) if device != "cpu" else None

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(tokens: list[int], new: int) -> Run:
        clock, options = Clock(), dict[str, Any]()
        if cache is not None:
            cache.reset()
            options = {"past_key_values": cache}
        prompt = torch.tensor([tokens], device=device)
        with torch_threads(threads):
            ids = reference.generate(prompt, max_new_tokens=new, do_sample=False, streamer=clock, **options)
        out = tuple(ids[0, len(tokens) :].tolist())
        began, first, *_, last = clock.times  # when the prompt was echoed, then when each token came
        return Run(len(out), first - began, (last - first) * len(out) / max(len(out) - 1, 1), out)

    return decode


def llama_cpp_decoder(gguf: Path, longest: int, threads: int) -> Decode:
    """llama.cpp's server (xllamacpp), greedy, with its own measure of both times. It has a process of its own, which sleeps
    while others run: beside torch's threads in one process its OpenMP lets its own no longer spin, which costs it a third
    of its speed."""
    if not util.find_spec("xllamacpp"):
        raise EngineError("llama.cpp is measured through a package: pip install xllamacpp, or --peer transformers")
    if not gguf.is_file():
        raise EngineError(
            f"{gguf}: llama.cpp needs a GGUF file of the same model; name it with --gguf, or leave it out"
        )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve_llama_cpp, args=(theirs, str(gguf), longest, threads), daemon=True).start()

    def decode(tokens: list[int], new: int) -> Run:
        ours.send((tokens, new))
        run: Run = ours.recv()
        return run

    return decode


def _serve_llama_cpp(pipe: Connection, gguf: str, longest: int, threads: int) -> None:
    """What runs in that process, until it is ended with its parent."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.verbosity = longest, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    with suppress(EOFError):
        while True:
            tokens, new = pipe.recv()
            asked = {"prompt": tokens, "n_predict": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
            found = server.handle_completions(asked)["timings"]
            count = found["predicted_n"]  # the first of which comes with the prompt
            pipe.send(Run(count, found["prompt_ms"] / 1e3, found["predicted_per_token_ms"] / 1e3 * count))
