"""Shared by tests: every_logit, exact_logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from glm4runtime.contract import past_name, read_manifest


def every_logit(bundle: Path, texts: list[list[int]], *, strict: bool = False) -> np.ndarray:
    """The decode graph's logits of every position of equally long texts, [texts, positions, vocab].

    onnxruntime's CPU kernels compute fp16 graphs in fp32 and drop the casts between neighbours, which hides overflow.
    With ``strict`` every float16 value is really rounded to float16, as on a GPU: an Identity behind each node keeps
    the casts, and graph optimisation, which would remove it, is off.
    """
    manifest, path, options = read_manifest(bundle), bundle / "decode.onnx", ort.SessionOptions()
    if strict:
        model = ir.load(path)
        for node in list(model.graph):
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT16 and not value.is_graph_output():
                    identity = ir.node("Identity", [value])
                    value.replace_all_uses_with(identity.outputs[0])
                    identity.replace_input_with(0, value)
                    model.graph.insert_after(node, identity)
        path = bundle / "strict.onnx"
        ir.save(model, path)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    cache = manifest.cache
    shape = (len(texts), cache.kv_heads, len(texts[0]), cache.head_dim)
    names = [past_name(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
    feed = {"input_ids": np.array(texts), "attention_mask": np.ones((len(texts), len(texts[0])), np.int64)}
    past = {name: np.zeros(shape, cache.dtype) for name in names}
    (logits,) = ort.InferenceSession(path, options).run(["logits"], {**feed, **past})
    if strict:
        path.unlink()  # others look at the bundle too
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
