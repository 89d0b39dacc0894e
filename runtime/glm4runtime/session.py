"""A loaded bundle, ready to answer: the runtime's front door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4runtime.backends.huge_pages import collapse
from glm4runtime.backends.invariance import make_invariant
from glm4runtime.backends.providers import open_runner
from glm4runtime.backends.runner import Runner, refuse_closed
from glm4runtime.backends.settings import Provider, Settings, require_path
from glm4runtime.contract import Manifest, UserError, read_manifest, wrong_task
from glm4runtime.generation import Generation
from glm4runtime.sampling import SamplingParams
from glm4runtime.scoring import Score, log_probabilities, score
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.chat import ChatTemplate
from glm4runtime.text.files import read_text_files
from glm4runtime.text.stop import Stop, split_stop, stop_items
from glm4runtime.text.stream import TextStream
from glm4runtime.text.tokenizer import Tokenizer


def load(
    bundle: str | Path,
    *,
    provider: Provider | None = None,
    threads: int = 0,
    max_seq_len: int | None = None,
    prefill_chunk: int | None = None,
    check_hashes: bool = False,
    invariant: bool = False,
    huge_pages: bool = False,
    device_id: int | Sequence[int] = 0,
    gpu_mem_limit: float | None = None,
    cuda_graphs: bool = False,
    chat_template: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Session:
    """Open a bundle that ``glm4export build`` made.

    bundle: its folder. provider: ``cpu`` or ``cuda``, by default the bundle's target. A bundle for TensorRT runs on its
    engine (``engine``, the default), or in ONNX Runtime on ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``, its
    execution providers of these names. threads: 0 lets ONNX Runtime choose. max_seq_len: length of the cache in tokens,
    by default the bundle's. prefill_chunk: prompt tokens computed in one run, which bounds the memory that a long
    prompt takes; by default 512, and 2048 for int8 and int4 on ``cuda``. check_hashes: compare every file's sha256
    first. invariant: the same tokens and logits, to the bit, for every ``lookup`` and however a prompt is split, at up
    to a fifth of a lone stream's speed in int8 and int4; see :mod:`glm4runtime.backends.invariance`. Without it, two
    logits that lie within rounding may change places. huge_pages: put the process's large blocks of memory into huge
    pages, where Linux lets it: a second or two per GB, and steps take up to a seventh less
    (GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment gives the same for nothing). device_id: which of the
    visible GPUs, for ``cuda`` and ``tensorrt``; other providers use the first. Of a bundle built with ``--stages``, one
    number has all stages on one device, and on ``cuda`` a list has each on its own. gpu_mem_limit: GB that cache,
    weights and activations may take on it, or on each, for ``cuda``. cuda_graphs: launch a step of decoding as one
    captured graph, for ``cuda``; never run yet, see docs/gpu.md. chat_template: a Jinja template in place of the
    bundle's, as text or as the Path of a file. adapters: files of ``glm4export adapter``, by the names that requests
    call them by, for a bundle built with ``--lora-slots``.

    Tokenizer and template are read now; a bundle that is moved or replaced later doesn't change this session.

    A process that forks loads after it: an inherited session is refused in the child.

    Raises BundleError where the folder isn't a whole bundle of this format, UserError for settings that don't fit.
    """
    settings = Settings(
        provider=provider,
        threads=threads,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        check_hashes=check_hashes,
        invariant=invariant,
        huge_pages=huge_pages,
        device_id=device_id,
        gpu_mem_limit=gpu_mem_limit,
        cuda_graphs=cuda_graphs,
        adapters=adapters,
    )
    require_path("bundle", bundle)
    folder = Path(bundle)
    manifest = read_manifest(folder, check_hashes=check_hashes)
    if manifest.kv_cache is None:
        raise wrong_task(folder, manifest.task)
    text = BundleText(folder, read_text_files(folder), chat_template)
    runner = open_runner(folder, manifest, settings)
    if huge_pages:
        collapse()
    if invariant:
        make_invariant(runner)
    return Session(folder, manifest, runner, text)


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise UserError(f"score: {what} is {value!r:.80}, expected a list")
    return list(value)


class Session:
    """One bundle in memory with the cache of one sequence. Not thread-safe: open one session for each worker.

    Of a prompt that begins like the text in the cache, as a conversation's next turn does, only the rest is computed:
    see :meth:`glm4runtime.backends.runner.Runner.resume`.

    ``with load(...) as session:`` frees weights and cache at its end, as :meth:`close` does.
    """

    def __init__(self, folder: Path, manifest: Manifest, runner: Runner, text: BundleText) -> None:
        self.folder = folder
        self.manifest = manifest
        self.runner = runner
        self._text = text

    def __enter__(self) -> Session:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs or the engine with their weights, and the cache, and end the chat template's process.

        From then on whatever computes raises UserError, streams that were under way too; closing again does nothing.
        A forked child that closes the session it inherited leaves its parent's alone.
        """
        self.runner.close()
        self._text.close()

    def _require_open(self) -> None:
        if self.runner.closed:
            refuse_closed()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that were loaded."""
        return self.runner.adapters

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError where it has none, or a broken one."""
        self._require_open()
        return self._text.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The bundle's chat template, or the one that ``load`` was given. Raises UserError where there's none."""
        self._require_open()
        return self._text.template

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lookup: int = 0,
        stop: Stop = (),
        adapter: str | None = None,
    ) -> Generation:
        """Token ids that follow a prompt given as text or token ids; see :class:`Generation`.

        lookup: guess up to this many tokens per run (0 to 15; 7 is a good number) where the text repeats itself, see
        :mod:`glm4runtime.lookup`. stop: further tokens to stop on, as ids or as a special token's text, beside the
        bundle's own; strings made of several tokens are for :meth:`stream` and :meth:`chat`. adapter: one of
        :attr:`adapters`; None is the base model. Raises UserError for an adapter that isn't loaded, and for a prompt
        that isn't token ids of the vocabulary, or too long.
        """
        ids, strings = self._stops(stop)
        for string in strings:
            token = self.tokenizer.token_id(string)
            if token not in ids:
                raise UserError(f"stop: {string!r} is no special token; stop strings go with stream() and chat()")
        return self._generate(prompt, params, lookup, ids, adapter)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        lookup: int = 0,
        stop: Stop = (),
        adapter: str | None = None,
    ) -> TextStream:
        """Text that follows a prompt, piece by piece.

        stop: token ids and strings that end the text beside the bundle's own tokens; strings are found across tokens,
        and neither is part of the text. The other arguments are those of :meth:`generate`.
        """
        ids, strings = self._stops(stop)
        return TextStream(self.tokenizer, self._generate(prompt, params, lookup, ids, adapter), strings)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        lookup: int = 0,
        stop: Stop = (),
        adapter: str | None = None,
    ) -> TextStream:
        """The assistant's answer to a conversation, piece by piece.

        messages: dicts with ``role`` and ``content``, tool calls and results in OpenAI's form or the template's; tools:
        OpenAI-style function descriptions; lookup, stop, adapter: as :meth:`stream`. The stream's ``tool_calls`` are
        the calls that the model asks for, and its ``content`` the words beside them.
        """
        prompt = self.template.render(messages, tools)
        return self.stream(prompt, params, lookup=lookup, stop=stop, adapter=adapter)

    def loss(self, text: str | Sequence[int], *, adapter: str | None = None) -> float:
        """Mean negative log-probability of every token but the first, given all in front of it: nats per token.

        text, or token ids: at least two tokens, of which the cache has room for all but the last; for more,
        :mod:`glm4export.evaluation` has windows. Raises UserError for others.
        """
        self._require_open()
        self.runner.use_adapter(adapter)
        return -float(log_probabilities(self.runner, self._tokens(text))[0].mean())

    def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        *,
        adapter: str | None = None,
    ) -> list[Score]:
        """How probable each continuation is behind a prompt, such as a reranker or a multiple-choice test asks.

        Prompt and continuations are all texts, or all token ids. Of a text, those tokens count in which the whole
        differs from the prompt alone: a word's end may make another token of its beginning. What the cache has of the
        prompt isn't computed again. Raises UserError for an empty prompt or continuation, and where the cache has no
        room.
        """
        self._require_open()
        self.runner.use_adapter(adapter)
        return [self._score(prompt, continuation) for continuation in _listed(continuations, "continuations")]

    def _score(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Score:
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise UserError("score: prompt and continuations must be all texts, or all token ids")
        if isinstance(prompt, str) and isinstance(continuation, str):
            given, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + continuation)
        else:
            given = _listed(prompt, "the prompt")
            whole = [*given, *_listed(continuation, "a continuation")]
        pairs = enumerate(zip(given, whole, strict=False))
        first = next((at for at, (one, other) in pairs if one != other), len(given))
        if given and not first:
            raise UserError(
                f"score: {prompt!r:.80} is no token of its own in front of {continuation!r:.80}: together they begin "
                "with another one; give a longer prompt, or token ids"
            )
        if first == 0 or first == len(whole):
            missing = "the prompt" if not first else f"the continuation {continuation!r:.80}"
            raise UserError(f"score: {missing} has no tokens; at least one of each is needed")
        return score(self.runner, whole[:first], whole[first:])

    def _tokens(self, text: str | Sequence[int]) -> Sequence[int]:
        return self.tokenizer.encode(text) if isinstance(text, str) else text

    def _stops(self, stop: Stop) -> tuple[list[int], list[str]]:
        wants_text = any(isinstance(item, str) for item in stop_items(stop))
        return split_stop(stop, self.tokenizer if wants_text else None, self.manifest.vocab_size)

    def _generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        lookup: int,
        stop: Sequence[int],
        adapter: str | None,
    ) -> Generation:
        self._require_open()
        tokens = self._tokens(prompt)
        eos = (*self.manifest.tokens.eos, *stop)
        return Generation(self.runner, tokens, params or SamplingParams(), eos, lookup=lookup, adapter=adapter)
