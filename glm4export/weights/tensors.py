"""Stored tensors as recipes read them: by name and window; what a reader may know of them beside their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from glm4export.weights.quantize import Quantized, Scheme

Window = tuple[tuple[int, int], ...]  # start and stop along each dim


class Shaped(Protocol):
    """A stored tensor, as far as anybody asks."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Tensors(Protocol):
    """Stored tensors by name, read by windows: a checkpoint is one."""

    @property
    def tensors(self) -> Mapping[str, Shaped]: ...

    def read(self, name: str, window: Window) -> Tensor:
        """A copy of that window of the stored tensor, in its stored dtype."""
        ...


@runtime_checkable
class Prequantized(Protocol):
    """Stored tensors of which some come quantized: by calibration, or by whoever made the checkpoint."""

    def quantized(self, name: str, scheme: Scheme, rows: tuple[int, int]) -> Quantized | None:
        """Those rows in blocks by that scheme; None where they didn't come so."""
        ...

    def quantized_rows(
        self, name: str, dtype: str, scale_dtype: torch.dtype, rows: tuple[int, int]
    ) -> Quantized | None:
        """Those rows in int8 or float8_e4m3fn [rows, columns] with a scale each [rows]; None as above."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What a text told of a model, beside its tensors: see :mod:`glm4export.calibration.calibrate`."""

    def input_reach(self, name: str) -> float:
        """The largest magnitude that the input of the linear with that weight had in calibration."""
        ...

    def cache_scales(self, layer: int, part: str) -> Tensor:
        """An int8 cache's step in each channel of a layer's ``key`` or ``value``: float32 [kv_heads, 1, head_dim]."""
        ...


def whole(shape: tuple[int, ...]) -> Window:
    """The window that covers a shape."""
    return tuple((0, size) for size in shape)
