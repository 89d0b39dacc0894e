"""Estimate a build from the config alone: parameters, bytes of bundle and cache, and whether a machine has room."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4export.build.options import CALIBRATED, PRECISIONS_OF, BuildOptions
from glm4export.sources.config_json import sequence_limit
from glm4export.sources.ledger import tensor_shapes
from glm4export.weights.storage import HEAD
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import Encoding
from glm4runtime.contract import CAUSAL_LM, DTYPE_BYTES, TENSORRT, Target

_ROTARY_COLUMNS = 8  # tables are padded to a multiple; see passes/lower_attention_gqa.py

_INPUTS_OF_LAYER = 4  # qkv's, o_proj's, gate_up_proj's, down_proj's


def parameters(config: Glm4Config, encoding: Encoding | None = None) -> int:
    """Numbers in the checkpoint; a tied head counts once.

    ``encoding`` None stands for a causal language model, here and below.
    """

    def count(name: str, shape: tuple[int, ...]) -> int:
        return 0 if name == HEAD and config.tie_word_embeddings else math.prod(shape)

    return _sum(config, encoding, count)


def weight_bytes(config: Glm4Config, options: BuildOptions, encoding: Encoding | None = None) -> int:
    """Bytes of all tensors in weights.bin, without the gaps between them."""
    positions = sequence_limit(config, options.max_seq_len)
    columns = config.rotary_dim // 2
    if options.target != TENSORRT and encoding is None:
        columns = math.ceil(columns / _ROTARY_COLUMNS) * _ROTARY_COLUMNS
    tables = 2 * positions * columns * options.compute_dtype.itemsize
    quantized_cache = encoding is None and options.cache_dtype == "int8"
    steps = config.num_key_value_heads if options.attention == "plugin" else config.kv_size  # of a layer's keys
    cache_scales = 2 * config.num_hidden_layers * steps * 4 if quantized_cache else 0  # float32
    input_scales = 2 * _INPUTS_OF_LAYER * config.num_hidden_layers if options.precision == "fp8" else 0
    weights = _sum(config, encoding, lambda name, shape: _stored(name, shape, options))
    return weights + tables + cache_scales + input_scales


def cache_bytes_per_token(config: Glm4Config, dtype: str) -> int:
    """Bytes that a token of one sequence takes in a KV cache of that dtype (ONNX's spelling)."""
    return 2 * config.num_hidden_layers * config.kv_size * DTYPE_BYTES[dtype]


def estimate(config: Glm4Config, target: Target, memory: int, encoding: Encoding | None = None) -> dict[str, Any]:
    """Facts as JSON-ready values. ``memory``: bytes that the machine has; a model fits with a tenth left over.

    Running takes the weights and the cache; on a CPU fp16 weights twice, whose kernels want fp32, and with an int8
    cache those of prefill and decode.
    Each precision comes with the default cache and, under ``int8_cache``, with that one (None where it can't be built);
    where a task has none, with ``fits_here`` alone.
    """
    positions = sequence_limit(config, None)
    precisions: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS_OF[target]:
        if encoding is not None and precision in CALIBRATED:
            continue  # nothing calibrates a graph without a cache
        options = BuildOptions(precision, target, calibrate=Path() if precision in CALIBRATED else None)
        weights = weight_bytes(config, options, encoding)
        held = 2 * weights if (target, precision) == ("cpu", "fp16") else weights
        if encoding is not None:
            precisions[precision] = {"weight_bytes": weights, "fits_here": held <= 0.9 * memory}
            continue

        def cache(dtype: str, held: int = held) -> dict[str, int]:
            left = 0.9 * memory - held * (2 if (target, dtype) == ("cpu", "int8") else 1)
            token = cache_bytes_per_token(config, dtype)
            return {
                "cache_bytes_per_token": token,
                "cache_bytes_at_full_length": token * positions,
                "longest_sequence_here": max(0, min(positions, int(left // token))),
            }

        int8 = cache("int8") if target != TENSORRT else None
        precisions[precision] = {"weight_bytes": weights, **cache(options.cache_dtype), "int8_cache": int8}
    return {
        "task": CAUSAL_LM if encoding is None else encoding.task,
        "parameters": parameters(config, encoding),
        "max_positions": positions,
        "memory_bytes": memory,
        "target": target,
        "precisions": precisions,
    }


def _sum(config: Glm4Config, encoding: Encoding | None, size: Callable[[str, tuple[int, ...]], int]) -> int:
    """The sum of something over all tensors; a layer's is taken as often as there are layers."""
    outer, layer = (sum(size(*item) for item in shapes.items()) for shapes in tensor_shapes(config, encoding))
    return outer + config.num_hidden_layers * layer


def _stored(name: str, shape: tuple[int, ...], options: BuildOptions) -> int:
    numbers, formats = math.prod(shape), options.formats
    if formats is None or len(shape) == 1:
        return numbers * options.compute_dtype.itemsize
    rows, columns = shape
    return formats.nbytes(name, rows, columns)
