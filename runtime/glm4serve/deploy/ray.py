"""The service under Ray Serve: replicas on one machine or many, each with engines of its own.

>>> from glm4serve import Settings
>>> from glm4serve.deploy import ray
>>> served = ray.Served({"glm-4-9b": Path("glm-4-9b")}, {"slots": 8, "threads": 8}, Settings())
>>> application = ray.application(served, ray.Scale(2, 6))  # for serve.run, or a config file of Ray Serve's

A request comes to Ray's proxy, from there to a front (:mod:`glm4serve.deploy.ray_front`), which reads it and asks a
replica (:mod:`glm4serve.deploy.ray_replica`) that :mod:`glm4serve.deploy.ray_router` chooses.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm4runtime import signals
from glm4runtime.contract import UserError, installing
from glm4serve import logs
from glm4serve.deploy.ray_replica import Served

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["NAME", "Scale", "Served", "application", "require_ray", "serve"]

NAME = "glm4"  # of the application in Ray Serve
_REPLICA = "replica"  # of the deployment
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

    slots, queue = served.engine.get("slots", 8), served.engine.get("max_queue", 64)
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
        handle = serve.get_deployment_handle(_REPLICA, app_name=NAME).options(method_name="answer", stream=True)
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


def serve(served: Served, scale: Scale, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Run the service on a cluster until a signal ends it; without ``RAY_ADDRESS``, on one of this machine's own.

    ready: told the address, once it answers. On SIGINT, SIGTERM or SIGHUP no more requests are taken, and those under
    way have ``scale.drain`` seconds; a second signal, or one before it is ready, ends this process at once, and a
    cluster of its own with it.

    Raises UserError where Ray isn't installed, or no replica comes up.
    """
    app = application(served, scale)
    import ray
    from ray import serve as ray_serve

    up, asked = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set() or not up.is_set():
            signals.leave(128 + number)
        asked.set()

    own = not os.environ.get("RAY_ADDRESS")
    try:
        ray.init(**({"include_dashboard": False} if own else {}))
    except Exception as error:  # of many kinds, Exception itself among them
        raise UserError(f"Ray: {'no cluster could be started' if own else 'no cluster there'}: {error}") from error
    if own:
        _require_cpus(served, scale, ray.cluster_resources().get("CPU", 0))
    before = {number: signal.signal(number, on_signal) for number in signals.ENDING}
    try:
        ray_serve.start(http_options={"host": host, "port": port})
        try:
            front = ray_serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise UserError(f"Ray Serve: the service didn't come up: {error}") from error
        up.set()
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        while not asked.wait(1.0):
            pass
        logs.event("draining", seconds=scale.drain)
        front.drain.remote(scale.drain).result()
        ray_serve.delete(NAME)
        if own:  # elsewhere others may have applications too
            ray_serve.shutdown()
    finally:
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_cpus(served: Served, scale: Scale, found: float) -> None:
    """A cluster of this machine alone never grows: Ray would wait for ever. Ends it, and raises UserError."""
    needed = scale.least * (served.engine.get("threads") or 1)
    if needed > found:
        import ray

        ray.shutdown()
        raise UserError(
            f"{scale.least} replicas of {needed // scale.least} threads take {needed} CPUs, and this machine has "
            f"{found:.0f}; take fewer of either, or name a cluster in RAY_ADDRESS"
        )
