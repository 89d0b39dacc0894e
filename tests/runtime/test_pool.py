"""Caches of many sequences in one block of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glm4runtime import UserError
from glm4runtime.backends import cuda, pool
from glm4runtime.backends.pool import DevicePool, HostPool
from glm4runtime.contract import CacheSpec
from tests.helpers.fake_cuda import FakeCuda, cudaError_t


@pytest.mark.parametrize("make", [HostPool, lambda *sizes: DevicePool(*sizes, cuda.Memory(cuda.Cuda(FakeCuda())))])
def test_places_exchange_all_their_rows(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_AT_ONCE", 2)
    held = make(CacheSpec(layers=2, kv_heads=3, head_dim=4, dtype="bfloat16", max_seq_len=9), 9, 3)
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, held.block_shape(9), np.uint8) for _ in range(3)]
    for rows, others in ((5, 7), (7, 4), (3, 0), (0, 8), (0, 0), (9, 9)):
        for place, block in enumerate(blocks):
            held.write(place, 0, block)
        held.exchange(0, 2, rows, others)
        assert np.array_equal(held.read(0, 0, others), blocks[2][:, :, :others])
        assert np.array_equal(held.read(2, 0, rows), blocks[0][:, :, :rows])
        assert np.array_equal(held.read(1, 0, 9), blocks[1])


def test_no_memory_for_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before it's touched: the system would grant more than it has, and kill the process later."""
    spec = CacheSpec(layers=40, kv_heads=2, head_dim=128, dtype="float32", max_seq_len=32768)
    monkeypatch.setattr(pool, "memory_bytes", lambda: (32_000_000_000, 7_000_000_000))
    with pytest.raises(UserError) as error:
        HostPool(spec, 32768, 9)
    assert str(error.value) == (
        "the caches take 24.16 GB: 9 sequences of 32768 tokens of 81920 bytes (40 layers, 2 heads of 128 in float32); "
        "they cannot be had (7.00 GB are free): ask for fewer slots or a smaller max_seq_len"
    )
    monkeypatch.setattr(pool, "memory_bytes", lambda: (1 << 62, 1 << 62))  # as a system that promises anything
    with pytest.raises(UserError, match=r"256 sequences of 1125899906842624 tokens .* cannot be had \("):
        HostPool(spec, 1 << 50, 256)
    api = FakeCuda()
    api.failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"they cannot be had \(caches: .* cudaErrorMemoryAllocation"):
        DevicePool(spec, 8, 2, cuda.Memory(cuda.Cuda(api)))
