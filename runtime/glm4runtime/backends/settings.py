"""How a bundle is opened: the arguments of ``glm4runtime.load`` and ``Engine.load``, in one place, checked."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from glm4runtime.contract import UserError, shown

Provider = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "engine"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
MOST_SLOTS = 256  # more are a mistake: a step of so many takes as long as they do one by one
_THREADS_EACH = 16  # of a processor: more are a mistake, not a choice


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`glm4runtime.load`, which says what they mean. Raises UserError for those that fit no bundle.

    What a bundle or a machine has to say of them is asked where it is opened.
    """

    provider: Provider | None = None
    threads: int = 0
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    check_hashes: bool = False
    invariant: bool = False
    huge_pages: bool = False
    device_id: int | Sequence[int] = 0
    gpu_mem_limit: float | None = None
    cuda_graphs: bool = False
    adapters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.provider is not None and self.provider not in PROVIDERS:
            raise UserError(f"provider {shown(self.provider)} is not known; known: {', '.join(PROVIDERS)}")
        if self.prefill_chunk is not None:
            require_number("prefill_chunk", self.prefill_chunk, 1)
        if self.max_seq_len is not None:
            require_number("max_seq_len", self.max_seq_len)  # the runner tells its range, which is the bundle's
        require_number("threads", self.threads, 0)
        processors = os.cpu_count() or 1
        if self.threads > (most := _THREADS_EACH * processors):
            raise UserError(
                f"threads={shown(self.threads)}: at most {most} on this machine, which has {processors} processors; "
                "0 lets ONNX Runtime choose"
            )
        _require_adapters(self.adapters)
        for name in ("check_hashes", "invariant", "huge_pages", "cuda_graphs"):
            require_switch(name, getattr(self, name))


def require_path(name: str, value: Any) -> None:
    """Raise UserError for what is no path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={shown(value)} is not the path of a folder")


def require_switch(name: str, value: Any) -> None:
    """Raise UserError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is not True or False")


def require_slots(slots: Any) -> None:
    """Raise UserError for a number of sequences at once that no machine has."""
    require_number("slots", slots, 1)
    if slots > MOST_SLOTS:
        raise UserError(f"slots={shown(slots)}: at most {MOST_SLOTS} sequences run at once")


def require_number(name: str, value: Any, least: int | None = None) -> None:
    """Raise UserError for what is no whole number, or below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is not a whole number")
    if least is not None and number < least:
        raise UserError(f"{name}={shown(value)} must be at least {least}")


def _require_adapters(adapters: Any) -> None:
    if adapters is None:
        return
    if not isinstance(adapters, Mapping):
        raise UserError(f"adapters={shown(adapters)} is not a dict of files by name")
    for name, path in adapters.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UserError(f"adapters: {shown(name)} is not a name: a text that can be printed")
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"adapters: {name} is {shown(path)}, expected the path of a file")
