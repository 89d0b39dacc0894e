"""Which bundles are served, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from glm4runtime.contract import UserError
from glm4runtime.encoder import Encoder
from glm4serve.embedder import Embedder
from glm4serve.errors import ApiError

if TYPE_CHECKING:
    from glm4runtime.contract import Manifest
    from glm4runtime.engine import Engine

_M = TypeVar("_M")


@dataclass(frozen=True)
class Generator:
    """A model that writes text."""

    name: str
    engine: Engine

    @cached_property
    def fingerprint(self) -> str:
        """Equal for requests that get equal answers for equal seeds: which bundle it is."""
        return _fingerprint(self.engine.manifest)

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer together."""
        return self.engine.max_seq_len


class Models:
    """The models by name. Without a name, a request means the only one of its kind."""

    def __init__(self, served: Mapping[str, Engine | Encoder], *, queue: int) -> None:
        """queue: requests that may wait for an encoder. Raises UserError where nothing is served."""
        if not served:
            raise UserError("models: expected at least one bundle to serve")
        self.generators: dict[str, Generator] = {}
        self.embedders: dict[str, Embedder] = {}
        for name, model in served.items():
            if isinstance(model, Encoder):
                self.embedders[name] = Embedder(name, model, queue)
            else:
                self.generators[name] = Generator(name, model)

    def __iter__(self) -> Iterator[Generator | Embedder]:
        yield from self.generators.values()
        yield from self.embedders.values()

    def generator(self, name: str | None) -> Generator:
        """Raises ApiError: 404 for a name that isn't served, 400 for one that writes no text."""
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


def _fingerprint(manifest: Manifest) -> str:
    return "fp_" + hashlib.sha256(manifest.to_json().encode()).hexdigest()[:12]
