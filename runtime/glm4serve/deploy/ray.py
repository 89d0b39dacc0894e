"""The service under Ray Serve: replicas on one machine or many, each with engines of its own.

>>> from glm4serve import Settings
>>> from glm4serve.deploy import ray
>>> served = ray.Served({"glm-4-9b": Path("glm-4-9b")}, {"slots": 8, "threads": 8}, Settings())
>>> application = ray.application(served, ray.Scale(2, 6))  # for serve.run, or a config file of Ray Serve's

A request comes to Ray's proxy, from there to a front (:mod:`glm4serve.deploy.ray_front`), which reads it and asks a
replica (:mod:`glm4serve.deploy.ray_replica`) that :mod:`glm4serve.deploy.ray_router` chooses.
:mod:`glm4serve.deploy.ray_cluster` runs it for ``glm4export serve --ray``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm4runtime.contract import UserError, installing
from glm4serve.deploy.ray_replica import Served

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["Scale", "Served", "application", "require_ray"]

_REPLICA = "replica"  # the deployment's name
_UPSCALE = 10.0  # seconds that requests wait before there is one more replica; ten minutes of less before one goes
_CUT = 5.0  # seconds for replicas that don't end


@dataclass(frozen=True)
class Scale:
    """How many replicas: as many as ``most``, or between the two by how many requests there are for each."""

    least: int
    most: int
    drain: float = 30.0  # seconds that answers under way have when a replica is taken away
    gpus: float = 0.0  # of each replica

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UserError(f"replicas: expected 1 <= least <= most, found {self.least} and {self.most}")


def require_ray() -> None:
    """Raises UserError where Ray isn't installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of every cluster otherwise
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # a line for each request is no repetition
    try:
        from ray import serve  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"Ray Serve is not installed ({error}); {installing('ray')}") from None


def application(served: Served, scale: Scale) -> Application:
    """The application for ``serve.run``. Each replica reserves as many CPUs as the engine has ``threads``.

    Raises UserError where Ray isn't installed.
    """
    require_ray()
    from ray import exceptions, serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    from glm4serve.deploy.ray_front import Front, FrontReplica, build
    from glm4serve.deploy.ray_replica import Replica

    # Of a replica, whose bundles have slots and a queue each.
    slots, queue = (
        len(served.bundles) * served.engine.get(name, all) for name, all in (("slots", 8), ("max_queue", 64))
    )
    count: dict[str, Any] = {"num_replicas": scale.most}
    if scale.least < scale.most:
        # Ray counts requests that a replica works on and those that wait: more than it has slots means that some wait.
        count = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least,
                max_replicas=scale.most,
                target_ongoing_requests=slots,
                metrics_interval_s=2,
                look_back_period_s=10,
                upscale_delay_s=_UPSCALE,
            )
        }
    replica = serve.deployment(
        Replica,
        name=_REPLICA,
        ray_actor_options={"num_cpus": served.engine.get("threads") or 1, "num_gpus": scale.gpus},
        max_ongoing_requests=slots + queue + 8,  # the engine's own queue refuses with 429; the rest asks for health
        request_router_config=RequestRouterConfig(
            request_router_class="glm4serve.deploy.ray_router.PrefixRouter", request_router_kwargs={"busy": slots}
        ),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=scale.drain + _CUT,
        **count,
    )
    settings = served.settings
    lost = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
        ReplicaUnavailableError,
        DeploymentUnavailableError,
    )

    def front() -> Front:
        handle = serve.get_deployment_handle(_REPLICA).options(method_name="answer", stream=True)  # of this application
        return build(handle.remote, lost, settings)

    fronts = serve.deployment(
        serve.ingress(front)(FrontReplica),
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=scale.drain + _CUT,
    )
    return fronts.bind(replica.bind(served))
