"""An OpenAI-compatible server: /v1/chat/completions with images, /v1/models, /health."""

import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from minigpt4.serve.access import OriginCheck, check_api_key
from minigpt4.serve.api_requests import ApiError, Limits
from minigpt4.serve.completions import Completions
from minigpt4.serve.engine import Engine


def build_app(
    engine: Engine,
    name: str,
    limits: Limits,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
) -> OriginCheck:
    """Builds the server of the model ``name``; ``host`` and ``origins`` are those of ``OriginCheck``.

    Clients have to send ``api_key``, if there is one, as a bearer token. Raises UserError if no client could send it.
    """
    check_api_key(api_key)
    completions = Completions(engine, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        completions.decoder.close()

    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see /v1/chat/completions, /v1/models, /health."
        return JSONResponse(ApiError(text, code="not_found").body, error.status_code)

    async def check_key(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), (api_key or "").encode())
        if api_key is not None and not is_right:
            text = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise ApiError(text, status=401, code="bad_key")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": engine.waiting.qsize()}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "minigpt4"}]}

    @app.post("/v1/chat/completions", response_model=None, dependencies=[Depends(check_key)])
    async def complete(request: Request) -> StreamingResponse | JSONResponse:
        return await completions.create(request)

    return OriginCheck(app, host, origins)
