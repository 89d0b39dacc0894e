"""Shared by tests: StepGraph, ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from glm4runtime.contract import read_manifest


class StepGraph:
    """A step graph over a cache that past and present share."""

    def __init__(self, bundle: Path, batch: int = 1) -> None:
        self.manifest = read_manifest(bundle)
        self.session = ort.InferenceSession(bundle / "step.onnx")
        spec = self.manifest.cache
        shape = (batch, spec.kv_heads, spec.max_seq_len, spec.head_dim)
        past = [name for value in self.session.get_inputs() if (name := value.name).startswith("past")]
        self.cache = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype)) for name in past}
        self.lengths = np.zeros(batch, np.int64)

    def run(self, ids: np.ndarray, new: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Append ids [batch, seq], of which ``new`` [batch] are real; logits of ``rows``, by default of all."""
        batch, seq = ids.shape
        positions = self.lengths[:, None] + np.arange(seq)
        slots = np.arange(self.manifest.cache.max_seq_len)
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "write_indices": self.lengths,
            "attention_mask": slots <= positions[:, None, :, None],
            "logit_rows": np.broadcast_to(np.arange(seq), (batch, seq)) if rows is None else rows,
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.lengths = self.lengths + new
        logits: np.ndarray = binding.copy_outputs_to_cpu()[-1]
        return logits


def ones(count: int) -> np.ndarray:
    return np.array([count])
