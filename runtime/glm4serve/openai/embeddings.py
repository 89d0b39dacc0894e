"""``POST /v1/embeddings``: of bundles built with ``--task features --pooling``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glm4runtime.contract import UserError
from glm4serve.errors import ApiError, told
from glm4serve.event_stream import disconnected
from glm4serve.json_route import JsonRoute
from glm4serve.openai.embedding_request import EmbeddingRequest
from glm4serve.service import note, service_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, http: HttpRequest) -> Response:
    """One embedding for each text."""
    embedder = service_of(http).models.embedder(body.model)
    work = asyncio.ensure_future(embedder.embed(body.texts()))
    gone = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
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
    return JSONResponse(body.answer(embedder, found))
