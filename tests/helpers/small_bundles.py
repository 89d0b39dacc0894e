"""Bundles of a few bytes: as much as replacing them looks at."""

from __future__ import annotations

import hashlib
from pathlib import Path

from glm4runtime.contract import GEOMETRY, MANIFEST, WEIGHTS, CacheSpec, FileSpec, GraphSpec, Manifest, TokenIds

Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, *files: str, producer: str = "glm4export") -> None:
    """A bundle whose manifest lists ``files``, weights and graphs; each file holds its own name."""
    folder.mkdir(exist_ok=True, parents=True)
    graphs = {name: GraphSpec(f"{name}.onnx", (), ()) for name in ("prefill", "decode")}
    listed = {}
    for name in (WEIGHTS, *(spec.file for spec in graphs.values()), *files):
        data = f"{name} {files}".encode()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        listed[name] = FileSpec(len(data), hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        producer=producer,
        producer_version="0",
        family="glm4",
        task="causal-lm",
        target="cpu",
        precision="fp32",
        vocab_size=8,
        config=dict.fromkeys(GEOMETRY, 8),
        source={},
        tokens=TokenIds((1,), None, None),
        kv_cache=CacheSpec(1, 1, 1, "float32", 8),
        graphs=graphs,
        files=listed,
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def bundle_names(*files: str) -> list[str]:
    """What :func:`fill` makes."""
    return sorted([MANIFEST, WEIGHTS, "prefill.onnx", "decode.onnx", *files])
