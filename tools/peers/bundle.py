"""A bundle of this project, through ``glm4runtime``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from peers.protocol import Groups, needs

with needs("pip install '.[cpu]'"):
    from glm4runtime import load
    from glm4runtime.contract import DECODE, LOGITS, WEIGHTS, past_name

_GROUPS = {
    "embedding": re.compile(r"model\.embed_tokens\."),
    "head": re.compile(r"lm_head\."),
    "blocks": re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(?!.*bias)"),
}


class Bundle:
    """One session; ``every`` opens the decode graph by itself and runs a whole window with a cache of its own."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        with needs("pip install onnxruntime"):
            import onnxruntime
        self._session = load(folder, threads=threads, max_seq_len=context)
        self._folder, self._every = folder, None
        manifest = self._session.manifest
        self._runner = self._session.runner
        self.name = (
            f"glm4export {manifest.producer_version} (onnxruntime {onnxruntime.__version__}) {folder.name}, "
            f"{manifest.precision}"
        )
        self.settings = f"{threads} threads"
        self.files_bytes = (folder / WEIGHTS).stat().st_size
        self.groups = _groups(folder / manifest.graphs[DECODE].file, manifest.config)

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._runner.rewind()
        return self._runner.prefill(ids)

    def step(self, token: int) -> np.ndarray:
        return self._runner.decode(token)

    def every(self, ids: np.ndarray) -> np.ndarray:
        import onnxruntime

        cache, count = self._session.manifest.cache, len(ids)
        if self._every is None:
            path = self._folder / self._session.manifest.graphs[DECODE].file
            self._every = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        empty = np.zeros((1, cache.kv_heads, count, cache.head_dim), cache.dtype)
        names = [past_name(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
        feed = {"input_ids": ids[None], "attention_mask": np.ones((1, count), np.int64)}
        (logits,) = self._every.run([LOGITS], feed | {name: empty.copy() for name in names})
        return np.asarray(logits)[0]


def _groups(graph: Path, config: dict[str, int]) -> Groups:
    """Stored bytes of the decode graph's matrices by the place they have in the model, scales included."""
    try:
        import onnx
    except ModuleNotFoundError:
        return {}
    sizes = dict.fromkeys(_GROUPS, 0)
    for stored in onnx.load(graph, load_external_data=False).graph.initializer:
        length = next((int(entry.value) for entry in stored.external_data if entry.key == "length"), 0)
        for group, pattern in _GROUPS.items():
            if pattern.match(stored.name):
                sizes[group] += length
    hidden, table = config["hidden_size"], config["hidden_size"] * config["vocab_size"]
    attention = hidden * config["head_dim"] * 2 * (config["num_attention_heads"] + config["num_key_value_heads"])
    blocks = config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])
    counts = {"blocks": blocks, "head": table, "embedding": table}
    return {group: (sizes[group], counts[group]) for group in sizes if sizes[group]}
