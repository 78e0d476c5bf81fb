"""A worker for NVIDIA Dynamo, whose frontend does HTTP, templates, tokens and routing (`mtp-engine dynamo-worker`)."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, final

import uvloop
from dynamo.common.backend.engine import EngineConfig as Registration
from dynamo.common.backend.engine import LLMEngine, LlmRegistration
from dynamo.common.backend.worker import Worker, WorkerConfig

from mtp_engine.async_engine import AsyncEngine
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.runtime.lead import leave
from mtp_engine.serve.migration import Ledger, chunk_of, lost, read

_REASONS = {"stop": "stop", "length": "length", "timeout": "length", "abort": "cancelled", "error": "error"}


@final
class DynamoWorker(LLMEngine):  # type: ignore[misc]
    """Dynamo's interface on our engine. ledger: None where no folder is shared (see migration)."""

    def __init__(self, engine: Engine, name: str, ledger: Ledger | None) -> None:
        self._engine, self._name, self._ledger = AsyncEngine(engine), name, ledger
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        """Dynamo's own way to begin, for which there is our command line instead."""
        raise EngineError("begin it with mtp-engine dynamo-worker")

    async def start(self, worker_id: int) -> Registration:
        """Tell the frontend what there is; the engine is loaded already."""
        inner = self._engine.engine
        self._watch = asyncio.create_task(self._end_with_ranks())
        loop, config = inner.check_open(), inner.config
        limits = LlmRegistration(
            context_length=loop.intake.max_context,
            kv_cache_block_size=config.page_size,
            total_kv_blocks=loop.memory.pages.count,
            max_num_seqs=config.max_batch,
            max_num_batched_tokens=config.prefill_chunk,
        )
        return Registration(model=str(inner.tokenizer.folder), served_model_name=self._name, llm=limits)

    async def _end_with_ranks(self) -> None:
        """A worker that has lost a rank ends, and the frontend moves its requests on."""
        leave(EngineError(await lost(self._engine.engine.team)))

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Token ids out, several at a time. A request that began at another worker goes on where that one was."""
        request_id = str(context.id())
        inner = self._engine.engine
        turn = read(request, request_id, inner.check_open().intake.max_context, self._ledger)
        before = len(request["token_ids"])
        stream = self._engine.stream(turn.prompt, turn.params, request_id=request_id, said=turn.said)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                news = chunk_of(chunk.token_ids, chunk.logprobs)
                if chunk.finished:
                    said = len(chunk.finished.token_ids) - len(turn.said)
                    usage = {"prompt_tokens": before, "completion_tokens": said, "total_tokens": before + said}
                    news |= {"finish_reason": _REASONS[chunk.finished.finish_reason], "completion_usage": usage}
                    self._forget(request_id)
                yield news

    def _forget(self, request_id: str) -> None:
        """It has ended; not where this worker goes down with it, as then another one goes on."""
        if self._ledger:
            self._ledger.end(request_id)

    async def abort(self, context: Any) -> None:
        """The client has left."""
        self._engine.abort(str(context.id()))
        self._forget(str(context.id()))

    async def cleanup(self) -> None:
        if self._watch:
            self._watch.cancel()
        await self._engine.aclose()


def run(engine: Engine, name: str, ledger: Ledger | None, **settings: str) -> None:
    """Serve until a signal comes. settings: of Dynamo's WorkerConfig."""
    config = WorkerConfig(model_name=str(engine.tokenizer.folder), served_model_name=name, **settings)
    uvloop.run(Worker(DynamoWorker(engine, name, ledger), config).run())
