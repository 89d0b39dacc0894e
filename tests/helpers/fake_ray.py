"""``ray`` and ``ray.serve`` as far as we start, watch and end an application: a cluster that is told what to be."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Cluster:
    """``log``: what was asked of it. ``applications``: by name, as Ray Serve's status. ``run``: what deploying does,
    once the application is there; ``on_run``, ``on_start``: what happens before.
    """

    def __init__(self, *, cpus: int = 8, proxies: bool = False) -> None:
        self.cpus, self.proxies = cpus, proxies
        self.applications: dict[str, Any] = {}
        self.log: list[Any] = []
        self.run: Callable[[], None] = lambda: None
        self.on_run: Callable[[], None] = lambda: None
        self.on_start: Callable[[], None] = lambda: None
        self.on_status: Callable[[], None] = lambda: None
        self.drained: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what ``import ray`` finds."""
        ray, serve = ModuleType("ray"), ModuleType("ray.serve")
        config, errors, exceptions = (ModuleType(f"ray.{name}") for name in ("serve.config", "serve.exceptions", "ex"))
        for module, found in (
            (ray, {"init": self._init, "shutdown": lambda: self.log.append("left"), "serve": serve}),
            (ray, {"cluster_resources": lambda: {"CPU": self.cpus}, "exceptions": exceptions}),
            (serve, {"start": self._start, "run": self._run, "status": self._status, "delete": self._delete}),
            (serve, {"shutdown": lambda: self.log.append("serve ended"), "deployment": self._deployment}),
            (serve, {"ingress": lambda app: lambda kind: kind}),
            (config, {"AutoscalingConfig": dict, "RequestRouterConfig": dict}),
            (errors, dict.fromkeys(("DeploymentUnavailableError", "ReplicaUnavailableError"), KeyError)),
            (exceptions, dict.fromkeys(("RayActorError", "WorkerCrashedError", "ObjectLostError"), KeyError)),
        ):
            vars(module).update(found)
        for name, module in (("", ray), (".serve", serve), (".serve.config", config), (".serve.exceptions", errors)):
            monkeypatch.setitem(__import__("sys").modules, f"ray{name}", module)

    def _init(self, **settings: Any) -> None:
        self.log.append(("init", settings))

    def _start(self, *, http_options: dict[str, Any]) -> None:
        self.on_start()
        self.proxies = True
        self.log.append(("start", http_options))

    def _run(self, app: Any, *, name: str, route_prefix: str) -> Any:
        self.on_run()
        self.log.append(("run", name))
        self.applications[name] = SimpleNamespace(deployments={"replica": SimpleNamespace(message="")})
        self.run()
        return SimpleNamespace(drain=SimpleNamespace(remote=self._drain))

    def _drain(self, seconds: float) -> Any:
        self.log.append(("drain", seconds))
        return SimpleNamespace(result=self._drained)

    def _drained(self) -> None:
        if self.drained is not None:
            raise self.drained

    def _status(self) -> Any:
        self.on_status()
        return SimpleNamespace(applications=dict(self.applications), proxies={"node": "well"} if self.proxies else {})

    def _delete(self, name: str) -> None:
        self.log.append(("delete", name))
        self.applications.pop(name, None)

    def _deployment(self, kind: Any, *, name: str, **options: Any) -> Any:
        self.log.append((name, options))
        return SimpleNamespace(bind=lambda *_: name)
