"""A bundle of this project, through ``glm4runtime.Engine``: what ``glm4export serve`` answers with."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers.protocol import Groups, needs
from peers.serving import Times

with needs("pip install '.[cpu]'"):
    from glm4runtime import Engine, Request, SamplingParams
    from glm4runtime.contract import WEIGHTS


class EngineServer:
    """One engine without a prefix cache, its clients in threads of their own."""

    def __init__(self, folder: Path, threads: int, slots: int, context: int, *, invariant: bool) -> None:
        with needs("pip install onnxruntime"):
            import onnxruntime
        self._engine = Engine.load(
            folder, slots=slots, threads=threads, max_seq_len=context, invariant=invariant, prefix_cache="off"
        )
        manifest = self._engine.manifest
        self.name = (
            f"glm4export {manifest.producer_version} (onnxruntime {onnxruntime.__version__}) {folder.name}, "
            f"{manifest.precision}"
        )
        self.settings = f"{threads} threads, {slots} slots, invariant={invariant}"
        self.groups: Groups = {}
        self.files_bytes = (folder / WEIGHTS).stat().st_size

    def answer(self, prompts: Sequence[list[int]], new_tokens: int, at_once: int) -> list[Times]:
        params = SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens)

        def read(prompt: list[int]) -> Times:
            times = Times()
            for delta in self._engine.generate(Request(prompt, params=params)):
                if delta.tokens:
                    times.came(*delta.tokens)
            return times

        with ThreadPoolExecutor(at_once) as clients:
            return list(clients.map(read, prompts))
