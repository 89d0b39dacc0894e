"""``POST /v1/embeddings``: of bundles built with ``--task features --pooling``."""

from __future__ import annotations

import asyncio

import anyio.to_thread
from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4runtime.contract import UserError
from glm4serve.errors import ApiError, timed_out, told
from glm4serve.event_stream import disconnected
from glm4serve.json_route import JsonRoute
from glm4serve.openai.embedding_request import EmbeddingRequest
from glm4serve.service import note, service_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, http: HttpRequest) -> Response:
    """One embedding for each text."""
    service = service_of(http)
    embedder = service.models.embedder(body.model)
    work = asyncio.ensure_future(embedder.embed(body.texts()))
    gone = asyncio.ensure_future(disconnected(http.receive))
    try:
        timeout = service.settings.request_timeout
        done, _ = await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise timed_out("the request's time was over before its texts were embedded")
        if not work.done():
            raise ApiError(499, "the client went away", code="client_gone")
        found = work.result()
    except UserError as error:
        raise told(error, "input") from error
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.wait({work, gone})
    note(http, model=embedder.name, prompt_tokens=found.tokens, texts=len(found.rows))
    # Rust's writer: Python's holds up the event loop for seconds where there are thousands of texts
    content = await anyio.to_thread.run_sync(lambda: to_json(body.answer(embedder, found)))
    return Response(content, media_type="application/json")
