"""``POST /v1/completions``: text that goes on."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4serve.answering import answered
from glm4serve.json_route import JsonRoute
from glm4serve.openai.completion_request import CompletionRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
    """How prompts go on, whole or as events."""
    return await answered(http, body)
