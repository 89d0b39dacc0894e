"""What balancers, dashboards and operators ask: ``/health``, ``/ready``, ``/metrics``, ``/slots``."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4serve.errors import ApiError
from glm4serve.models import Generator
from glm4serve.service import Service, service_of

router = APIRouter()
_LOOK = 1.0  # seconds in which a file system tells whether a bundle was replaced; a stalled one is no ill health


def healthy(service: Service) -> bool:
    """Whether every engine's thread lives and comes round."""
    return all(_state(service, generator)["healthy"] for generator in service.models.bundles)


@router.get("/health")
async def health(http: Request) -> JSONResponse:
    """200 while every engine's thread lives and comes round; else 503."""
    service = service_of(http)
    models = {generator.name: _state(service, generator) for generator in service.models.bundles}
    with anyio.move_on_after(_LOOK):
        for name in await anyio.to_thread.run_sync(service.models.changed, abandon_on_cancel=True):
            models[name]["bundle_changed"] = True  # what is served is what was opened
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
    for generator in service.models.bundles:
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


def _state(service: Service, generator: Generator) -> dict[str, Any]:
    stats = generator.engine.stats()
    reason = None
    if stats.death is not None:
        reason = "its thread has died"  # the log says of what: everybody may ask for health
    elif not stats.healthy:
        reason = "its last runs failed, or it was closed"
    elif stats.last_step_age >= service.settings.stall_limit:
        reason = "it doesn't come round"
    state: dict[str, Any] = {"healthy": reason is None, "last_step_age": round(stats.last_step_age, 3)}
    if reason is not None:
        state["reason"] = reason
    return state
