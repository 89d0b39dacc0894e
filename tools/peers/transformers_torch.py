"""transformers' own Glm4ForCausalLM: the fp32 reference of accuracy, and bf16 as a peer in speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peers.protocol import Groups, needs, versions

with needs("pip install torch~=2.13.0 transformers"):
    import torch
    import transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Transformers:
    """Eager PyTorch with a growing cache; prefill computes the last token's logits only."""

    def __init__(self, checkpoint: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.Glm4ForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype])
        self._model = model.eval()
        self._cache = transformers.DynamicCache()
        self.name = f"{versions('transformers', 'torch')}, {dtype}"
        self.settings = f"{threads} threads, attention {model.config._attn_implementation}"
        table, itemsize = self._model.lm_head.weight.numel(), DTYPES[dtype].itemsize
        counts = {
            "blocks": sum(p.numel() for p in self._model.model.layers.parameters() if p.dim() > 1),
            "head": table,
            "embedding": table,
        }
        self.groups: Groups = {group: (count * itemsize, count) for group, count in counts.items()}
        self.files_bytes = itemsize * sum(p.numel() for p in self._model.parameters())

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._cache = transformers.DynamicCache()
        return self._run(ids, keep=1)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._run(np.array([token]), keep=1)[-1]

    def every(self, ids: np.ndarray) -> np.ndarray:
        self._cache = transformers.DynamicCache()
        return self._run(ids, keep=0)

    def _run(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Logits of the last ``keep`` tokens (0: of all), [n, vocab]."""
        with torch.inference_mode():
            inputs = torch.from_numpy(np.asarray(ids, np.int64))[None]
            out = self._model(inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        logits: np.ndarray = out.logits[0].float().numpy()
        return logits
