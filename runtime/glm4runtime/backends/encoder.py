"""A graph without a cache in ONNX Runtime: a batch of whole texts in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.gpu_options import gpu_options
from glm4runtime.backends.graph_check import require_graphs, require_token_ids, takes_positions
from glm4runtime.backends.ort_session import open_session, require_provider
from glm4runtime.backends.providers import ENGINE, GRAPH_PROVIDERS, default_provider
from glm4runtime.backends.runner import refuse_closed
from glm4runtime.backends.settings import PROVIDERS
from glm4runtime.backends.side_by_side import side_by_side
from glm4runtime.contract import ATTENTION_MASK, INPUT_IDS, MODEL, POSITION_IDS, TENSORRT, Manifest, UserError


class EncoderRunner:
    """``model.onnx`` of a bundle without a cache."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str | None,
        threads: int,
        device_id: Any = 0,
        gpu_mem_limit: Any = None,
    ) -> None:
        """Open the graph; arguments as :func:`glm4runtime.load_encoder`'s.

        Raises UserError for a provider that doesn't fit or can't start, BundleError for a damaged graph.
        """
        chosen = provider or default_provider(manifest)
        known = [name for name in PROVIDERS if name != ENGINE] if manifest.target == TENSORRT else GRAPH_PROVIDERS
        if chosen not in known:
            raise UserError(
                f"{folder}: provider {chosen!r} doesn't run a bundle for {manifest.target} and {manifest.task} here; "
                f"give one of {', '.join(known)}"
            )
        gpu = gpu_options(device_id, gpu_mem_limit, chosen)
        require_graphs(folder, manifest)
        require_token_ids(folder, manifest)
        require_provider(chosen, gpu.device_id)
        options = gpu.cuda() if chosen == "cuda" else {"device_id": str(gpu.device_id)} if gpu.device_id else {}
        graph = manifest.graphs[MODEL]
        self.provider = chosen
        rows = graph.inputs[0].dims[0]
        self.most_rows = rows if isinstance(rows, int) else None  # texts in one run
        self._takes_positions = takes_positions(graph)
        self._output = graph.outputs[0].name
        (self._session,) = side_by_side([lambda: open_session(folder / graph.file, chosen, threads, options=options)])
        self.closed = False

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The graph's output for input_ids and attention_mask, int64 [batch, seq]: float32 [batch, ...]."""
        if self.closed:
            refuse_closed()
        feed = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if self._takes_positions:  # transformers' own where it's given none
            feed[POSITION_IDS] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        output: np.ndarray = self._session.run([self._output], feed)[0]
        return output

    def close(self) -> None:
        """Free the graph. From then on :meth:`run` raises UserError."""
        self.closed = True
        self.__dict__.pop("_session", None)
