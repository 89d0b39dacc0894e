"""``glm4export serve --ray``: the application on a cluster, from its start until a signal ends it.

A cluster that RAY_ADDRESS names is other people's too: nothing of theirs is replaced or ended, and Ray Serve's address,
of which a cluster has one, is theirs to choose where it runs already.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

from glm4runtime import signals
from glm4runtime.contract import UserError
from glm4serve import logs
from glm4serve.deploy.ray import Scale, Served, application
from glm4serve.deploy.ray_room import require_room
from glm4serve.server import bound_socket, is_loopback

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from glm4serve.keys import Keys

NAME = "glm4"  # of the application in Ray Serve
_LOOK = 5.0  # seconds between two looks at whether the application is still there
_TELL = 5.0  # seconds that the cluster has to say why the service didn't come up
_LOST = 60.0  # seconds without an answer after which the cluster is taken for lost: its parts may be started again
_END = 20.0  # seconds beyond --drain for what we leave behind to go away
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(served: Served, scale: Scale, *, host: str, port: int, ready: Callable[[str], None]) -> int:
    """Run the service on a cluster until a signal ends it; without ``RAY_ADDRESS``, on one of this machine's own.

    ready: told the address, once it answers. On SIGINT, SIGTERM or SIGHUP no more requests are taken, and those under
    way have ``scale.drain`` seconds; where none came up yet, it's over at once. A second signal ends this process as it
    stands, and a cluster of its own with it. Returns the exit status: 1 where the application is gone from the cluster.

    Raises UserError where Ray isn't installed, no replica comes up, the address is another's or, without keys, one that
    others chose, or another application of ours is there.
    """
    app = application(served, scale)
    import ray
    from ray import serve as ray_serve

    logs.configure()
    asked, begun = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set() or not begun.is_set():
            signals.leave(128 + number)
        asked.set()

    own = not os.environ.get("RAY_ADDRESS")
    if own:
        bound_socket(host, port).close()  # told now, and not by Ray's log
    try:
        # By itself it would join a cluster that somebody started on this machine.
        ray.init(**({"address": "local", "include_dashboard": False} if own else {}))
    except Exception as error:  # of many kinds, Exception itself among them
        raise UserError(f"Ray: {'no cluster could be started' if own else 'no cluster there'}: {error}") from error
    found = {number: signal.getsignal(number) for number in signals.ENDING}
    taken = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # nohup asks so
    for number in taken:
        signal.signal(number, on_signal)
    status, failed = 1, None
    try:
        if own:
            each = {"CPU": served.engine.get("threads") or 1, "GPU": scale.gpus}
            require_room("replicas", scale.most, each, "this machine", ray.cluster_resources())
        first = own or _is_first(host, port, served.settings.keys)
        begun.set()
        ray_serve.start(http_options={"host": host, "port": port})
        status = _run(app, asked, first, scale.drain, lambda: ready(f"http://{_shown(host)}:{port}"))
        return status
    except Exception as error:
        status, failed = 2 if isinstance(error, UserError) else 1, error
        raise
    finally:
        _let_go(status, failed)
        for number, handler in taken.items():
            signal.signal(number, handler)


def _run(app: Application, asked: threading.Event, first: bool, drain: float, ready: Callable[[], None]) -> int:
    """Have the application on the cluster, where Ray Serve runs, until a signal; returns the exit status."""
    from ray import serve as ray_serve

    coming: Future[Any] | None = None
    try:
        if not asked.is_set():
            coming = _beside(lambda: ray_serve.run(app, name=NAME, route_prefix="/"))
            if (front := _come_up(coming, asked)) is not None:
                ready()
                if not _still_there(asked):
                    logs.event("ended", by="the cluster: it, or the application on it, is there no more")
                    return 1
                _drain(front, drain)
        return 0
    finally:
        _remove(first, coming)


def _is_first(host: str, port: int, keys: Keys | None) -> bool:
    """Whether Ray Serve doesn't run on the cluster yet. Raises UserError where we can't run beside what runs there."""
    from ray import serve as ray_serve

    there = ray_serve.status()
    if NAME in there.applications:
        raise UserError(
            f"Ray Serve: an application {NAME} is on this cluster already; end the `glm4export serve` that runs it, or "
            f"where that is gone, `python -c 'from ray import serve; serve.delete(\"{NAME}\")'`"
        )
    if not there.proxies:
        bound_socket(host, port).close()
        return True
    if not _is_proxy(host, port):
        raise UserError(
            f"Ray Serve runs on this cluster already, and {_shown(host)}:{port} isn't its address, which holds for all "
            "applications; give that by --host and --port"
        )
    if keys is None and is_loopback(host):  # it answers here also where it listens on all addresses
        raise UserError(
            "Ray Serve runs on this cluster already, at an address that others chose and may reach; give API keys "
            "(--keys FILE), or --host 0.0.0.0 --no-key for everybody"
        )
    return False


def _is_proxy(host: str, port: int) -> bool:
    """Whether Ray Serve answers there."""
    connection = HTTPConnection(_WILDCARDS.get(host, host), port, timeout=5)
    try:
        connection.request("GET", "/-/healthz")
        return connection.getresponse().read(100) == b"success"
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _come_up(coming: Future[Any], asked: threading.Event) -> DeploymentHandle[Any] | None:
    """The front once it's there, or None where a signal came first. Raises UserError where it can't be."""
    look, told = _beside(_reason), ""
    while not coming.done():
        if asked.wait(0.2):
            return None
        if look.done():
            if (reason := _answer(look)) not in ("", told):
                logs.event("waiting for replicas", reason=reason)
                told = reason
            look = _beside(_reason)
    try:
        return coming.result()
    except Exception as error:  # RuntimeError, and Ray's own
        reason = _answer(_beside(_reason)) or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"Ray Serve: the service didn't come up: {reason[:500]}") from error


def _reason() -> str:
    """What Ray says of deployments that aren't well: the last line, since a traceback comes before it."""
    from ray import serve as ray_serve

    found = ray_serve.status().applications.get(NAME)
    messages = [] if found is None else [each.message.strip() for each in found.deployments.values()]
    return "; ".join(message.splitlines()[-1].strip() for message in messages if message)


def _answer(look: Future[str]) -> str:
    """The reason; none where the cluster doesn't tell it."""
    try:
        return look.result(_TELL)
    except Exception:
        return ""


def _still_there(asked: threading.Event) -> bool:
    """Wait for a signal; False where the application, or the cluster, is gone before."""
    from ray import serve as ray_serve

    heard = time.monotonic()
    while not asked.wait(_LOOK):
        status = _beside(ray_serve.status)
        while not status.done() and time.monotonic() - heard < _LOST:
            if asked.wait(0.1):
                return True
        if not status.done():
            return False
        if status.exception() is None:
            heard = time.monotonic()
            if NAME not in status.result().applications:
                return False
        elif time.monotonic() - heard >= _LOST:
            return False
    return True


def _drain(front: DeploymentHandle[Any], seconds: float) -> None:
    logs.event("draining", seconds=seconds)
    try:
        _beside(lambda: front.drain.remote(seconds).result()).result(seconds + _END)
    except Exception as error:  # it died, and its connections with it: there's nobody to wait for
        logs.event("the front is lost", error=type(error).__name__)


def _remove(first: bool, coming: Future[Any] | None) -> None:
    """End the application. first: we started Ray Serve there, which ends too unless others came to use it.

    coming: what has the application started. After a signal it may not have come so far; deleted before, the
    application would stay on the cluster with nobody to end it.
    """
    from ray import serve as ray_serve

    def remove() -> None:
        while coming is not None and not coming.done() and NAME not in ray_serve.status().applications:
            wait({coming}, 0.2)
        ray_serve.delete(NAME)
        if first and not ray_serve.status().applications:
            ray_serve.shutdown()

    try:
        _beside(remove).result(_END)
    except Exception as error:  # the cluster is gone: then so is the application
        logs.event("not removed from the cluster", error=type(error).__name__)


def _let_go(status: int, failed: Exception | None) -> None:
    """Leave the cluster. Where that never ends, Python's own end would wait for it too: then the process ends here."""
    import ray

    try:
        _beside(ray.shutdown).result(_END)
    except Exception:
        if failed is not None:  # nobody else can tell it any more
            print(f"glm4export: error: {failed}", file=sys.stderr)
        signals.leave(status)


def _beside(call: Callable[[], Any]) -> Future[Any]:
    """Run in a thread: what is asked of a cluster that is no more is never answered, and deaf to signals."""
    came: Future[Any] = Future()

    def run() -> None:
        try:
            came.set_result(call())
        except BaseException as error:
            came.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return came


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
