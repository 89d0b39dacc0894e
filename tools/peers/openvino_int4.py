"""OpenVINO's runtime on a model exported and compressed by optimum-intel, as its users do it.

Variants: ``int4`` (4-bit symmetric weights in groups of 128; optimum-intel keeps the embedding and the output head at
8 bits) and ``int4-all`` (those at 4 bits too). The graph is cut so that only the last token's logits are computed, as
OpenVINO GenAI does. Activations are quantized in groups as wide as the weights', which the CPU plugin doesn't do by
itself (groups of 32) and which makes prefill a third faster. Cache and inference formats are the plugin's choice, told
in ``settings``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Groups, needs, versions

os.environ |= {"CI": "true", "NNCF_CI": "true"}  # or importing either sends an event, and leaves files under HOME
with needs("pip install openvino, and optimum-intel to export"):
    import openvino as ov
    from openvino import opset13

GROUP_SIZE = 128  # of weights and activations
VARIANTS = ("int4", "int4-all")
_GROUPS = {
    "embedding": re.compile(r".*\bembed_tokens\.\w*weight"),
    "head": re.compile(r".*\blm_head\.\w*weight"),
    "blocks": re.compile(r".*\blayers\.\d+\.(self_attn|mlp)\.\w+\.\w*weight"),
}


def exported(checkpoint: Path, work: Path, variant: str) -> Path:
    """The folder of the compressed model, made in ``work`` where it isn't there yet."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown OpenVINO variant {variant!r}; known: {', '.join(VARIANTS)}")
    folder = work / f"openvino-{variant}"
    if folder.is_dir():
        return folder
    remedy = "pip install optimum-intel nncf (in a venv of its own, for --python openvino=VENV/bin/python)"
    with needs(f"only exporting to {folder} takes it: {remedy}"):
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = OVWeightQuantizationConfig(
        bits=4, sym=True, group_size=GROUP_SIZE, ratio=1.0, all_layers=variant == "int4-all"
    )
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, quantization_config=config)
    model.save_pretrained(partial)
    partial.rename(folder)
    return folder


class OpenVino:
    """One stateful model: its cache lives in the request."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._core, self._path, self._threads = ov.Core(), folder / "openvino_model.xml", threads
        self.name = f"{versions('openvino')} {folder.name}"
        self.files_bytes = self._path.with_suffix(".bin").stat().st_size
        model = self._core.read_model(self._path)
        self.groups = _groups(model)
        self._last_only = self._compile(model, last_only=True)
        self._every: Any = None
        self._length = 0

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._last_only.reset_state()
        self._length = 0
        return self._run(self._last_only, ids)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._run(self._last_only, np.array([token]))[-1]

    def every(self, ids: np.ndarray) -> np.ndarray:
        if self._every is None:
            self._every = self._compile(self._core.read_model(self._path), last_only=False)
        self._every.reset_state()
        self._length = 0
        return self._run(self._every, ids)

    def _run(self, request: Any, ids: np.ndarray) -> np.ndarray:
        total = self._length + len(ids)
        inputs = {
            "input_ids": np.asarray(ids, np.int64)[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in inputs.items() if name in self._inputs}, share_inputs=True)
        self._length = total
        logits: np.ndarray = request.get_tensor("logits").data[0]
        return logits

    def _compile(self, model: Any, *, last_only: bool) -> Any:
        if last_only:
            _keep_last_token(model)
        self._inputs = {name for value in model.inputs for name in value.get_names()}
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE,
        }
        compiled = self._core.compile_model(model, "CPU", settings)
        chosen = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        told = (f"{name.lower()} {_plain(compiled.get_property(name))}" for name in chosen)
        self.settings = f"{self._threads} threads, {', '.join(told)}"
        return compiled.create_infer_request()


def _plain(value: Any) -> str:
    return str(value.to_string() if isinstance(value, ov.Type) else value)


def _keep_last_token(model: Any) -> None:
    """Slice the hidden states in front of the output head to the last position."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    ends = (np.array([value], np.int64) for value in (-1, np.iinfo(np.int64).max, 1, 1))
    last = opset13.slice(node.input_value(0), *ends)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def _groups(model: Any) -> Groups:
    """Stored bytes and parameters of the matrices; scales and zero points count as bytes, not as parameters."""
    groups = dict.fromkeys(_GROUPS, (0, 0))
    for node in model.get_ops():
        name = node.get_friendly_name()
        group = next((group for group, pattern in _GROUPS.items() if pattern.match(name)), None)
        if group is None or node.get_type_name() != "Constant":
            continue
        size, count = groups[group]
        values = 0 if re.search(r"scale|zero_point", name) else int(np.prod(node.get_output_shape(0)))
        groups[group] = (size + int(node.get_byte_size()), count + values)
    return groups if all(count for _, count in groups.values()) else {}
