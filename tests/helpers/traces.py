"""Traces kept from test to test: they compile one model in many ways, and tracing takes the longest.

The compiler keeps none: a build traces each of its graphs once, and forty layers of them would stay in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import onnx_ir as ir
import torch

from glm4export.build import build
from glm4export.graph.trace import trace, trace_encoder
from glm4graphs.config import Glm4Config, Rope
from glm4graphs.encoder import Encoding


@functools.lru_cache(maxsize=16)
def _kept(config: Glm4Config, graph: str, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    return trace(config, graph, dtype=dtype, max_seq_len=max_seq_len)


def kept_trace(config: Glm4Config, graph: str, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    """As :func:`glm4export.graph.trace.trace`; a copy of what it gave last time."""
    return _kept(_traced(config), graph, dtype, max_seq_len).clone()


def _traced(config: Glm4Config) -> Glm4Config:
    """What a trace knows of a config: of its rope, how many columns are rotated; the tables are data."""
    return dataclasses.replace(config, rope=Rope(1.0, config.rope.partial_rotary_factor), max_position_embeddings=1)


@functools.lru_cache(maxsize=16)
def _kept_encoder(config: Glm4Config, encoding: Encoding, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    return trace_encoder(config, encoding, dtype=dtype, max_seq_len=max_seq_len)


def kept_trace_encoder(config: Glm4Config, encoding: Encoding, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    """The same of the graph without a cache."""
    return _kept_encoder(_traced(config), encoding, dtype, max_seq_len).clone()


@contextmanager
def kept_traces() -> Iterator[None]:
    """Inside it, this process's builds keep their traces."""
    with mock.patch.multiple(build, trace=kept_trace, trace_encoder=kept_trace_encoder):
        yield
