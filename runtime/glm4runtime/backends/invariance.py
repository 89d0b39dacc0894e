"""Make a row's bits independent of the run that computes it: ``load(..., invariant=True)``.

Kernels choose their way by how many rows they are given, and another way adds in another order. On ONNX Runtime 1.32's
CPU kernels a lone row differs (attention in every precision; quantized matmuls), and where MatMulNBits takes rows by
twos (AVX512-VNNI) the last row of an odd run does too. In int8 and int4 that moves logits by up to 0.2, since rounding
moves an activation to another quantization step now and then.

But runs whose widths are all multiples of a small number, the *granule*, agree to the bit: 2 on every CPU seen so far.
It is measured when a session is opened, since kernels differ between machines and releases, and the runner then pads
its runs (:class:`glm4runtime.backends.runner.Runner`). Logits and cache, and so the tokens, greedy or seeded, are then
the same for every ``lookup``, and for a prompt given whole or in parts. With an int8 cache that holds for one
``prefill_chunk``.

The sequences of a step (:mod:`glm4runtime.backends.batch`) have a granule of their own: attention takes them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.contract import UserError

_GRANULES = (1, 2, 4, 8)
_WIDEST_STEP = 8  # rows; what serves more at once does it in multiples of these
_CONTEXT = 48  # tokens in front of the runs that are compared
_STARTS = (48, 31, 16)  # where they begin: at one place bits may agree by luck
_SHIFTS = (0, 3)  # of sequences in a step, so that each has neighbours of several kinds


def make_invariant(runner: Runner) -> None:
    """Set ``runner.granule`` to what is measured, and ``runner.invariant``; its cache is left empty.

    A cache whose length is no multiple of the granule loses the rows over.
    Raises UserError where there's no granule, or cache or ``prefill_chunk`` are shorter than it.
    """
    sizes = {"max_seq_len": runner.max_seq_len, "prefill_chunk": runner.prefill_chunk}
    granule = require_granule(find_granule(runner), **sizes)
    runner.max_seq_len -= runner.max_seq_len % granule
    runner.granule, runner.invariant = granule, True


def require_granule(granule: int | None, **sizes: int) -> int:
    """The granule that was measured. Raises UserError where there's none, or one of ``sizes`` is below it."""
    if granule is None:
        raise UserError(
            "invariant: on this machine the bits of a token's logits depend on the run it is in, whatever widths are "
            f"multiples of (tried {', '.join(map(str, _GRANULES))}); load without invariant, which promises nothing"
        )
    for name, value in sizes.items():
        if value < granule:
            raise UserError(f"invariant: {name}={value}, but runs have multiples of {granule} tokens on this machine")
    return granule


def find_batch_granule(step: Callable[[Sequence[int]], Sequence[bytes]], sequences: int, most: int) -> int | None:
    """The same for the sequences of a step; None where there's none up to 8.

    step: runs the numbered sequences, below ``sequences`` and some of them twice, and gives the bits of each one's
    logits and of the row it wrote; the same ones whenever it's called. Steps of 1 to 8 sequences are compared, and one
    of ``most``, the most that are going to be.
    """
    widths = [*range(1, _WIDEST_STEP + 1), *([most] if most > _WIDEST_STEP else [])]
    chosen = [[(shift + row) % sequences for row in range(width)] for width in widths for shift in _SHIFTS]
    found = [list(zip(rows, step(rows), strict=True)) for rows in chosen]
    for granule in _GRANULES:
        wanted: dict[int, bytes] = {}
        steps = (rows for rows in found if len(rows) % granule == 0)
        if all(wanted.setdefault(sequence, bits) == bits for rows in steps for sequence, bits in rows):
            return granule
    return None


def find_granule(runner: Runner) -> int | None:
    """The smallest number whose multiples, as widths of runs, give the same bits; None where there's none up to 8.

    Steps of 1 to 8 tokens are compared with one of 16, and a prompt in growing chunks with a whole one: logits, and in
    the host's memory the cache too, since fp16 rounds most differences out of logits. ``runner`` must have no granule
    yet; what its cache holds is lost.
    """
    room = runner.max_seq_len
    rng = np.random.default_rng(0)
    tokens: list[int] = rng.integers(0, runner.manifest.vocab_size, _CONTEXT + MAX_RUN).tolist()
    for granule in _GRANULES:
        if _steps_agree(runner, tokens, granule, room) and _chunks_agree(runner, tokens, granule, room):
            runner.rewind()
            return granule
    runner.rewind()
    return None


def _steps_agree(runner: Runner, tokens: list[int], granule: int, room: int) -> bool:
    wide = min(MAX_RUN, room - room % granule)
    for start in [start for start in _STARTS if start + wide <= room] or [room - wide]:
        runner.rewind()
        if start:
            runner.prefill(tokens[:start])
        run = tokens[start : start + wide]
        wanted = runner.verify(run).copy()
        written = {width: runner.cache_bits(start + width) for width in range(granule, wide + 1, granule)}
        for width in range(granule, min(_WIDEST_STEP, wide) + 1, granule):
            rows = runner.verify(run[:width])
            if not np.array_equal(rows, wanted[:width]) or runner.cache_bits(start + width) != written[width]:
                return False
    return True


def _chunks_agree(runner: Runner, tokens: list[int], granule: int, room: int) -> bool:
    """Whether chunks of one, two, three ... granules write what one chunk does."""
    if runner.manifest.cache.dtype == "int8":
        return True  # there chunks have fixed places
    count = min(_CONTEXT, room, runner.prefill_chunk)
    count -= count % granule
    runner.rewind()
    if not count:
        return True
    wanted, written = runner.prefill(tokens[:count]).copy(), runner.cache_bits(count)
    runner.rewind()
    width = 0
    while runner.length < count:
        width = min(width + granule, count - runner.length)
        row = runner.prefill(tokens[runner.length : runner.length + width])
    return bool(np.array_equal(row, wanted)) and runner.cache_bits(count) == written
