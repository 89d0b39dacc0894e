"""``GET /v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from glm4serve.embedder import Embedder
from glm4serve.models import Generator
from glm4serve.service import service_of

router = APIRouter()


@router.get("/v1/models")
async def models(http: HttpRequest) -> dict[str, Any]:
    """All of them."""
    service = service_of(http)
    return {"object": "list", "data": [_described(model, service.started) for model in service.models]}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: HttpRequest) -> dict[str, Any]:
    """One."""
    service = service_of(http)
    return _described(service.models.find(name), service.started)


def _described(model: Generator | Embedder, created: int) -> dict[str, Any]:
    described = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "glm4export",
        "max_model_len": model.most_tokens,
        "task": "embed" if isinstance(model, Embedder) else "generate",
    }
    if isinstance(model, Generator) and model.base is not None:
        described["parent"] = model.base  # vLLM's name for an adapter's base model
    return described
