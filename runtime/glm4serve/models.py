"""Which bundles are served, and which adapters of theirs, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from glm4runtime.contract import MANIFEST, UserError
from glm4runtime.encoder import Encoder
from glm4serve.embedder import Embedder
from glm4serve.errors import ApiError

if TYPE_CHECKING:
    from glm4runtime.engine import Engine, Handle, Request

_M = TypeVar("_M")
_GUESSES = 7  # of a draft bundle per run, at most: it takes as many as pay


class Generator:
    """A model that writes text: a bundle, or an adapter that its engine has loaded."""

    def __init__(self, name: str, engine: Engine, base: str | None = None) -> None:
        """base: of an adapter, the bundle's name."""
        self.name, self.engine, self.base = name, engine, base
        self._stamp, self._manifest = _stamp(engine.folder), _manifest(engine.folder)

    @property
    def adapter(self) -> str | None:
        """What requests to the engine call it."""
        return None if self.base is None else self.name

    @property
    def bundle_changed(self) -> bool:
        """Whether the bundle's folder holds another one since it was opened, or none. The engine keeps the old one."""
        folder = self.engine.folder
        return _stamp(folder) != self._stamp and _manifest(folder) != self._manifest

    @cached_property
    def fingerprint(self) -> str:
        """Equal for requests that get equal answers for equal seeds: which bundle and adapter it is."""
        parts = [self.engine.manifest.to_json()]
        if self.adapter is not None:
            parts.append(self.engine.adapters[self.adapter])
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def submit(self, request: Request) -> Handle:
        """Have it answered, with the guesses of the engine's draft where it has one. Raises as Engine.submit does."""
        draft = _GUESSES if self.engine.has_draft else 0
        return self.engine.submit(replace(request, adapter=self.adapter, draft=draft))

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer together."""
        return self.engine.max_seq_len


class Models:
    """The models by name. Without a name, a request means the only one of its kind."""

    def __init__(self, served: Mapping[str, Engine | Encoder], *, queue: int) -> None:
        """queue: requests that may wait for an encoder. An engine's adapters are models of their own names.

        Raises UserError where nothing is served, or two models have one name.
        """
        if not served:
            raise UserError("models: expected at least one bundle to serve")
        self.generators: dict[str, Generator] = {}
        self.embedders: dict[str, Embedder] = {}
        for name, model in served.items():
            if isinstance(model, Encoder):
                self.embedders[name] = Embedder(name, model, queue)
            else:
                self.generators[name] = Generator(name, model)
        for base in self.bundles:
            for name in base.engine.adapters:
                if name in self.generators or name in self.embedders:
                    raise UserError(f"models: an adapter and another model are both called {name}; rename one of them")
                self.generators[name] = Generator(name, base.engine, base.name)

    @property
    def bundles(self) -> list[Generator]:
        """Those that write text without an adapter: one for each engine."""
        return [generator for generator in self.generators.values() if generator.base is None]

    def changed(self) -> list[str]:
        """The names of bundles whose folders hold others since they were opened, or none. Asks the file system."""
        return [generator.name for generator in self.bundles if generator.bundle_changed]

    def __iter__(self) -> Iterator[Generator | Embedder]:
        yield from self.generators.values()
        yield from self.embedders.values()

    def generator(self, name: str | None) -> Generator:
        """Raises ApiError: 404 for a name that isn't served, 400 for one that writes no text."""
        if name is None and len(self.bundles) == 1:  # adapters are asked for by name
            return self.bundles[0]
        return _found(name, self.generators, self.embedders, "gives embeddings, no text")

    def embedder(self, name: str | None) -> Embedder:
        """The same for embeddings."""
        return _found(name, self.embedders, self.generators, "writes text, and gives no embeddings")

    def find(self, name: str | None) -> Generator | Embedder:
        """Of either kind. Raises ApiError."""
        known: dict[str, Generator | Embedder] = {**self.generators, **self.embedders}
        return _found(name, known, {}, "")


def _found(name: str | None, wanted: Mapping[str, _M], others: Mapping[str, object], instead: str) -> _M:
    if name is None and len(wanted) == 1:
        return next(iter(wanted.values()))
    if name is None and not wanted and others:
        name = next(iter(others))
    if name is not None and name in wanted:
        return wanted[name]
    if name in others:
        raise ApiError(400, f"model: {name!r} {instead}", code="wrong_model", param="model")
    known = ", ".join([*wanted, *others])
    found = "none was named" if name is None else f"there is no {name[:100]!r}"
    raise ApiError(404, f"model: {found}; served: {known}", code="model_not_found", param="model")


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """Which file a bundle's manifest is; None where there's none. A build never writes into one that is there."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _manifest(folder: Path) -> bytes | None:
    """What tells a bundle from any other, by its files' hashes; None where there's none in the folder."""
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return None
