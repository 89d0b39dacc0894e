"""What a service allows."""

from __future__ import annotations

from dataclasses import dataclass

from glm4serve.keys import Keys


@dataclass(frozen=True)
class Settings:
    """Limits of the HTTP side; those of the queue and of prompts are the engine's."""

    keys: Keys | None = None  # None: everybody may ask
    hosts: tuple[str, ...] = ()  # names that a Host header may have; (): any. A page elsewhere can't then pose as ours
    cors_origins: tuple[str, ...] = ()  # pages elsewhere that browsers let read answers
    body_limit: int = 4 << 20  # bytes
    bodies_limit: int = 256 << 20  # bytes of all bodies under way: each is in memory until its answer's end
    body_timeout: float = 30.0  # seconds in which a body must be there
    request_timeout: float | None = 600.0  # seconds from its arrival to an answer's end
    write_timeout: float = 30.0  # seconds that a client may leave what is sent to it unread
    ping: float = 15.0  # seconds without an event after which a comment is sent, for proxies that cut silent streams
    stall_limit: float = 120.0  # seconds without a step after which an engine counts as dead
    embedding_queue: int = 64  # requests for embeddings that may wait
    slots_page: bool = False  # GET /slots
    page: bool = True  # the chat page at /
    otlp_endpoint: str | None = None  # address of a collector that gets a span for each request
