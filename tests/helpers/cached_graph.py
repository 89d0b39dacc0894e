"""Shared by tests: CachedGraph, a graph with a cache in onnxruntime as programs without our runtime drive it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from glm4runtime.contract import past_name, present_name, read_manifest


class CachedGraph:
    """A bundle's prefill or decode graph and its cache, of ``max_seq`` rows; 0 for one that grows run by run."""

    def __init__(self, bundle: Path, graph: str, batch: int, max_seq: int = 16) -> None:
        cache = read_manifest(bundle).cache
        self.session = ort.InferenceSession(bundle / f"{graph}.onnx")
        pairs = [(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
        self._presents = [present_name(*pair) for pair in pairs]
        shape = (batch, cache.kv_heads, max_seq, cache.head_dim)
        self._past = {past_name(*pair): np.zeros(shape, cache.dtype) for pair in pairs}

    def run(self, **feed: np.ndarray) -> dict[str, np.ndarray]:
        """Every output but the cache, which moves on, by name."""
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, {**feed, **self._past}), strict=True))
        presents = [found.pop(name) for name in self._presents]
        self._past = dict(zip(self._past, presents, strict=True))
        return found
