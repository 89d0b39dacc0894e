"""A loaded bundle, ready to answer: the runtime's front door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4runtime.chat import ChatTemplate
from glm4runtime.contract import BundleError, Manifest, read_manifest
from glm4runtime.generate import Generation
from glm4runtime.invariance import make_invariant
from glm4runtime.providers import open_runner
from glm4runtime.runner import Runner
from glm4runtime.sampling import SamplingParams
from glm4runtime.tokenizer import Tokenizer


def load(
    bundle: str | Path,
    *,
    provider: str | None = None,
    threads: int = 0,
    max_seq_len: int | None = None,
    prefill_chunk: int = 512,
    check_hashes: bool = False,
    invariant: bool = False,
) -> Session:
    """Open a bundle that ``glm4export build`` made.

    bundle: its folder. provider: ``cpu`` or ``cuda``, by default the bundle's target. A bundle for TensorRT runs on its
    engine (``engine``, the default), or in ONNX Runtime on ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``, its
    execution providers of these names. threads: 0 lets ONNX Runtime choose. max_seq_len: length of the cache in tokens,
    by default the bundle's. prefill_chunk: prompt tokens computed in one run, which bounds the memory that a long
    prompt takes. check_hashes: compare every file's sha256 first. invariant: the same tokens and logits, to the bit,
    for every ``lookup`` and however a prompt is split, at up to a fifth of a lone stream's speed in int8 and int4; see
    :mod:`glm4runtime.invariance`. Without it, two logits that lie within rounding may change places.

    Raises BundleError where the folder isn't a whole bundle of this format, UserError for settings that don't fit.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder, check_hashes=check_hashes)
    runner = open_runner(
        folder,
        manifest,
        provider=provider,
        threads=threads,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        check_hashes=check_hashes,
    )
    if invariant:
        make_invariant(runner)
    return Session(folder, manifest, runner)


class Session:
    """One bundle in memory with the cache of one sequence. Not thread-safe: open one session for each worker."""

    def __init__(self, folder: Path, manifest: Manifest, runner: Runner) -> None:
        self.folder = folder
        self.manifest = manifest
        self.runner = runner

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError where it has none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path}: missing; this bundle takes token ids only, build it from a checkpoint with one")
        return Tokenizer.from_file(path)

    @cached_property
    def template(self) -> ChatTemplate:
        """The bundle's chat template. Raises UserError where it has none."""
        return ChatTemplate.from_folder(self.folder)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, lookup: int = 0
    ) -> Generation:
        """Token ids that follow a prompt given as text or token ids; see :class:`Generation`.

        lookup: guess up to this many tokens per run (0 to 15; 7 is a good number) where the text repeats itself, see
        :mod:`glm4runtime.lookup`. Raises UserError for a prompt that isn't token ids of the vocabulary, or too long.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Generation(self.runner, tokens, params or SamplingParams(), lookup=lookup)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, lookup: int = 0
    ) -> TextStream:
        """Text that follows a prompt, piece by piece; arguments as :meth:`generate`."""
        return TextStream(self.tokenizer, self.generate(prompt, params, lookup=lookup))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        lookup: int = 0,
    ) -> TextStream:
        """The assistant's answer to a conversation, piece by piece.

        messages: dicts with ``role`` and ``content``; tools: OpenAI-style function descriptions; lookup: as
        :meth:`generate`. Where the stream's ``stop_text`` is ``<|observation|>``, the text is a tool call: see
        :func:`glm4runtime.chat.parse_tool_calls`.
        """
        prompt = self.template.render(messages, tools)
        return self.stream(prompt, params, lookup=lookup)


class TextStream(Iterator[str]):
    """Pieces of text as they become certain; never half a character. ``text`` holds what came so far."""

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self.generation = generation
        self.text = ""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._done = False

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length``, or None while running."""
        return self.generation.finish_reason

    @property
    def stop_text(self) -> str | None:
        """The stop token as text, such as ``<|user|>`` or ``<|observation|>``; None where none came."""
        token = self.generation.stop_token
        return None if token is None else self._tokenizer.decode([token], skip_special_tokens=False)

    def __next__(self) -> str:
        while not self._done:
            token = next(self.generation, None)
            self._done = token is None
            piece = self._decoder.finish() if token is None else self._decoder.push(token)
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def read(self) -> str:
        """The whole text, waiting for the end."""
        for _ in self:
            pass
        return self.text
