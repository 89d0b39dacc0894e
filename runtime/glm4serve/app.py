"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from glm4runtime.encoder import Encoder
from glm4serve import health, logs, page, tokens
from glm4serve.anthropic import messages
from glm4serve.errors import INTERNAL, ApiError, invalid
from glm4serve.gate import Gate
from glm4serve.openai import chat, completions, embeddings, listing, responses
from glm4serve.responses import respond
from glm4serve.service import Service
from glm4serve.settings import Settings

if TYPE_CHECKING:
    from glm4runtime.engine import Engine

#: Each protocol's routes. One more is one more module, see docs/serving.md.
ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    embeddings.router,
    listing.router,
    messages.router,
    tokens.router,
    health.router,
)
#: Those without a name in them.
PATHS = frozenset(
    route.path
    for router in (*ROUTERS, page.router)
    for route in router.routes
    if isinstance(route, Route) and not route.param_convertors
)


def create_app(models: Mapping[str, Engine | Encoder], settings: Settings | None = None) -> FastAPI:
    """The application over models by name. It closes none of them.

    An Encoder is used by one thread of the application's, and by nobody else meanwhile. Raises UserError where there
    is no model.
    """
    service = Service(models, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # Pages of documentation load scripts from elsewhere: openapi.json alone is served.
    app = FastAPI(title="glm4export", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router, responses={"4XX": {"description": "An error object."}})
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    if service.settings.page:
        app.include_router(page.router)
    app.add_middleware(Gate, service=service, paths=PATHS, keyless=page.PATHS if service.settings.page else frozenset())
    if service.settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors(service.settings))
    return app


def cors(settings: Settings) -> dict[str, Any]:
    """CORSMiddleware's arguments."""
    return {
        "allow_origins": list(settings.cors_origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "request-id", "retry-after"],
    }


async def _api_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.code == INTERNAL:
        logs.failure(http.scope.get("glm4.id", ""), error)
    return respond(http.url.path, error)


async def _invalid(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return respond(http.url.path, invalid(error.errors(), error.body))


async def _http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{http.method[:20]} {http.url.path[:200]}: {error.detail}"
    return respond(http.url.path, ApiError(error.status_code, message, code=code, headers=error.headers))
