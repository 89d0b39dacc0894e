"""Bytes that a run of a graph reads and operations that it computes, from its file and the model's geometry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4runtime.backends.graph_check import read_whole
from glm4runtime.contract import DECODE, PREFILL, STEP, GraphName, Manifest
from glm4runtime.contract.onnxfile import Graph

# The inputs of which a token reads one row, not the whole: embeddings (with scales and zero points), rotary tables.
_LOOKED_UP = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (1, 2),
}
_INT8_OPERATORS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_ACCURACY_INT8 = 4  # MatMulNBits' accuracy_level: it multiplies in int8


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that one run of a graph reads."""

    whole: int  # read once, however many tokens the run has
    per_token: int  # rows of tables

    def read(self, tokens: int) -> int:
        """Bytes that a run of so many tokens reads."""
        return self.whole + tokens * self.per_token


@dataclass(frozen=True)
class Workload:
    """What a bundle's runs read and compute. Only linears are counted as arithmetic: attention comes on top."""

    prefill: Weights
    decode: Weights
    prefill_arithmetic: str  # what most matmuls compute in, on a CPU: ``int8`` or ``fp32``
    decode_arithmetic: str
    layer_weights: int  # numbers in all layers' linears
    head_weights: int
    cache_bytes_per_token: int
    chunk: int  # prompt tokens computed in one run

    def prefill_ops(self, tokens: int) -> int:
        """Operations (a multiplication and an addition are two) of a prompt; each chunk computes one row of logits."""
        return 2 * (tokens * self.layer_weights + len(self._chunks(tokens)) * self.head_weights)

    def prefill_bytes(self, tokens: int) -> int:
        """Weights, once per chunk, and the cache as far as each chunk looks back."""
        chunks = self._chunks(tokens)
        back = sum(min(tokens, (index + 1) * self.chunk) for index in range(len(chunks)))
        return sum(map(self.prefill.read, chunks)) + back * self.cache_bytes_per_token

    def decode_ops(self, batch: int) -> int:
        """Operations of one step of ``batch`` sequences."""
        return 2 * batch * (self.layer_weights + self.head_weights)

    def decode_bytes(self, batch: int, context: int, graph: str = DECODE) -> int:
        """Weights of the graph once, and the cache of ``batch`` sequences of ``context`` tokens."""
        weights = self.prefill if graph == PREFILL else self.decode
        return weights.read(batch) + batch * context * self.cache_bytes_per_token

    def _chunks(self, tokens: int) -> list[int]:
        return [min(self.chunk, tokens - start) for start in range(0, tokens, self.chunk)]


def workload(folder: Path, manifest: Manifest, *, provider: str, chunk: int) -> Workload:
    """Read a bundle's graphs, not its weights. Raises BundleError where one can't be read."""
    names: tuple[GraphName, ...] = (STEP, STEP) if STEP in manifest.graphs else (PREFILL, DECODE)
    prefill, decode = (read_whole(folder, manifest, name) for name in names)
    layers, head = linear_weights(manifest.config)
    # ONNX Runtime has no fp16 matmul on x86: it widens the weights once, when it loads them.
    widened = provider == "cpu"
    return Workload(
        prefill=_weights(prefill, widened),
        decode=_weights(decode, widened),
        prefill_arithmetic=_arithmetic(prefill),
        decode_arithmetic=_arithmetic(decode),
        layer_weights=layers,
        head_weights=head,
        cache_bytes_per_token=manifest.cache.bytes_per_token,
        chunk=chunk,
    )


def linear_weights(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers in the weights of all layers' linears, and in the head's, biases left out; ``config`` as a manifest's."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * dim * (heads + 2 * kv_heads) + heads * dim * hidden
    mlp = 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (attention + mlp), hidden * config["vocab_size"]


def _weights(graph: Graph, widened: bool) -> Weights:
    whole: set[str] = set()
    rows: set[str] = set()
    for node in graph.nodes:
        looked_up = _LOOKED_UP.get(node.op, ())
        for index, name in enumerate(node.inputs):
            if name in graph.stored:
                (rows if index in looked_up else whole).add(name)
    stored = graph.stored
    doubled = {name: 2 if widened and stored[name].dtype == "float16" else 1 for name in whole}
    per_token = sum(math.ceil(stored[name].nbytes / max(1, (stored[name].shape or (1,))[0])) for name in rows - whole)
    return Weights(sum(stored[name].nbytes * doubled[name] for name in whole), per_token)


def _arithmetic(graph: Graph) -> str:
    kinds = Counter(
        "int8" if node.op in _INT8_OPERATORS or node.integers.get("accuracy_level") == _ACCURACY_INT8 else "fp32"
        for node in graph.nodes
        if node.op.startswith(("MatMul", "DynamicQuantizeMatMul"))
    )
    return "int8" if kinds["int8"] > kinds["fp32"] else "fp32"
