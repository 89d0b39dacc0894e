"""Traces kept from test to test, and shared by pytest-xdist's workers: they compile one model in many ways.

Tracing takes nearly all of a small build's time. The compiler keeps none: a build traces each of its graphs once, and
forty layers of them would stay in memory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch

from glm4export.build import build
from glm4export.graph.trace import _register_schemas, trace, trace_encoder
from glm4graphs.config import Glm4Config, Rope
from glm4graphs.encoder import Encoding


@contextmanager
def kept_traces(folder: Path) -> Iterator[None]:
    """Inside it, this process's builds keep their traces in ``folder``, which other processes may use too."""
    loaded: dict[str, ir.Model] = {}

    def keeping(make: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
        def kept(config: Glm4Config, what: str | Encoding, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
            # what a trace knows of a rope is how many columns are rotated; the tables are data, of any length
            rope = Rope(1.0, config.rope.partial_rotary_factor)
            traced = dataclasses.replace(config, rope=rope, max_position_embeddings=1)
            key = repr((traced, what, dtype))
            if key not in loaded:
                path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
                with path.with_suffix(".lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not path.exists():
                        _save(make(traced, what, dtype=dtype, max_seq_len=max_seq_len), path)
                loaded[key] = _load(path)
            model = loaded[key].clone()
            for name in ("model.rotary_cos", "model.rotary_sin"):
                table = model.graph.initializers[name]
                assert table.shape is not None
                table.shape = ir.Shape([max_seq_len, table.shape[1]])
            return model

        return kept

    folder.mkdir(exist_ok=True)
    _register_schemas()  # as tracing does, and reading what another process traced does not
    with mock.patch.multiple(build, trace=keeping(trace), trace_encoder=keeping(trace_encoder)):
        yield


def _save(model: ir.Model, path: Path) -> None:
    """Weights have no data to save: the file tells of data elsewhere, which nobody reads."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.TensorProtocol) and getattr(tensor.raw, "is_meta", False):
            value.const_value = ir.ExternalTensor(
                "nowhere", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
            )
    ir.save(model, path)


def _load(path: Path) -> ir.Model:
    """ONNX stores an attribute as float32: 1e-5 is read as 9.999999747378752e-06, and gets its short form again."""
    model = ir.load(path)
    for node in model.graph:
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.FLOAT:
                node.attributes[name] = ir.AttrFloat32(name, float(str(np.float32(attribute.value))))
    return model
