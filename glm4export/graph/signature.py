"""A traced graph's signature: what goes in and out, by the bundle contract's names, and which dims are dynamic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4graphs.config import Glm4Config
from glm4graphs.encoder import SEQUENCE_CLASSIFICATION, Encoding
from glm4runtime.contract import (
    ATTENTION_MASK,
    DECODE,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    PREFILL,
    STEP,
    GraphName,
    encoder_output,
    past_name,
    present_name,
)

# torch.export specialises dims of size 0 and 1, and equal ones to each other: all different, all above 1
_EXAMPLE = {"batch": 2, "seq": 3, "total_seq": 5, "max_seq": 7, "rows": 11}

Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """Names in order: int64 inputs with their dims, then the cache of every layer; outputs, then the cache again."""

    inputs: dict[str, Dims]
    outputs: tuple[str, ...]
    cached: bool = True

    def named_inputs(self, config: Glm4Config) -> dict[str, Dims]:
        """Every input of the graph with its dims."""
        return {**self.inputs, **dict.fromkeys(self._of_cache(config, past_name), _cache_dims(config))}

    def named_outputs(self, config: Glm4Config) -> list[str]:
        """Every output of the graph."""
        return [*self.outputs, *self._of_cache(config, present_name)]

    def example(self, config: Glm4Config, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of a graph's module on the meta device, and their dims for torch.export."""
        dims = {name: torch.export.Dim(name) for name in _EXAMPLE}

        def empty(shape: Dims, dtype: torch.dtype) -> Tensor:
            sizes = [_EXAMPLE[dim] if isinstance(dim, str) else dim for dim in shape]
            return torch.empty(sizes, dtype=dtype, device="meta")

        def dynamic(shape: Dims) -> dict[int, Any]:
            return {index: dims[dim] for index, dim in enumerate(shape) if isinstance(dim, str)}

        inputs = {name: empty(shape, torch.int64) for name, shape in self.inputs.items()}
        shapes = {name: dynamic(shape) for name, shape in self.inputs.items()}
        if not self.cached:
            return (inputs,), (shapes,)
        layers, past = range(config.num_hidden_layers), _cache_dims(config)
        cache = [(empty(past, dtype), empty(past, dtype)) for _ in layers]
        return (inputs, cache), (shapes, [(dynamic(past), dynamic(past)) for _ in layers])

    def _of_cache(self, config: Glm4Config, name: Any) -> list[str]:
        layers = range(config.num_hidden_layers if self.cached else 0)
        return [name(layer, part) for layer in layers for part in ("key", "value")]


def encoder_signature(encoding: Encoding) -> Signature:
    """Of a graph without a cache: whole texts and their mask.

    A sequence classifier without a pad token takes one text at a time, as in transformers.
    """
    alone = encoding.task == SEQUENCE_CLASSIFICATION and encoding.pad_token_id is None
    dims: Dims = (1 if alone else "batch", "seq")
    output = encoder_output(encoding.task, encoding.pooling)
    return Signature({INPUT_IDS: dims, ATTENTION_MASK: dims}, (output,), cached=False)


def _cache_dims(config: Glm4Config) -> Dims:
    return ("batch", config.num_key_value_heads, "max_seq", config.head_dim)


_TOKENS: dict[str, Dims] = {INPUT_IDS: ("batch", "seq"), ATTENTION_MASK: ("batch", "total_seq")}
SIGNATURES: dict[GraphName, Signature] = {
    **dict.fromkeys((PREFILL, STEP), Signature({**_TOKENS, LOGIT_ROWS: ("batch", "rows")}, (LOGITS,))),
    DECODE: Signature(_TOKENS, (LOGITS,)),
}
