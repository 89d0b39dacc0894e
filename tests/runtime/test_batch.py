"""Many sequences at once: a row's logits and cache have the same bits alone and in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from glm4runtime import Session, UserError
from glm4runtime.backends.batch import BatchRunner
from tests.helpers.batches import CHUNK, SLOTS, opened
from tests.helpers.kernels import KERNELS

STEPS = 3
LENGTHS = (5, 40, 101, 1, 2, 64, 33, 77)  # of prompts: less than a chunk, several, odd, a lone token


@pytest.fixture(scope="module", params=[name for name in KERNELS if name != "a step graph"])
def runner(request: pytest.FixtureRequest, kernel_bundles: Callable[[str], Path]) -> BatchRunner:
    try:
        return opened(kernel_bundles(request.param))
    except UserError as error:
        pytest.skip(str(error))


class Texts:
    """Random prompts and what follows them, and what a runner gives for each alone."""

    def __init__(self, runner: BatchRunner) -> None:
        rng = np.random.default_rng(0)
        self.runner = runner
        self.prompts = [rng.integers(0, runner.vocab_size, length) for length in LENGTHS]
        self.next = rng.integers(0, runner.vocab_size, (len(LENGTHS), STEPS)).tolist()
        self.alone: list[tuple[list[np.ndarray], np.ndarray]] = []
        for text in range(len(LENGTHS)):
            rows = [self.prefill(0, text)]
            for at in range(STEPS):
                rows.append(runner.step([0], [self.next[text][at]], [LENGTHS[text] + at])[0].copy())
            self.alone.append((rows, runner.read_rows(0, 0, LENGTHS[text] + STEPS)))

    def prefill(self, slot: int, text: int, start: int = 0, width: int | None = None) -> np.ndarray:
        """The last token's logits of a whole prompt, in the runs that the runner asks for."""
        for first, last in self.runner.prompt_runs(start, LENGTHS[text], width):
            row = self.runner.prefill(slot, self.prompts[text][:last], first).copy()
        return row

    def step(self, of: dict[int, int], at: int, slots: Sequence[int]) -> None:
        """Step ``at`` of the texts that the slots have, compared with what each gives alone."""
        tokens, starts = [self.next[of[slot]][at] for slot in slots], [LENGTHS[of[slot]] + at for slot in slots]
        rows = self.runner.step(slots, tokens, starts)
        assert rows.shape == (len(slots), self.runner.vocab_size) and rows.dtype == np.float32
        for slot, row in zip(slots, rows, strict=True):
            assert np.array_equal(row, self.alone[of[slot]][0][1 + at]), f"text {of[slot]} among {len(slots)}"

    def cache_is_right(self, slot: int, text: int, rows: int | None = None) -> bool:
        rows = LENGTHS[text] + STEPS if rows is None else rows
        block = self.alone[text][1].reshape(2 * self.runner.manifest.cache.layers, -1)
        found = self.runner.read_rows(slot, 0, LENGTHS[text] + STEPS).reshape(block.shape)
        heads = self.runner.manifest.cache.kv_heads

        def first(every: np.ndarray) -> bytes:
            return every.reshape(len(every), heads, LENGTHS[text] + STEPS, -1)[:, :, :rows].tobytes()

        return first(found) == first(block)


@pytest.fixture(scope="module")
def texts(runner: BatchRunner) -> Texts:
    return Texts(runner)


def test_granules_are_found_here(runner: BatchRunner) -> None:
    assert runner.granule in (1, 2, 4, 8) and runner.prompt_granule in (1, 2, 4, 8) and runner.invariant
    coarse = runner.manifest.cache.dtype == "int8"
    assert runner.prompt_grid == (CHUNK if coarse else runner.prompt_granule)
    assert runner.row_bytes == runner.manifest.cache.bytes_per_token


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_same_bits_in_every_batch(count: int, texts: Texts) -> None:
    """Any texts, in any slots, in another order in every step, and others between whose rows stay."""
    rng = np.random.default_rng(count)
    slots, chosen = rng.permutation(SLOTS)[:count].tolist(), rng.permutation(len(LENGTHS))[:count].tolist()
    of = dict(zip(slots, chosen, strict=True))
    for slot, text in of.items():
        assert np.array_equal(texts.prefill(slot, text), texts.alone[text][0][0])
    for at in range(STEPS):
        texts.step(of, at, rng.permutation(slots).tolist())
    assert all(texts.cache_is_right(slot, text) for slot, text in of.items())


def test_subsets_and_a_prompt_between_steps(texts: Texts) -> None:
    """Slots that wait or have half a prompt are moved out of the way, and no filler writes there."""
    runner, of = texts.runner, dict(enumerate(range(SLOTS)))
    half = {2: 64, 5: 32}  # slots with a prompt under way: rows they have
    for slot, text in of.items():
        for first, last in runner.prompt_runs(0, LENGTHS[text]):
            if last <= half.get(slot, LENGTHS[text]):
                runner.prefill(slot, texts.prompts[text][:last], first)
    done = dict.fromkeys(of, 0)
    for slots in ([0], [7, 0, 3], [6, 1], [4], [4, 1, 3, 6, 7], [6], [0, 4, 7, 3, 1]):
        for at in {done[slot] for slot in slots}:
            texts.step(of, at, [slot for slot in slots if done[slot] == at])
        for slot in slots:
            done[slot] += 1
        for slot, rows in half.items():
            assert texts.cache_is_right(slot, of[slot], rows)
    for slot, rows in half.items():
        assert np.array_equal(texts.prefill(slot, of[slot], rows), texts.alone[of[slot]][0][0])
    for at in range(STEPS):
        texts.step(of, at, list(half))
    for slot, text in of.items():
        assert texts.cache_is_right(slot, text, LENGTHS[text] + done[slot] if slot not in half else None)


def test_same_bits_for_every_width_of_runs(texts: Texts) -> None:
    for text, width in ((2, 1), (2, 7), (7, 16), (5, 31), (1, 4096)):
        borders = texts.runner.prompt_runs(0, LENGTHS[text], width)
        assert [first for first, _ in borders[1:]] == [last for _, last in borders[:-1]]
        assert max(last - first for first, last in borders) <= CHUNK
        assert np.array_equal(texts.prefill(1, text, width=width), texts.alone[text][0][0])
        assert texts.cache_is_right(1, text, LENGTHS[text])


def test_rows_given_back_are_a_prefix(texts: Texts) -> None:
    """A prefix hit: rows of another slot, read, written in two blocks, and the rest of the prompt behind them."""
    runner, text = texts.runner, 2
    grid = runner.prompt_grid
    rows = (LENGTHS[text] - 1) // grid * grid
    texts.prefill(6, text)
    blocks = [(first, runner.read_rows(6, first, end)) for first, end in ((0, 37), (37, rows))]
    assert all(block.dtype == np.uint8 and block.ndim == 1 for _, block in blocks)
    assert sum(block.size for _, block in blocks) == rows * runner.row_bytes
    texts.prefill(6, 5)
    runner.release(3)
    for first, block in blocks:
        runner.write_rows(3, first, block)
    texts.step({6: 5}, 0, [6])  # moves what was written
    assert np.array_equal(texts.prefill(3, text, rows), texts.alone[text][0][0])
    assert np.array_equal(texts.prefill(3, text, LENGTHS[text]), texts.alone[text][0][0])  # all of it is there
    texts.step({3: text}, 0, [3])
    assert texts.cache_is_right(3, text, LENGTHS[text] + 1)


def test_copied_rows_go_their_own_way(texts: Texts) -> None:
    """As several answers to one prompt do, or beams."""
    runner = texts.runner
    texts.prefill(4, 7)
    for slot in (0, 6):
        runner.copy_rows(4, slot, LENGTHS[7])
    runner.step([0, 6], [3, 4], [LENGTHS[7]] * 2)
    for at in range(STEPS):
        texts.step({0: 7, 4: 7, 6: 7}, at, [6, 4, 0])
    assert all(texts.cache_is_right(slot, 7) for slot in (0, 4, 6))


def test_drafts(texts: Texts) -> None:
    """A draft's logits are those of steps but for rounding, whatever its width, and its rows may be taken back."""
    runner = texts.runner
    texts.prefill(2, 1)
    wanted = runner.verify(2, texts.next[1], LENGTHS[1]).copy()
    assert wanted.shape == (STEPS, runner.vocab_size)
    for width in range(1, STEPS + 1):
        assert np.array_equal(runner.verify(2, texts.next[1][:width], LENGTHS[1]), wanted[:width])
    assert np.abs(wanted - np.stack(texts.alone[1][0][1:])).max() < 0.5
    texts.step({2: 1}, 0, [2])


def test_logits_are_a_sessions(demo_bundles: dict[str, Path], demo_sessions: dict[str, Session]) -> None:
    session = demo_sessions["fp32"].runner
    texts = Texts(opened(demo_bundles["fp32"]))
    for text, (rows, _) in enumerate(texts.alone):
        session.rewind()
        wanted = [session.prefill(texts.prompts[text]).copy()]
        wanted += [session.decode(token).copy() for token in texts.next[text]]
        assert np.abs(np.stack(rows) - np.stack(wanted)).max() <= 2e-5
