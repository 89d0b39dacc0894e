"""``POST /v1/completions``: text that goes on."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glm4runtime.contract import UserError
from glm4serve.answering import submit
from glm4serve.errors import told
from glm4serve.json_route import JsonRoute
from glm4serve.openai.completion_request import CompletionRequest
from glm4serve.service import service_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
    """How prompts go on, whole or as events."""
    generator = service_of(http).models.generator(body.model)
    try:
        requests = body.requests(generator)
    except UserError as error:
        raise told(error) from error
    run, answer = await submit(http, generator, requests, param=body.prompt_field), body.answer(generator)
    return run.stream(answer) if body.streams else JSONResponse(answer.whole(await run.whole()))
