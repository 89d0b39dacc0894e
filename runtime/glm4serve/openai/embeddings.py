"""``POST /v1/embeddings``: of bundles built with ``--task features --pooling``."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glm4runtime.contract import UserError
from glm4serve.errors import ApiError, told
from glm4serve.openai.fields import PassedOver
from glm4serve.schema import JsonRoute
from glm4serve.service import note, service_of
from glm4serve.sse import disconnected

router = APIRouter(route_class=JsonRoute)

_MOST_INPUTS = 2048  # OpenAI's

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[int], Field(min_length=1)]


class EmbeddingRequest(PassedOver):
    """OpenAI's without ``dimensions``: all of a model's numbers belong together."""

    model: str | None = Field(None, max_length=256)
    input: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST_INPUTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=_MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    def texts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [list(self.input)]
        return list(self.input)


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, http: HttpRequest) -> Response:
    """One embedding for each text. base64: of little-endian float32."""
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
    as_text = body.encoding_format == "base64"
    data: list[dict[str, Any]] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist(),
        }
        for index, row in enumerate(found.rows)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return JSONResponse({"object": "list", "data": data, "model": embedder.name, "usage": usage})
