"""An OpenAI-compatible server: /v1/chat/completions with images, /v1/models, /health, /metrics and /docs."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve import docs_page
from minigpt4.serve.access import OriginCheck
from minigpt4.serve.api_requests import ApiError, Body, Limits
from minigpt4.serve.clients import ApiKeys, RateLimit
from minigpt4.serve.completions import Completions
from minigpt4.serve.engine import Engine
from minigpt4.serve.metrics import AccessLog, Metrics

_DESCRIPTION = "An OpenAI-compatible server of one MiniGPT-4 model; use any OpenAI client with this address and /v1."


def build_app(
    engine: Engine,
    name: str,
    limits: Limits,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
    api_keys: str | Path | None = None,
    rate_limit: int | None = None,
    defaults: GenerationOptions | None = None,
) -> AccessLog:
    """Builds the server of the model ``name``; ``host`` and ``origins`` are those of ``OriginCheck``.

    Clients have to send ``api_key`` or one of the file ``api_keys``, if there are any, as a bearer token. Each key, or
    each address where there are none, may send ``rate_limit`` requests per minute. ``defaults`` are the options of
    requests that do not set them. Raises UserError for a key that no client could send and for a wrong file.
    """
    metrics, options = Metrics(engine), defaults or GenerationOptions()
    completions = Completions(engine, name, limits, metrics, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        completions.decoder.close()

    urls = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title=f"MiniGPT-4: {name}", description=_DESCRIPTION, **urls, lifespan=lifespan)
    _add_error_handlers(app)
    _add_routes(app, completions, ApiKeys(api_key, api_keys), RateLimit(rate_limit))
    _add_docs(app)
    return AccessLog(OriginCheck(app, host, origins), metrics)


def _add_routes(app: FastAPI, completions: Completions, keys: ApiKeys, rate: RateLimit) -> None:
    engine, name = completions.engine, completions.name
    model = {"id": name, "object": "model", "created": 0, "owned_by": "minigpt4"}

    def identify(request: Request) -> str:
        client, request.state.client = keys.identify(request)
        return client

    @app.get("/health")
    def health(request: Request) -> JSONResponse:  # in a thread of its own, as it may ask the language model's server
        """Says whether questions are answered, and how many wait; needs no key. Otherwise the status is 503."""
        problem, status = engine.problem, {"model": name, "waiting": engine.stats.num_waiting}
        if problem:
            error = ApiError(problem, status=503, code="unavailable")
            request.state.reason = error.code
            return JSONResponse({"status": "failed", "problem": problem} | status, error.status, error.headers)
        return JSONResponse({"status": "ok"} | status)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """Lists the model."""
        identify(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def find_model(request: Request) -> dict[str, Any]:
        """Describes the model."""
        identify(request)
        completions.check_model(request.path_params["model_id"])
        return model

    @app.get("/metrics")
    async def numbers(request: Request) -> PlainTextResponse:
        """Numbers for Prometheus."""
        identify(request)
        return PlainTextResponse(completions.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_body_schema())
    async def complete(request: Request) -> StreamingResponse | JSONResponse:
        """Answers a conversation about images."""
        client = identify(request)
        rate.count(client)
        return await completions.create(request, client)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        request.state.reason = error.code
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see /docs."
        code = request.state.reason = "method_not_allowed" if error.status_code == 405 else "not_found"
        return JSONResponse(ApiError(text, code=code).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def on_failure(request: Request, _: Exception) -> JSONResponse:
        request.state.reason = "internal"
        return JSONResponse(
            ApiError("The server failed; its log has the reason.", status=500, code="internal").body, 500
        )


def _body_schema() -> dict[str, Any]:
    """What FastAPI does not see, because requests are read within limits."""
    schema = {"$ref": f"#/components/schemas/{Body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_docs(app: FastAPI) -> None:
    """Adds /openapi.json and /docs, which need no key, as they are the same for every server."""
    schema = app.openapi()
    body = Body.model_json_schema(ref_template="#/components/schemas/{model}")
    models = body.pop("$defs")
    schema.setdefault("components", {})["schemas"] = {Body.__name__: body, **models}
    page = docs_page.render(schema)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return schema

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers=docs_page.POLICY)
