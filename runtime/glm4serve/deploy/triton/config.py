"""config.pbtxt: what Triton is told of a model, in protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from glm4runtime.contract import MODEL, Manifest
from glm4serve.deploy.triton.tensors import INPUTS, OUTPUTS

_OF_DTYPE = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


def engine_config(name: str, settings: Mapping[str, object]) -> str:
    """Of a language model behind the Python backend. settings: arguments of ``Engine.load``, and ``drain`` in seconds.

    KIND_MODEL: the engine chooses where it computes. One instance: slots and prefix cache are shared by all requests.
    """
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "python"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            _tensors("input", ((key, t.data_type, [t.length]) for key, t in INPUTS.items()), " optional: true"),
            _tensors("output", ((key, t.data_type, [t.length]) for key, t in OUTPUTS.items())),
            "instance_group [ { count: 1 kind: KIND_MODEL } ]",
            *(_parameter(key, value) for key, value in settings.items()),
            "",
        ]
    )


def encoder_config(name: str, manifest: Manifest, most: int) -> str:
    """Of a bundle without a cache behind the ONNX Runtime backend: its graph as it is, ``most`` rows in a run.

    Requests whose rows are equally long are computed together.
    """
    graph = manifest.graphs[MODEL]
    kind = "KIND_GPU" if manifest.target == "cuda" else "KIND_CPU"
    inputs, outputs = (
        _tensors(
            what,
            # Without the batch, which Triton adds
            ((s.name, _OF_DTYPE[s.dtype], [d if isinstance(d, int) else -1 for d in s.dims[1:]]) for s in specs),
        )
        for what, specs in (("input", graph.inputs), ("output", graph.outputs))
    )
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "onnxruntime"',
            f'default_model_filename: "{graph.file}"',
            f"max_batch_size: {most}",
            "dynamic_batching { }",
            inputs,
            outputs,
            f"instance_group [ {{ count: 1 kind: {kind} }} ]",
            "",
        ]
    )


def _tensors(what: str, tensors: Iterable[tuple[str, str, list[int]]], more: str = "") -> str:
    lines = [f'  {{ name: "{name}" data_type: {kind} dims: {dims}{more} }}' for name, kind, dims in tensors]
    return f"{what} [\n" + ",\n".join(lines) + "\n]"


def _parameter(key: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(text, ensure_ascii=False)} }} }}'
