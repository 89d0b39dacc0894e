"""One replica: engines of its own, and the application over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4runtime import load_encoder
from glm4runtime.contract import read_manifest
from glm4serve import logs
from glm4serve.app import create_app
from glm4serve.health import healthy
from glm4serve.settings import Settings

if TYPE_CHECKING:
    from glm4runtime.encoder import Encoder
    from glm4runtime.engine import Engine

#: What is sent over of a request: the rest of an ASGI scope belongs to the server that made it.
SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
_OF_ENCODERS = ("provider", "threads", "max_seq_len", "device_id", "gpu_mem_limit")  # of Engine.load's arguments
_LEAVE = 5.0  # seconds in which the application lets go of what a client has left


@dataclass(frozen=True)
class Served:
    """What every replica opens: plain data, which goes to other machines. Folders are there under the same paths."""

    bundles: dict[str, Path]  # by the models' names
    engine: dict[str, Any]  # arguments of Engine.load
    settings: Settings
    adapters: dict[str, dict[str, Path]] = field(default_factory=dict)  # of each bundle, by their names

    def open(self) -> dict[str, Engine | Encoder]:
        """Raises UserError or BundleError as Engine.load and load_encoder do."""
        from glm4runtime.engine import Engine

        models: dict[str, Engine | Encoder] = {}
        for name, folder in self.bundles.items():
            if read_manifest(folder).kv_cache is None:
                shared = {key: self.engine[key] for key in _OF_ENCODERS if key in self.engine}
                models[name] = load_encoder(folder, **shared)
            else:
                models[name] = Engine.load(folder, adapters=self.adapters.get(name), **self.engine)
        return models


class Replica:
    """A Ray Serve deployment's class."""

    def __init__(self, served: Served) -> None:
        """Opens the bundles; Ray sends requests once this is done."""
        from ray.serve import get_replica_context

        self._id = get_replica_context().replica_id.unique_id
        logs.configure()
        self._models = served.open()
        self._app = create_app(self._models, served.settings)

    async def check_health(self) -> None:
        """Ray puts another replica in the place of one that raises here: the engine's own health."""
        if not healthy(self._app.state.service):
            raise RuntimeError("an engine of this replica has died, or doesn't come round")

    async def answer(self, blocks: tuple[bytes, ...], scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        """The application's answer to one request, as ASGI's messages. blocks: for the router alone.

        The head goes with the first part of the body: until then a request may be given to another replica.
        """
        messages: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        task = asyncio.ensure_future(self._run(scope, body, messages, gone))
        try:
            head = None
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    found = (pair for pair in message["headers"] if pair[0] != b"x-request-id")  # Ray adds the same
                    message["headers"] = [*found, (b"x-replica", self._id.encode())]
                    head = message
                    continue
                yield head, message
                head = None
            await task
        finally:  # also where the client has gone: Ray then cancels us
            gone.set()
            await asyncio.wait({task}, timeout=_LEAVE)
            task.cancel()

    async def _run(self, scope: dict[str, Any], body: bytes, messages: asyncio.Queue[Any], gone: asyncio.Event) -> None:
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)
