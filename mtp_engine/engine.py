"""The engine: loads a model, takes prompts from any number of threads, gives answers."""

import gc
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, final

import torch

from mtp_engine.assemble.backend import Backend, describe_device, gpu_errors
from mtp_engine.assemble.loop import make_loop
from mtp_engine.assemble.parts import make_parts
from mtp_engine.assemble.settle import settle, settle_machine
from mtp_engine.cache.prefix_file import StoredPrefix
from mtp_engine.config import DEFAULT_MODEL, EngineConfig, ModelConfig, SamplingParams
from mtp_engine.drafters import RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.hub.identity import prefix_maker
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.protocols import Progress
from mtp_engine.runtime.answer import Chunk, Generation
from mtp_engine.runtime.compare import Contender, take_turns
from mtp_engine.runtime.lead import Follower, Solo, Team
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Request, StepOutput
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.turns import Turns
from mtp_engine.team import form_team
from mtp_engine.text.tokenizer import Tokenizer

T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Raw text, token ids, or chat messages ({"role": ..., "content": ...}) for the model's chat template."""
FormTeam = Callable[[EngineConfig, hub.ModelFiles], tuple[Team, EngineConfig]]
"""As team.form_team."""


@final
@dataclass(frozen=True)
class Job:
    """One answer that was asked for: sample `sample` of prompt `index`."""

    request: Request
    index: int = 0
    sample: int = 0


@final
class Engine:
    """A loaded model with its decode loop. Any number of threads may call it: whoever waits for tokens advances the loop
    for all, and everybody gets their own.

    >>> with Engine.load("smollm2-135m-mtp3") as engine:
    ...     [answer] = engine.generate([[{"role": "user", "content": "Why is the sky blue?"}]])
    """

    def __init__(
        self, model: Decoder, loop: DecodeLoop, tokenizer: Tokenizer, config: EngineConfig, backend: Backend,
        files: hub.ModelFiles | None = None, team: Team = Solo(),  # noqa: B008  it holds nothing
    ) -> None:  # fmt: skip
        """Of parts that fit together, which `load` makes. config: settled. files: where the weights came from, without which no
        prefix can be saved. team: the ranks that share the model."""
        self.model, self.loop, self.tokenizer, self.config, self.backend = model, loop, tokenizer, config, backend
        self._files, self.team = files, team
        self.turns = Turns()  # one is held while the loop is touched
        self.closed = False
        self.captured = ""  # what capturing CUDA graphs took, in words

    @classmethod
    @gpu_errors()
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        mtp: str | None = None,
        progress: Progress = hub.silent,
        form: FormTeam = form_team,
    ) -> "Engine":
        """Load a registered model, a local folder, a GGUF file or `org/name` from the hub.

        mtp: a folder of MTP layers to use instead of the model's own. progress: see protocols.Progress. form: brings
        the ranks together that share the model.
        Raises EngineError for everything a user can mend.
        """
        config = settle_machine(config or EngineConfig(), progress)
        files = hub.locate(name, mtp=mtp, progress=progress)
        try:
            return cls._load(files, config, progress, form)
        except Exception:
            if not hub.discard_damaged(files.folder, progress):
                raise
        return cls._load(hub.locate(name, mtp=mtp, progress=progress), config, progress, form)

    @classmethod
    def _load(cls, files: hub.ModelFiles, config: EngineConfig, progress: Progress, form: FormTeam) -> "Engine":
        if files.mtp_folder is None and config.drafter == "mtp" and loader.has_mtp(files.folder):
            files = replace(files, mtp_folder=files.folder)
        team, config = form(settle(config, files), files)
        if isinstance(team, Follower):
            cls.follow(files, config, team)
            raise SystemExit(0)  # torchrun started this process to follow rank 0
        try:
            return cls._build(files, config, team, progress)
        except BaseException:
            team.close()
            raise

    @classmethod
    def _build(cls, files: hub.ModelFiles, config: EngineConfig, team: Team, progress: Progress) -> "Engine":
        """config: settled."""
        made = make_parts(files, config, team, progress)
        engine = cls(made.model, made.loop, made.tokenizer, made.config, made.backend, files, team)
        engine.captured = made.captured
        return engine

    @classmethod
    def follow(cls, files: hub.ModelFiles, config: EngineConfig, team: Follower) -> None:
        """Be another rank of an engine, until rank 0 closes it."""
        engine = cls._build(files, config, team, hub.silent)
        with torch.inference_mode():
            team.follow(engine.loop, lambda **changes: engine.undrafted(**changes).loop)
        team.close()

    @property
    def device_note(self) -> str:
        """What it runs on, in words."""
        return describe_device(self.config)

    @property
    def model_config(self) -> ModelConfig:
        return self.model.config

    def close(self) -> None:
        """End what runs (finish_reason "abort") and give the memory back. Closing twice does no harm."""
        turn = self.turns.new()
        with turn.lock:
            turn.wait()
            if not self.closed:
                self.closed = True
                self.loop.close()
                del self.model, self.loop
                gc.unfreeze()  # see GraphRunner.capture

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Special-token strings in text stay text. Raises EngineError for what is no prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping | bytes):
            raise EngineError(f"a prompt is a text, token ids or chat messages, not {prompt!r}")
        items = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self.tokenizer.chat(cast(Sequence[Mapping[str, Any]], items))
        return cast(list[int], items)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[Generation]:
        """Answer all prompts, and return the answers in their order; more than max_batch of them wait their turn. One `params`
        for all, or one each. With n > 1 the second and later answers to a prompt are in the first one's `others`.

        The whole list is checked before anything runs. on_error: what happens to a prompt that cannot run or fails on its
        way: EngineError, which names its index, or an answer with finish_reason "error", beside which the others get
        theirs.
        """
        jobs, refused = self._jobs(prompts, params, on_error)
        answers: list[dict[int, Generation]] = [{} for _ in prompts]
        for chunk in self._stream(jobs):
            if answer := chunk.finished:
                if answer.error and on_error == "raise":
                    raise EngineError(_about(chunk.index, len(prompts), answer.error))
                answers[chunk.index][chunk.sample] = answer
        for index, error in refused.items():
            answers[index][0] = Generation.refused(error)
        samples = [[given[sample] for sample in sorted(given)] for given in answers]
        return [replace(first, others=tuple(others)) for first, *others in samples]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Chunk]:
        """Yield what each step adds to an answer, as it comes; a Chunk's `index` says to which prompt's. Closing the iterator
        drops what is unfinished and frees its slots.

        Raises EngineError at once for prompts that cannot run; one that fails on its way ends with an error of its own.
        """
        return self._stream(self._jobs(prompts, params, "raise")[0])

    def requests(self, prompt: Prompt, params: SamplingParams, said: Sequence[int] = ()) -> list[Request]:
        """One request per answer, checked but not queued. said: see Intake. Raises EngineError for what cannot run."""
        loop = self.check_open()
        return loop.intake.requests(self.encode(prompt), params, said=said)

    def check_open(self) -> DecodeLoop:
        """The loop; another thread may close the engine at any moment, and take it away."""
        loop: DecodeLoop | None = getattr(self, "loop", None)
        if self.closed or loop is None:
            raise EngineError("the engine is closed: load another")
        return loop

    def _in_turn(self, call: Callable[[DecodeLoop], T]) -> T:
        """What `call` makes of the loop, while no other thread touches that. Raises EngineError once the engine is closed."""
        return self.turns.run(lambda: call(self.check_open()))

    @property
    def scheduler(self) -> Scheduler | None:
        """The loop's, which other threads may tell to cancel a request. None once the engine is closed."""
        loop: DecodeLoop | None = getattr(self, "loop", None)
        return loop.scheduler if loop else None

    def _jobs(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_error: Literal["raise", "return"],
    ) -> tuple[list[Job], dict[int, str]]:
        """The answers asked for, and by prompt index why some are none."""
        self.check_open()
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
            raise EngineError("prompts is one prompt: put it in a list, [prompt]")
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise EngineError(f"there are {len(prompts)} prompts and {len(each)} params: give one for all, or one each")
        jobs, refused = [], {}
        for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
            try:
                jobs += [Job(request, index, sample) for sample, request in enumerate(self.requests(prompt, wanted))]
            except EngineError as error:
                if on_error == "raise":
                    raise EngineError(_about(index, len(prompts), str(error))) from error
                refused[index] = str(error)
        return jobs, refused

    def _stream(self, jobs: Sequence[Job]) -> Iterator[Chunk]:
        inbox: deque[StepOutput] = deque()
        waiting, running = deque(jobs), dict[Request, Job]()
        try:
            while waiting or running or inbox:
                if not inbox:
                    self._advance(inbox, waiting, running)
                    continue
                output = inbox.popleft()
                job = running[output.request]
                if output.finish_reason:
                    del running[output.request]
                yield Chunk.of(output, job.index, job.sample)
        finally:
            self.drop(running)

    def _advance(self, inbox: deque[StepOutput], waiting: deque[Job], running: dict[Request, Job]) -> None:
        """Queue what there is room for, and advance the loop unless another thread has done so meanwhile."""
        turn = self.turns.new()
        with turn.lock:
            turn.wait()
            if inbox:
                return
            self.check_open()
            while waiting and self.loop.scheduler.has_room:
                job = waiting.popleft()
                job.request.sink, running[job.request] = inbox.append, job
                self.loop.submit([job.request])
            self.loop.step()

    def drop(self, requests: Collection[Request]) -> None:
        """End requests: now if the loop is free and ours alone, else before its next step."""
        scheduler = self.scheduler
        if scheduler is None or not requests:
            return
        for request in requests:
            scheduler.cancel(request)
        if self.config.tensor_parallel > 1:
            return
        turn = self.turns.new()
        with turn.lock:
            if turn.wait(blocking=False):  # it may be this very thread that has one, collecting garbage
                scheduler.sweep()

    def save_prefix(self, path: str | Path, prompt: Prompt) -> int:
        """Write what has been read of a prompt's beginning to a file, after reading it if that has not happened.

        `load_prefix` takes it up in another process, whose prompts that begin alike need not be read there. Returns how
        many tokens that are: all but the last. Raises EngineError where there is nothing to save or no place to write.
        """
        maker, ids = self._maker(), self.encode(prompt)
        for _ in range(2):
            stored = self._in_turn(lambda loop: loop.memory.stored(ids[:-1], maker))
            if stored and len(stored.tokens) == len(ids) - 1:
                atomically(Path(path), stored.write)
                return len(stored.tokens)
            self.generate([ids], SamplingParams(max_tokens=1))
        raise EngineError("the prompt's beginning was not kept: raise prefix_cache_gb, or give it more than one token")

    def load_prefix(self, path: str | Path) -> int:
        """Keep what a file of `save_prefix` holds. Returns how many tokens that is. Raises EngineError, with nothing changed,
        for files that are damaged or that another model, version, device or drafter made."""
        stored = StoredPrefix.read(Path(path), self._maker())
        self._in_turn(lambda loop: loop.memory.restore(stored))
        return len(stored.tokens)

    def _maker(self) -> str:
        """What must be the same for a saved beginning to be of use."""
        if self.config.tensor_parallel > 1:
            raise EngineError("a file holds the beginnings that one process has read, and here several share them")
        if not self.config.prefix_cache or self._files is None:
            raise EngineError(
                "beginnings are kept in files by the prefix cache, and this engine has none: prefix_cache=True"
            )
        return prefix_maker(self._files, self.model_config, self.config, self.check_open().work.drafter.reread)

    def undrafted(self, **changes: Any) -> "Engine":
        """An engine over the same weights that never drafts, nor keeps what it has read: a loop of its own, with one row
        per request in every step.

        changes: of the EngineConfig's fields that a loop is made from, such as max_batch."""
        self.check_open()
        config = replace(
            self.config, drafter="root", tree=None, verifier="match", candidates="auto", prefix_cache=False, **changes
        )
        slots, tokenizer, ranks = config.max_batch, self.tokenizer, self.team.ranks(**changes)
        loop = make_loop(self.model, RootDrafter(), config, self.backend, slots=slots, tokenizer=tokenizer, ranks=ranks)
        return Engine(self.model, loop, tokenizer, config, self.backend, team=self.team)

    def plain(self, prompt: Prompt, params: SamplingParams) -> Request:
        """The finished request of one prompt, decoded without drafting on a loop of its own."""
        with self.undrafted(max_batch=1) as plain:
            request = plain.loop.add(self.encode(prompt), replace(params, n=1))
            while request.finish_reason is None:
                plain.loop.step()
        return request

    def compare(self, prompt: Prompt, params: SamplingParams, answer: Generation, *, full: bool) -> None:
        """Measure plain decoding of the same prompt beside drafted decoding, and note it in the answer's statistics.

        full decodes all of it and checks that the tokens are identical; otherwise some seconds must do.
        """
        ids, again = self.encode(prompt), replace(params, n=1, seed=answer.stats.seed, timeout=None)
        with self.undrafted(max_batch=1) as plain:
            sides = [engine._contender(ids, again) for engine in (plain, self)]
            comparison, said = take_turns(*sides, whole=full)
        answer.stats.comparison = comparison if comparison.turns else None
        answer.stats.identical_to_plain = said == answer.token_ids if full else None

    def _contender(self, ids: Sequence[int], params: SamplingParams) -> Contender:
        """This engine's loop, which other threads may use too."""
        return Contender(
            start=lambda: self._in_turn(lambda loop: loop.add(ids, params)),
            step=lambda: self._in_turn(lambda loop: loop.step()),
            settle=lambda: self._in_turn(lambda loop: loop.runner.settle()),
            drop=lambda request: self.drop([request]),
        )


def _about(index: int, prompts: int, error: str) -> str:
    return error if prompts == 1 else f"prompt {index}: {error}"
