"""OpenVINO GenAI's continuous batching over the IR that ``peers.openvino_int4`` exports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peers.openvino_int4 import GROUP_SIZE
from peers.protocol import Groups, needs, versions
from peers.serving import Times

os.environ |= {"CI": "true"}  # or importing it sends an event
with needs("pip install openvino-genai"):
    import openvino as ov
    import openvino_genai

_BLOCK = 32  # tokens of a block of its cache on CPUs


class OpenVinoServer:
    """One ``ContinuousBatchingPipeline``; requests are token ids, so it needs no tokenizer."""

    def __init__(self, folder: Path, threads: int, slots: int, context: int) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_seqs = slots
        scheduling.num_kv_blocks = slots * -(-context // _BLOCK) + slots
        scheduling.enable_prefix_caching = False
        settings = {"INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", settings)
        self._asked = 0
        self.name = f"{versions('openvino-genai', 'openvino')} {folder.name}"
        self.settings = (
            f"{threads} threads, continuous batching, max_num_seqs {slots}, "
            f"max_num_batched_tokens {scheduling.max_num_batched_tokens}, split fuse {scheduling.dynamic_split_fuse}, "
            f"activations in groups of {GROUP_SIZE}"
        )
        self.groups: Groups = {}
        self.files_bytes = (folder / "openvino_model.bin").stat().st_size

    def answer(self, prompts: Sequence[list[int]], new_tokens: int, at_once: int) -> list[Times]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        answers: list[Times] = []
        under_way = {}
        while under_way or len(answers) < len(prompts):
            while len(under_way) < at_once and len(answers) < len(prompts):
                ids = np.array(prompts[len(answers)], np.int64)[None]
                answers.append(Times())
                under_way[len(answers) - 1] = self._pipeline.add_request(self._asked, ov.Tensor(ids), config)
                self._asked += 1
            self._pipeline.step()
            for number, handle in list(under_way.items()):
                if handle.can_read():
                    answers[number].came(*(token for out in handle.read().values() for token in out.generated_ids))
                if len(answers[number].tokens) >= new_tokens:
                    del under_way[number]
        return answers
