"""Shared by tests: every_logit, exact_logits, strict_session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from glm4runtime.contract import past_name, read_manifest


def every_logit(bundle: Path, texts: list[list[int]], *, strict: bool = False) -> np.ndarray:
    """The decode graph's logits of every position of equally long texts, [texts, positions, vocab].

    With ``strict``, see :func:`strict_session`.
    """
    manifest, path = read_manifest(bundle), bundle / "decode.onnx"
    session = strict_session(path) if strict else ort.InferenceSession(path)
    cache = manifest.cache
    shape = (len(texts), cache.kv_heads, len(texts[0]), cache.head_dim)
    names = [past_name(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
    feed = {"input_ids": np.array(texts), "attention_mask": np.ones((len(texts), len(texts[0])), np.int64)}
    past = {name: np.zeros(shape, cache.dtype) for name in names}
    (logits,) = session.run(["logits"], {**feed, **past})
    return np.asarray(logits)


def exact_logits(bundle: Path, tokens: list[int]) -> np.ndarray:
    """The decode graph's logits with MatMulNBits computing in fp32 instead of rounding activations to int8."""
    model = ir.load(bundle / "decode.onnx")
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    ir.save(model, bundle / "exact.onnx")
    cache = read_manifest(bundle).cache
    shape = (1, cache.kv_heads, len(tokens), cache.head_dim)
    past = {past_name(i, part): np.zeros(shape, np.float32) for i in range(cache.layers) for part in ("key", "value")}
    feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
    return np.asarray(ort.InferenceSession(bundle / "exact.onnx").run(["logits"], feed)[0][0])


def strict_session(path: Path) -> ort.InferenceSession:
    """A graph in which every float16 value is really rounded to float16, as on a GPU.

    onnxruntime's CPU kernels compute fp16 graphs in fp32 and drop the casts between neighbours, which hides overflow.
    Here an Identity behind each node keeps the casts, and graph optimisation, which would remove it, is off.
    """
    model, options, strict = ir.load(path), ort.SessionOptions(), path.with_name("strict.onnx")
    for node in list(model.graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16 and not value.is_graph_output():
                identity = ir.node("Identity", [value])
                value.replace_all_uses_with(identity.outputs[0])
                identity.replace_input_with(0, value)
                model.graph.insert_after(node, identity)
    ir.save(model, strict)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(strict, options)
    finally:
        strict.unlink()  # others look at the bundle too
