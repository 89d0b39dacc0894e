"""What a graph gives beside logits of a bundle built with ``--output-top-logits``, and where held rows lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.contract import LOG_SUM, LOGITS, TOP_IDS, TOP_LOGITS, GraphSpec


def top_count(graph: GraphSpec) -> int:
    """How many of each row's tokens a graph names; 0 for one that gives logits alone."""
    widths = [output.dims[-1] for output in graph.outputs if output.name == TOP_LOGITS]
    return int(widths[0]) if widths else 0


class TopRows:
    """Buffers for runs of up to ``rows`` rows: tokens come to the host, logits stay on the device."""

    def __init__(self, count: int, rows: int, host: Buffer, device: str, device_id: int) -> None:
        """host: logits [1, rows, vocab] of runs that aren't held, which on ``cpu`` is where held ones lie too."""
        self._values = Buffer((1, rows, count), "float32", "cpu")
        self._ids = Buffer((1, rows, count), "int64", "cpu")
        self._log_sums = Buffer((1, rows), "float32", "cpu")
        self._host, vocab = host, host.shape[-1]
        held = () if device == "cpu" else (1, rows)  # a step's row by itself: buffers are read whole
        self._held = [Buffer((1, width, vocab), "float32", device, device_id) for width in held] or [host]

    def bind(self, binding: Any, rows: int, *, hold: bool) -> None:
        """Have a run's tokens, and its logits where it's held or in the host's memory."""
        count, vocab = self._values.shape[-1], self._host.shape[-1]
        self._values.bind_output(binding, TOP_LOGITS, (1, rows, count))
        self._ids.bind_output(binding, TOP_IDS, (1, rows, count))
        self._log_sums.bind_output(binding, LOG_SUM, (1, rows))
        (self._place(rows) if hold else self._host).bind_output(binding, LOGITS, (1, rows, vocab))

    def rows(self, count: int) -> list[HeldRow]:
        """The rows of the run that was held."""
        logits: Callable[[], np.ndarray] = cache(lambda: self._place(count).read()[0])
        return [
            HeldRow(
                self._values.array[0, row],
                self._ids.array[0, row],
                float(self._log_sums.array[0, row]),
                lambda row=row: logits()[row],  # type: ignore[misc]
            )
            for row in range(count)
        ]

    def _place(self, rows: int) -> Buffer:
        return self._held[0] if rows == 1 else self._held[-1]
