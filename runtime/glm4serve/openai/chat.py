"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4serve.answering import answered
from glm4serve.json_route import JsonRoute
from glm4serve.openai.chat_request import ChatRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
    """An answer to a conversation, whole or as events."""
    return await answered(http, body)
