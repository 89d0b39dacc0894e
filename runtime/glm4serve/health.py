"""What balancers, dashboards and operators ask: ``/health``, ``/ready``, ``/metrics``, ``/slots``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4serve.errors import ApiError
from glm4serve.service import Service, service_of

router = APIRouter()


def healthy(service: Service) -> bool:
    """Whether every engine's thread lives and comes round."""
    return all(_state(service, name)["healthy"] for name in service.models.generators)


@router.get("/health")
async def health(http: Request) -> JSONResponse:
    """200 while every engine's thread lives and comes round; else 503."""
    service = service_of(http)
    models = {name: _state(service, name) for name in service.models.generators}
    well = all(state["healthy"] for state in models.values())
    return JSONResponse({"status": "ok" if well else "unhealthy", "models": models}, 200 if well else 503)


@router.get("/ready")
async def ready(http: Request) -> JSONResponse:
    """200 while new requests are taken: all is well, and the service isn't being shut down."""
    service = service_of(http)
    well = healthy(service)
    status = "draining" if service.draining else "ready" if well else "unhealthy"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(http).metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/slots")
async def slots(http: Request) -> JSONResponse:
    """Who has slots and who waits, by key; only where the settings allow it."""
    service = service_of(http)
    if not service.settings.slots_page:
        raise ApiError(404, "/slots is off; the server's --slots-page turns it on", code="not_found")
    found = []
    for generator in service.models.generators.values():
        stats = generator.engine.stats()
        now = stats.scheduler
        found.append(
            {
                "model": generator.name,
                "slots": stats.slots,
                "running": now.running,
                "prefilling": now.prefilling,
                "waiting": now.waiting,
                "waiting_by_key": now.queued,
                "prefill_tokens_per_second": now.prefill_tokens_per_second,
                "decode_runs_per_second": now.decode_runs_per_second,
            }
        )
    return JSONResponse(found)


def _state(service: Service, name: str) -> dict[str, Any]:
    stats = service.models.generators[name].engine.stats()
    well = stats.healthy and stats.last_step_age < service.settings.stall_limit
    return {"healthy": well, "last_step_age": round(stats.last_step_age, 3)}
