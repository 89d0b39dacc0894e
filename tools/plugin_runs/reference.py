"""Inputs of one attention layer as a step graph has them, and what PyTorch makes of them: the kernels' reference.

:mod:`glm4graphs.attention` is the definition; this adds what it has not, masks of any kind and an int8 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glm4export.tensorrt.plugin.geometry import Geometry
from glm4graphs.attention import rotate


@dataclass(frozen=True)
class Case:
    """Some sequences, each with a past of its own length, and ``seq`` new tokens for each."""

    geometry: Geometry
    qkv: Tensor
    keys: Tensor  # the cache before
    values: Tensor
    position_ids: Tensor
    write_indices: Tensor
    attention_mask: Tensor
    cos: Tensor
    sin: Tensor
    key_scale: Tensor
    value_scale: Tensor

    @classmethod
    def random(cls, geometry: Geometry, starts: tuple[int, ...], seq: int, *, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(getattr(torch, geometry.dtype))

        batch, cache = len(starts), (len(starts), geometry.kv_heads, geometry.max_seq, geometry.head_dim)
        write_indices = torch.tensor(starts)
        positions = write_indices[:, None] + torch.arange(seq)
        angles = torch.arange(geometry.max_seq)[:, None] / 10 ** torch.linspace(0, 4, geometry.rotary_dim // 2)
        # Scales that differ by head, and clip some values
        scales = [torch.linspace(low, low * 1.5, geometry.kv_heads) for low in (0.022, 0.018)]
        keys, values = normal(*cache), normal(*cache)
        if geometry.cache_dtype == "int8":
            keys, values = (_quantize(part.float(), scale) for part, scale in zip((keys, values), scales, strict=True))
        return cls(
            geometry,
            normal(batch, seq, geometry.width),
            keys,
            values,
            positions,
            write_indices,
            torch.arange(geometry.max_seq) <= positions[:, None, :, None],
            angles.cos().to(getattr(torch, geometry.dtype)),
            angles.sin().to(getattr(torch, geometry.dtype)),
            scales[0],
            scales[1],
        )

    def to(self, device: str) -> Case:
        """A copy of every tensor on ``device``."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return Case(self.geometry, *(value.to(device, copy=True) for value in tensors))

    def feeds(self) -> dict[str, np.ndarray]:
        """By the function's input names."""
        names = ("qkv", "position_ids", "write_indices", "attention_mask", "cos", "sin", "key_scale", "value_scale")
        arrays = {name: getattr(self, name).numpy() for name in names}
        return {**arrays, "past_key": self.keys.numpy(), "past_value": self.values.numpy()}

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attended in float32, and the caches after; a query that sees nothing gives zeros."""
        shape = self.geometry
        batch, seq, _ = self.qkv.shape
        sizes = [count * shape.head_dim for count in (shape.num_heads, shape.kv_heads, shape.kv_heads)]

        def heads(x: Tensor) -> Tensor:
            return x.float().view(batch, seq, -1, shape.head_dim).transpose(1, 2)

        query, key, value = map(heads, torch.split(self.qkv, sizes, -1))
        cos, sin = (
            table.float()[self.position_ids.clamp(max=shape.max_seq - 1)][:, None] for table in (self.cos, self.sin)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        keys, values = self.keys.clone(), self.values.clone()
        if shape.cache_dtype == "int8":
            key, value = _quantize(key, self.key_scale), _quantize(value, self.value_scale)
        for row, start in enumerate(self.write_indices.tolist()):
            count = max(0, min(seq, shape.max_seq - start))
            keys[row, :, start : start + count] = key[row, :, :count].to(keys.dtype)
            values[row, :, start : start + count] = value[row, :, :count].to(values.dtype)
        read_keys, read_values = keys.float(), values.float()
        if shape.cache_dtype == "int8":
            read_keys = read_keys * self.key_scale[:, None, None]
            read_values = read_values * self.value_scale[:, None, None]
        read_keys, read_values = (x.repeat_interleave(shape.group, 1) for x in (read_keys, read_values))
        scores = (query @ read_keys.transpose(2, 3) * shape.scale).masked_fill(~self.attention_mask, float("-inf"))
        attended = scores.softmax(-1).nan_to_num(0.0) @ read_values
        return attended.transpose(1, 2).reshape(batch, seq, -1), keys, values


def _quantize(x: Tensor, scale: Tensor) -> Tensor:
    """[batch, kv_heads, rows, head_dim] in symmetric int8, a scale for each kv head."""
    return (x / scale[:, None, None]).round().clamp(-128, 127).to(torch.int8)
