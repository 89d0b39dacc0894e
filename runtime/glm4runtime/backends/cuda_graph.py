"""A decode step captured as a CUDA graph: one launch in place of hundreds.

ONNX Runtime captures a run whose every node is on the GPU, and replays it for the same ``gpu_graph_id`` from then on:
shapes, addresses and host inputs are those of the run that was captured, so each must stay as it is. It captures for
the calling thread; another thread's first step captures again. Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from glm4runtime.backends.cuda import Memory, open_cuda
from glm4runtime.backends.held_row import HeldRow, Logits
from glm4runtime.backends.lengths import takes_lengths
from glm4runtime.contract import LOG_SUM, LOGITS, PREFILL, TOP_IDS, TOP_LOGITS, Manifest, UserError

CAPTURING = {"enable_cuda_graph": "1"}  # of ONNX Runtime's provider cuda
_GRAPH_ID = "gpu_graph_id"
_STEP, _NEVER = "1", "-1"


def require_capture(manifest: Manifest) -> None:
    """Raise UserError where ``cuda_graphs`` was asked for and the bundle's steps can't be captured."""
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


class CapturedStep:
    """Where the step's logits go, and the run options that say which runs are captured."""

    def __init__(self, vocab_size: int, device_id: int, top: int = 0) -> None:
        """top: how many of a row's tokens the graph names.

        Raises UserError where cuda-python is missing or the device has no memory."""
        cuda = open_cuda("gpu")
        cuda("cudaSetDevice", device_id)
        self._held, self._shape = Memory(cuda), (1, 1, vocab_size)
        self._device_id, size = device_id, 4 * vocab_size
        self._address = self._held.device(size, "logits of a step")
        pinned, view = self._held.pinned(size)
        self.row: np.ndarray = view.view(np.float32)  # [vocab]
        kind = cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._download = cuda.checked("cudaMemcpy", pinned, self._address, size, kind)
        self._top, size = top, top * (8 + 4) + 4  # in a block of their own: ids, logits and the logarithm, one copy
        if top:
            self._top_address = self._held.device(size, "a step's most probable tokens")
            pinned, self._top_view = self._held.pinned(size)
            self._download_top = cuda.checked("cudaMemcpy", pinned, self._top_address, size, kind)
        self._captured, self.uncaptured = _run_options(_STEP), _run_options(_NEVER)

    def bind(self, binding: Any, device: str) -> None:
        """Have a step's logits written to the device's memory."""
        binding.bind_output(LOGITS, device, self._device_id, np.float32, self._shape, self._address)
        if self._top:
            at, place, shape = self._top_address, (device, self._device_id), (1, 1, self._top)
            binding.bind_output(TOP_IDS, *place, np.int64, shape, at)
            binding.bind_output(TOP_LOGITS, *place, np.float32, shape, at + 8 * self._top)
            binding.bind_output(LOG_SUM, *place, np.float32, (1, 1), at + 12 * self._top)

    def run(self, session: Any, binding: Any, *, hold: bool) -> Logits:
        """Run a step, captured at first and replayed from then on; returns its logits, float32 [vocab]."""
        session.run_with_iobinding(binding, self._captured)
        if not (hold and self._top):
            return self._fetch()
        self._download_top()
        ids, numbers = self._top_view[: 8 * self._top].view(np.int64), self._top_view[8 * self._top :].view(np.float32)
        return HeldRow(numbers[:-1], ids, float(numbers[-1]), self._fetch)

    def _fetch(self) -> np.ndarray:
        self._download()
        return self.row

    def close(self) -> None:
        """Free the device's memory; behind the session that writes to it."""
        self._held.close()


def _run_options(graph_id: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
