"""``serve --ray`` on clusters of its own and of other people, from start to end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm4runtime import signals
from glm4runtime.contract import UserError
from glm4serve import Settings
from glm4serve.deploy import ray_cluster
from glm4serve.deploy.ray import Scale, Served, application
from glm4serve.keys import Keys
from tests.helpers.fake_ray import Cluster

SERVED = Served({"m": Path("/m")}, {"slots": 2, "max_queue": 3, "threads": 2}, Settings())
KEYED = replace(SERVED, settings=Settings(keys=Keys({"k-0123456789abcdef": "ann"})))
OTHER = SimpleNamespace(deployments={})


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.logs, "configure", lambda: None)
    monkeypatch.setattr(ray_cluster, "_LOOK", 0.01)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """One that RAY_ADDRESS names."""
    made = Cluster()
    made.install(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    return made


def end(address: str) -> None:
    signal.raise_signal(signal.SIGTERM)


def serve(port: int = 0, ready: Any = end, served: Served = SERVED, host: str = "127.0.0.1") -> int:
    return ray_cluster.serve(served, Scale(2, 2, drain=7), host=host, port=port, ready=ready)


@contextmanager
def answering(text: bytes) -> Iterator[int]:
    """A port at which HTTP has this answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_of_its_own(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own even where somebody else's runs on this machine, which ``ray.init()`` would join."""
    monkeypatch.delenv("RAY_ADDRESS")
    addresses: list[str] = []
    handler = signal.getsignal(signal.SIGTERM)

    def ready(address: str) -> None:
        addresses.append(address)
        signal.raise_signal(signal.SIGTERM)

    assert serve(ready=ready) == 0 and addresses == ["http://127.0.0.1:0"]
    log = [entry for entry in cluster.log if entry[0] not in ("replica", "front")]
    assert log[0] == ("init", {"address": "local", "include_dashboard": False})
    assert log[1] == ("start", {"host": "127.0.0.1", "port": 0})
    assert log[2:] == [("run", "glm4"), ("drain", 7), ("delete", "glm4"), "serve ended", "left"]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (Scale(2, 2), "2 replicas reserve 4 CPUs, 2 each, and this machine has 3"),
        (Scale(1, 5), "5 replicas reserve 10 CPUs, 2 each"),  # which the queue would call for in vain
        (
            Scale(1, 1, gpus=1),
            "1 replicas reserve 1 GPUs, 1 each, and this machine has 0; take fewer replicas, or a l",
        ),
    ],
)
def test_a_machine_that_is_too_small(
    cluster: Cluster, scale: Scale, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    cluster.cpus = 3
    with pytest.raises(UserError, match=message):
        ray_cluster.serve(SERVED, scale, host="127.0.0.1", port=0, ready=pytest.fail)
    assert cluster.log[-1] == "left" and ("run", "glm4") not in cluster.log


def test_other_applications_stay(cluster: Cluster) -> None:
    cluster.applications["theirs"], cluster.proxies = OTHER, True
    with answering(b"success") as port:
        assert serve(port, served=KEYED) == 0
    assert cluster.applications == {"theirs": OTHER}
    assert cluster.log[-2:] == [("delete", "glm4"), "left"] and "serve ended" not in cluster.log


def test_an_address_that_others_chose_may_be_everybodys(cluster: Cluster) -> None:
    """Ray Serve answers at 127.0.0.1 also where it listens on all of a machine's addresses, and keeps to those."""
    cluster.proxies = True
    with answering(b"success") as port:
        with pytest.raises(UserError, match=r"others chose and may reach; give API keys \(--keys FILE\), or --host 0"):
            serve(port)
        assert not any(entry[0] in ("start", "run", "delete") for entry in cluster.log)
        assert serve(port, host="0.0.0.0") == 0  # which the command line takes with --no-key


def test_what_we_started_there_ends_with_us(cluster: Cluster) -> None:
    """Or its address would be taken when we start again."""
    assert serve() == 0 and cluster.log[-2:] == ["serve ended", "left"]


@pytest.mark.parametrize("text", [b"something else's", b"success, or so"])
def test_an_address_that_is_not_the_clusters(cluster: Cluster, text: bytes) -> None:
    cluster.proxies = True
    with answering(text) as port, pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} isn't its address"):
        serve(port)
    assert not {("run", "glm4"), ("delete", "glm4")} & {entry for entry in cluster.log if entry[0] in ("run", "delete")}


def test_another_of_ours_is_there(cluster: Cluster) -> None:
    cluster.applications["glm4"], cluster.proxies = OTHER, True
    with pytest.raises(UserError, match=r"an application glm4 is on this cluster already; .*serve\.delete"):
        serve()
    assert cluster.applications == {"glm4": OTHER}


def test_what_a_replica_failed_of_is_told(cluster: Cluster) -> None:
    """A bundle that other machines lack, say: Ray's own message names deployments alone."""

    def fail() -> None:
        cluster.applications["glm4"].deployments[
            "replica"
        ].message = "Error:\n  File ...\nBundleError: /m: no such folder\n"
        raise RuntimeError("Deploying application glm4 failed: Failed to update the deployments ['replica'].")

    cluster.run = fail
    with pytest.raises(UserError, match=r"the service didn't come up: BundleError: /m: no such folder$"):
        serve()
    assert not cluster.applications  # nor does it go on failing there


def test_the_root_is_taken(cluster: Cluster) -> None:
    def fail() -> None:
        raise ValueError("Traceback:\nRayServeException: Prefix / is being used by application theirs")

    cluster.run = fail
    with pytest.raises(UserError, match="Prefix / is being used"):
        serve()


def test_a_signal_while_replicas_are_waited_for(cluster: Cluster) -> None:
    over = threading.Event()
    cluster.run = lambda: (over.wait(60), None)[1]
    looks = 0

    def on_status() -> None:
        nonlocal looks
        if "glm4" in cluster.applications and (looks := looks + 1) == 2:
            signal.raise_signal(signal.SIGINT)

    cluster.on_status = on_status
    assert serve(ready=pytest.fail) == 0
    over.set()
    assert not cluster.applications and cluster.log[-3:] == [("delete", "glm4"), "serve ended", "left"]


def test_a_signal_before_anything_is_deployed(cluster: Cluster) -> None:
    cluster.on_start = lambda: signal.raise_signal(signal.SIGTERM)
    assert serve(ready=pytest.fail) == 0
    assert ("run", "glm4") not in cluster.log and cluster.log[-2:] == ["serve ended", "left"]


def test_what_is_deployed_only_after_a_signal_is_removed_too(cluster: Cluster) -> None:
    """On a cluster of other people's nobody else would."""
    looked, ran, looks = threading.Event(), threading.Event(), 0

    def on_run() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        looked.wait(3)

    def on_status() -> None:
        nonlocal looks
        looks += 1
        if looks == 4:  # whether others are there; reasons; twice whether it has come
            looked.set()

    cluster.on_run, cluster.on_status, cluster.run = on_run, on_status, ran.set
    assert serve(ready=pytest.fail) == 0
    assert ran.wait(30) and not cluster.applications


def test_a_signal_while_the_cluster_does_not_say_what_it_waits_for(cluster: Cluster) -> None:
    """Ray's answer is waited for elsewhere than where signals are heard."""
    over, ended = threading.Event(), []
    cluster.run = lambda: (over.wait(60), None)[1]

    def on_status() -> None:
        if "glm4" in cluster.applications:
            cluster.on_status = lambda: None
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            ended.append(over.wait(10))

    cluster.on_status = on_status
    assert serve(ready=pytest.fail) == 0 and not ended
    over.set()


def test_a_front_that_is_lost_at_the_end(cluster: Cluster) -> None:
    cluster.drained = RuntimeError("The actor died")
    assert serve() == 0 and not cluster.applications


def test_an_application_that_somebody_else_ended(cluster: Cluster) -> None:
    """Whoever started us can start us again."""
    assert serve(ready=lambda address: cluster.applications.clear()) == 1


@pytest.mark.parametrize("silent", [True, False])
def test_a_cluster_that_is_gone(cluster: Cluster, silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits for its controller for ever, or can't be asked."""
    over = threading.Event()
    monkeypatch.setattr(ray_cluster, "_LOST", 0.05)

    def on_status() -> None:
        if silent:
            cluster.on_status = lambda: None
            over.wait(60)
        raise RuntimeError("no cluster")

    def ready(address: str) -> None:
        cluster.on_status = on_status

    assert serve(ready=ready) == 1
    over.set()


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_cluster_that_does_not_let_go(
    cluster: Cluster, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process ends all the same, and as it would have."""
    over = threading.Event()
    monkeypatch.setattr(ray_cluster, "_END", 0.05)
    monkeypatch.setattr(signals, "leave", sys.exit)
    monkeypatch.setattr(sys.modules["ray"], "shutdown", lambda: over.wait(60))

    def ready(address: str) -> None:
        if status == 1:
            cluster.applications.clear()
        elif status == 0:
            signal.raise_signal(signal.SIGTERM)
        else:
            raise UserError("what went wrong")

    with pytest.raises(SystemExit) as left:
        serve(ready=ready)
    assert left.value.code == status
    assert capsys.readouterr().err == ("glm4export: error: what went wrong\n" if status == 2 else "")
    over.set()


def test_signals_that_are_ignored_stay_so(cluster: Cluster) -> None:
    """nohup asks for that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers: list[Any] = []

        def ready(address: str) -> None:
            handlers.append(signal.getsignal(signal.SIGHUP))
            signal.raise_signal(signal.SIGTERM)

        assert serve(ready=ready) == 0
        assert handlers == [signal.SIG_IGN] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_cluster_does_not_answer(cluster: Cluster) -> None:
    over = threading.Event()

    def on_status() -> None:
        cluster.on_status = lambda: None
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        over.wait(60)

    def ready(address: str) -> None:
        cluster.on_status = on_status

    assert serve(ready=ready) == 0
    over.set()


def test_replicas_of_two_bundles_have_twice_the_slots(cluster: Cluster) -> None:
    served = Served({"a": Path("/a"), "b": Path("/b")}, SERVED.engine, Settings())
    application(served, Scale(1, 3, gpus=1))
    name, options = cluster.log[0]
    assert name == "replica" and options["max_ongoing_requests"] == 2 * (2 + 3) + 8
    assert options["request_router_config"]["request_router_kwargs"] == {"busy": 4}
    assert options["autoscaling_config"]["target_ongoing_requests"] == 4
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
