"""A server over a fake engine: ``python -m tests.helpers.fake_server PAUSE DRAIN``; prints its address."""

from __future__ import annotations

import sys

from glm4runtime.engine import Request
from glm4runtime.engine.request import Delta
from glm4serve import Settings, create_app, logs, server
from tests.helpers.fake_engine import FakeEngine, words


def main(pause: float, drain: float) -> int:
    """Answers have as many words as ``max_tokens``; the seed 666 kills the engine."""

    def script(request: Request) -> list[Delta]:
        if request.params.seed == 666:
            engine.die(MemoryError("no more"))
        return words(*["a "] * request.params.max_new_tokens)

    logs.configure()
    engine = FakeEngine(script, pause=pause)
    app = create_app({"m": engine}, Settings())  # type: ignore[dict-item]
    with server.bound_socket("127.0.0.1", 0) as bound:
        return server.serve(app, bound, drain=drain, ready=lambda address: print(address, flush=True))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2])))
