"""The ASGI app: which path leads where. It may be served as it is, or mounted in another app."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from mtp_engine import __version__
from mtp_engine.async_engine import AsyncEngine
from mtp_engine.engine import Engine
from mtp_engine.serve.chat import chat
from mtp_engine.serve.completions import completions
from mtp_engine.serve.errors import ApiError, handle_errors, json_response
from mtp_engine.serve.gate import Gate
from mtp_engine.serve.limits import Limits
from mtp_engine.serve.openapi import describe
from mtp_engine.serve.prompts import plain_messages, template_args
from mtp_engine.serve.responses import responses
from mtp_engine.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from mtp_engine.serve.service import Service

_PAGE = Path(__file__).parent / "page" / "index.html"
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_app(
    engine: AsyncEngine | Engine, *, name: str | None = None, limits: Limits | None = None,
    api_keys: Sequence[str] = (), hosts: Sequence[str] = (),
) -> FastAPI:  # fmt: skip
    """Everything that `mtp-engine serve` serves, over an engine that stays the caller's to close.

    An Engine is wrapped in an AsyncEngine, which closes it: give an AsyncEngine to close it yourself. name: of the model,
    its folder's by default. api_keys: one of them must come with every request, if there are any. hosts: see Gate.
    The app keeps no state but the engine's and its counters, so that several may share an engine.
    """
    asynchronous = engine if isinstance(engine, AsyncEngine) else AsyncEngine(engine)
    name = name or asynchronous.engine.tokenizer.folder.name
    service = Service(asynchronous, name, limits or Limits())
    app = FastAPI(title="mtp-engine", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    handle_errors(app)
    app.include_router(_answers(service))
    app.include_router(_tokens(service))
    app.include_router(_about(service))
    app.add_middleware(Gate, limits=service.limits, keys=tuple(api_keys), hosts=tuple(hosts))
    description = describe(app)
    app.add_api_route("/openapi.json", lambda: json_response(description), include_in_schema=False)
    return app


def _answers(service: Service) -> APIRouter:
    router = APIRouter(tags=["answers"])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await chat(service, request, asked)

    @router.post("/v1/completions")
    async def text_completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue texts."""
        return await completions(service, request, asked)

    @router.post("/v1/responses")
    async def create_response(request: Request, asked: ResponsesRequest) -> Response:
        """Answer an input; nothing is stored."""
        return await responses(service, request, asked)

    return router


def _tokens(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation in the chat template."""
        service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give one of prompt and messages")
        if asked.messages is not None:
            ids = await service.chat(
                plain_messages(service, asked.messages),
                add_generation_prompt=asked.add_generation_prompt,
                **template_args(asked.chat_template_kwargs),
            )
        else:
            ids = await service.encode(asked.prompt or "", special=asked.add_special_tokens)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_context, "tokens": ids}
        if asked.return_token_strs:
            found["token_strs"] = [service.tokenizer.decode([each], skip_special=False) for each in ids]
        return json_response(found)

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(asked.model)
        if wrong := [token for token in asked.tokens if not 0 <= token < service.vocab]:
            raise ApiError(400, f"token {wrong[0]} is outside the vocabulary of {service.vocab} tokens", param="tokens")
        return json_response({"prompt": service.tokenizer.decode(asked.tokens, skip_special=False)})

    return router


def _about(service: Service) -> APIRouter:
    router = APIRouter(tags=["about"])
    model = {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "mtp-engine",
        "root": service.name, "parent": None, "max_model_len": service.max_context,
    }  # fmt: skip

    @router.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        service.check_model(name)
        return json_response(model)

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine answers, else 503."""
        service.inner.check_open()
        return Response(status_code=200)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

    return router
