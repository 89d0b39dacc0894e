"""The plugin's kernels under Triton's interpreter, against PyTorch. ``tools/gpu_check.py`` does this on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.tensorrt.plugin.tiles import Tile
from tests.helpers.triton_interpreter import Interpreted, interpreter
from tools.plugin_runs.launch import attention
from tools.plugin_runs.reference import Case

DECODE, PREFILL = Tile(16, 32, 4, 1), Tile(64, 32, 4, 1)
TOLERANCE = {"float16": 3e-3, "bfloat16": 4e-2}  # of values of size 1; the interpreter truncates to bfloat16


@pytest.fixture(scope="module")
def kernels() -> Iterator[Executor]:
    with interpreter() as pool:
        yield pool


def run(case: Case, tile: Tile, programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """In the interpreter's process: attended, and the caches after."""
    after = case.to("cpu")
    attended = attention(Interpreted(case.geometry, tile), after, programs=programs)
    return attended, after.keys, after.values


def check(kernels: Executor, case: Case, tile: Tile, programs: int = 1) -> Tensor:
    attended, keys, values = kernels.submit(run, case, tile, programs).result()
    tolerance = TOLERANCE[case.geometry.dtype]
    wanted, wanted_keys, wanted_values = case.expected()
    assert attended.isfinite().all()
    assert (attended.float() - wanted).abs().max() < tolerance
    for found, cache, before in ((keys, wanted_keys, case.keys), (values, wanted_values, case.values)):
        unit = 1 if case.geometry.cache_dtype == "int8" else 4 * tolerance
        assert (found.float() - cache.float()).abs().max() <= unit
        untouched = cache == before
        assert torch.equal(found[untouched], before[untouched])  # not a bit outside the new rows
    return attended


def geometry(group: int, kv_heads: int, head_dim: int, max_seq: int, dtype: str, cache: str | None = None) -> Geometry:
    return Geometry(
        group * kv_heads, kv_heads, head_dim, head_dim // 2, max_seq, head_dim**-0.5, dtype, cache or dtype
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 3, 16, 24])
def test_decoding_in_shares_of_the_cache(group: int, dtype: str, kernels: Executor) -> None:
    """Three sequences of unequal lengths, one of them new: some shares see nothing."""
    tile = Tile(16 if group <= 16 else 32, 32, 4, 1)
    case = Case.random(geometry(group, 2, 64, 256, dtype), (150, 0, 31), 1, seed=group)
    check(kernels, case, tile, programs=24)  # 4 shares


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("tile", [DECODE, PREFILL], ids=["decode's tile", "prefill's tile"])
def test_every_head_dim_and_tile(head_dim: int, tile: Tile, kernels: Executor) -> None:
    check(kernels, Case.random(geometry(3, 2, head_dim, 128, "float16"), (0, 40), 21, seed=head_dim), tile)


@pytest.mark.parametrize("programs", [1, 16, 400])
def test_number_of_shares_does_not_matter(programs: int, kernels: Executor) -> None:
    """1, 4 and 64 of them, more than the cache has blocks."""
    case = Case.random(geometry(4, 2, 64, 512, "float16"), (500, 77), 3)
    check(kernels, case, DECODE, programs)


@pytest.mark.parametrize("seq", [1, 17, 70])
@pytest.mark.parametrize("start", [0, 63])
def test_int8_cache(seq: int, start: int, kernels: Executor) -> None:
    case = Case.random(geometry(6, 2, 64, 256, "float16", "int8"), (start, 0), seq, seed=seq)
    check(kernels, case, PREFILL if seq > 16 else DECODE, programs=12)


def test_int8_cache_with_bfloat16(kernels: Executor) -> None:
    check(kernels, Case.random(geometry(2, 1, 128, 64, "bfloat16", "int8"), (20, 3, 0), 2), DECODE)


@pytest.mark.parametrize("rotary_dim", [2, 16, 64])
def test_partial_and_full_rotary(rotary_dim: int, kernels: Executor) -> None:
    shape = dataclasses.replace(geometry(2, 2, 64, 64, "float16"), rotary_dim=rotary_dim)
    check(kernels, Case.random(shape, (9,), 5), DECODE)


def test_chunks_give_what_one_prefill_gives(kernels: Executor) -> None:
    """Bit for bit in the cache; attended alike, though chunks add up in another order."""
    whole = Case.random(geometry(6, 2, 64, 64, "float16"), (0,), 40)
    wanted = check(kernels, whole, PREFILL)
    cache, parts = (whole.keys, whole.values), []
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        chunk = dataclasses.replace(
            whole, qkv=whole.qkv[:, start:stop].contiguous(), keys=cache[0], values=cache[1],
            position_ids=whole.position_ids[:, start:stop].contiguous(), write_indices=torch.tensor([start]),
            attention_mask=whole.attention_mask[:, :, start:stop].contiguous(),
        )  # fmt: skip
        attended, *cache_after = kernels.submit(run, chunk, DECODE, 8).result()
        cache = tuple(cache_after)
        parts.append(attended)
    assert (torch.cat(parts, 1).float() - wanted.float()).abs().max() < 2e-3
    _, keys, values = kernels.submit(run, whole, PREFILL, 1).result()
    assert torch.equal(cache[0], keys) and torch.equal(cache[1], values)


def test_rows_that_the_mask_hides_are_not_seen(kernels: Executor) -> None:
    """A sliding window, and a sequence whose first rows are padding on the left."""
    case = Case.random(geometry(4, 2, 32, 128, "float16"), (60, 90), 4)
    rows = torch.arange(128)
    window = case.attention_mask & (rows > case.position_ids[:, None, :, None] - 20)
    window[1] &= rows >= 80
    check(kernels, dataclasses.replace(case, attention_mask=window), DECODE, programs=16)


def test_a_query_that_sees_nothing_gives_zeros(kernels: Executor) -> None:
    case = Case.random(geometry(2, 1, 32, 64, "float16"), (10, 5), 2)
    mask = case.attention_mask.clone()
    mask[0] = False
    for programs in (1, 8):
        attended = check(kernels, dataclasses.replace(case, attention_mask=mask), DECODE, programs)
        assert (attended[0] == 0).all() and (attended[1] != 0).any()


def test_padding_past_the_end_of_the_cache_is_dropped(kernels: Executor) -> None:
    """A right-padded batch may reach past the end with its padding; its real tokens may not be touched by that."""
    case = Case.random(geometry(2, 2, 32, 32, "float16"), (30, 4), 6)
    check(kernels, case, DECODE)


def test_a_large_score_does_not_overflow(kernels: Executor) -> None:
    case = Case.random(geometry(2, 1, 64, 64, "float16"), (33,), 1)
    check(kernels, dataclasses.replace(case, qkv=case.qkv * 30, keys=case.keys * 30), DECODE, programs=4)
