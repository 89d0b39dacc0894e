"""Decode steps captured as CUDA graphs: one launch in place of hundreds.

ONNX Runtime captures a run whose every node is on the GPU, and replays it for the same ``gpu_graph_id`` from then on:
shapes, addresses and host inputs are those of the run that was captured, so each must stay as it is, and each binding
has an id of its own. It captures for the calling thread; another thread's first step captures again. Never run on a
GPU: docs/status.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

from glm4runtime.backends.cuda import Memory, open_cuda
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.backends.lengths import takes_lengths
from glm4runtime.contract import LOG_SUM, LOGITS, PREFILL, TOP_IDS, TOP_LOGITS, Manifest, UserError

CAPTURING = {"enable_cuda_graph": "1"}  # of ONNX Runtime's provider cuda
_GRAPH_ID = "gpu_graph_id"
_NEVER = "-1"
_ids = itertools.count(1)  # of all graphs of the process, and so of each session


def require_capture(manifest: Manifest) -> None:
    """Raise UserError where ``cuda_graphs`` was asked for and the bundle's steps can't be captured."""
    if manifest.stages is not None:
        raise UserError(
            "cuda_graphs does not go with a bundle built with --stages, whose steps are several graphs; leave it out"
        )
    if not takes_lengths(manifest.graphs[PREFILL]):
        raise UserError(
            f"cuda_graphs: the bundle was built for {manifest.target} and takes a mask that grows with every token; "
            "build the bundle with --target cuda, or leave cuda_graphs out"
        )
    if manifest.lora is not None:
        raise UserError(
            "cuda_graphs does not go with a bundle built with --lora-slots, whose runs change what they read with the "
            "adapter; leave one of them out"
        )


class CapturedSteps:
    """Where the logits of steps over up to ``rows`` sequences go, and how such steps are run."""

    def __init__(self, rows: int, vocab_size: int, device_id: int, top: int = 0) -> None:
        """top: how many of a row's tokens the graph names, where its steps have one row.

        Raises UserError where cuda-python is missing or the device has no memory.
        """
        self._cuda = cuda = open_cuda("gpu")
        cuda("cudaSetDevice", device_id)
        self._held, self._device_id = Memory(cuda), device_id
        self._address = self._held.device(4 * rows * vocab_size, "logits of a step")
        self._pinned, view = self._held.pinned(4 * rows * vocab_size)
        self._logits: np.ndarray = view.view(np.float32).reshape(rows, vocab_size)
        self._top, size = top, top * (8 + 4) + 4  # in a block of their own: ids, logits and the logarithm, one copy
        if top:
            self._top_address = self._held.device(size, "a step's most probable tokens")
            self._top_pinned, self._top_view = self._held.pinned(size)

    def bind(self, binding: Any, device: str, rows: int = 1) -> Callable[[Any], None]:
        """Have a step's logits written to the device's memory, and the step captured.

        Returns what runs it in a session: captured at first, and replayed from then on.
        """
        place, vocab = (device, self._device_id), self._logits.shape[1]
        binding.bind_output(LOGITS, *place, np.float32, (rows, 1, vocab), self._address)
        if self._top:
            at, shape = self._top_address, (1, 1, self._top)
            binding.bind_output(TOP_IDS, *place, np.int64, shape, at)
            binding.bind_output(TOP_LOGITS, *place, np.float32, shape, at + 8 * self._top)
            binding.bind_output(LOG_SUM, *place, np.float32, (1, 1), at + 12 * self._top)
        options = _run_options(str(next(_ids)))
        return lambda session: session.run_with_iobinding(binding, options)

    def fetch(self, rows: int = 1) -> np.ndarray:
        """The logits of the last step, float32 [rows, vocab]."""
        logits = self._logits[:rows]
        self._download(self._pinned, self._address, logits.nbytes)
        return logits

    def hold(self) -> HeldRow:
        """The last step's one row, on the device but for its most probable tokens."""
        self._download(self._top_pinned, self._top_address, len(self._top_view))
        ids, numbers = self._top_view[: 8 * self._top].view(np.int64), self._top_view[8 * self._top :].view(np.float32)
        return HeldRow(numbers[:-1], ids, float(numbers[-1]), lambda: self.fetch()[0])

    def _download(self, to: int, source: int, size: int) -> None:
        self._cuda("cudaMemcpy", to, source, size, self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def close(self) -> None:
        """Free the device's memory; behind the session that writes to it."""
        self._held.close()


def uncaptured() -> Any:
    """Run options of all other runs of a session that captures."""
    return _run_options(_NEVER)


def _run_options(graph_id: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
