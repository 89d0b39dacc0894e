"""Shared by tests: check_walk."""

from __future__ import annotations

import numpy as np

from glm4runtime.backends.runner import Runner

TOLERANCE = 2e-5  # of logits in fp32, as everywhere


def check_walk(runner: Runner, reference: Runner, rng: np.random.Generator, moves: int) -> set[str]:
    """The same random calls on both; returns which were made."""
    made, vocab, room = set(), runner.manifest.vocab_size, runner.max_seq_len
    for one in (runner, reference):
        one.rewind()
    for _ in range(moves):
        move = rng.choice(["prefill", "decode", "verify", "rewind"])
        length = runner.length
        if move == "rewind":
            target = int(rng.integers(0, length + 1))
            for one in (runner, reference):
                one.rewind(target)
        elif length < room:
            count = 1 if move == "decode" else int(rng.integers(1, min(room - length, 16) + 1))
            tokens = rng.integers(0, vocab, count).tolist()
            if move == "decode":
                rows = [one.decode(tokens[0]).copy() for one in (runner, reference)]
            elif move == "prefill":
                rows = [one.prefill(tokens).copy() for one in (runner, reference)]
            else:
                kept = int(rng.integers(0, count + 1))
                rows = [one.verify(tokens).copy() for one in (runner, reference)]
                for _ in range(kept):
                    runner.accept()
                    reference.accept()
            assert rows[0].shape == rows[1].shape and np.abs(rows[0] - rows[1]).max() <= TOLERANCE
        assert runner.length == reference.length
        made.add(str(move))
    return made
