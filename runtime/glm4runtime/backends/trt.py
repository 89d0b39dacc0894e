"""A TensorRT engine of the step graph: everything on the device, allocated once; decode steps replay a CUDA graph.

Never run on a GPU: docs/status.md.

A captured graph holds its execution context's state, so NVIDIA asks for one context per graph, with scratch memory
shared between contexts ("Inference with CUDA Graphs" in TensorRT-RTX's performance guide). Hence two: ``token`` for
decode steps, captured, and ``many`` for prompts and drafts, whose shapes change.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.cuda import Cuda, Memory, open_cuda
from glm4runtime.backends.fork import refuse_in_children
from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.backends.step import longest_run, profiles_for
from glm4runtime.backends.trt_context import RunContext
from glm4runtime.backends.trt_module import error_log, import_flavour, version_of
from glm4runtime.contract import (
    DTYPE_BYTES,
    LOGITS,
    BundleError,
    FileSpec,
    Manifest,
    UserError,
    check_file,
    past_name,
    present_name,
)
from glm4runtime.contract.engine_spec import EngineSpec, read_engine_specs


class EngineRunner(Runner):
    """A bundle for ``tensorrt`` on one of its engines. The cache has the bundle's whole length always."""

    device = "cuda"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        spec: EngineSpec,
        *,
        module: Any,
        cuda: Cuda,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        """Read the engine, allocate cache and buffers, capture the decode step.

        module: the flavour's, as :func:`glm4runtime.backends.trt_module.import_flavour` gives it. prefill_chunk: fewer
        where the engine's profiles take fewer. Raises UserError where the device refuses, BundleError for an engine
        that can't be read or does not serve the runs of a session.
        """
        most = longest_run(spec)
        super().__init__(manifest, max_seq_len=max_seq_len, prefill_chunk=min(prefill_chunk, most) if most else 1)
        draft = min(MAX_RUN, manifest.cache.max_seq_len)
        self._profiles = profiles_for(spec, self.prefill_chunk, every_row=False)
        self._draft_profiles = profiles_for(spec, draft, every_row=True)
        self._cuda, self._memory = cuda, Memory(cuda)
        self._end = weakref.finalize(self, self._memory.close)
        nonblocking = cuda.api.cudaStreamNonBlocking
        self._stream = self._memory.keep("cudaStreamDestroy", cuda("cudaStreamCreateWithFlags", nonblocking))
        self._wait = cuda.checked("cudaStreamSynchronize", self._stream)
        self._log = error_log(module)
        # Contexts, engine and runtime go in this order, before the stream and the memory they were given, and after the
        # graph that holds a context's state.
        owned: list[Any] = [module.Runtime(self._log)]
        self._memory.at_close(owned.clear)
        if spec.version_compatible:  # it holds code for the host, which is why its hash was compared: open_engine
            owned[0].engine_host_code_allowed = True
        owned.append(_read_engine(owned[0], folder / spec.file, self._log))
        self._memory.at_close(owned.pop)
        addresses = _allocate_cache(self._memory, manifest)
        self._logits = self._allocate_logits(draft, manifest.vocab_size, addresses)
        if spec.weight_streaming:
            _set_budget(owned[1], self._log)
        scratch = owned[1].device_memory_size_v2
        shared = self._memory.device(scratch, "scratch memory"), scratch
        kinds: list[RunContext] = []
        for width, rows in ((1, 1), (max(self.prefill_chunk, draft), draft)):
            kind = RunContext(cuda, self._memory, self._stream, manifest, width, rows)
            self._memory.at_close(kind.close)
            kind.open(owned[1], module, shared, addresses, self._log, captured=not kinds)
            kinds.append(kind)
        self._token, self._many = kinds
        refuse_in_children(self, "_run_prompt", "_run_token", "_run_draft")
        cuda("cudaDeviceSynchronize")  # the stream doesn't wait for what was cleared and copied outside of it
        self._replay = self._capture()

    def _release(self) -> None:
        self._end()
        del self._replay, self._token, self._many, self._download, self._logits, self._wait

    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        row: np.ndarray = self._run_many(ids, start, self._profiles, padding=padding)[0]
        return row

    def _run_token(self, token: int, start: int) -> np.ndarray:
        self._token.fill((token,), start)
        if self._replay is None:
            self._enqueue(self._token, 1)
        else:
            self._replay()
        self._wait()
        row: np.ndarray = self._logits[0]
        return row

    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        return self._run_many(tokens, start, self._draft_profiles, every_row=True)

    def _run_many(
        self,
        tokens: Sequence[int] | np.ndarray,
        start: int,
        profiles: list[int],
        *,
        every_row: bool = False,
        padding: int = 0,
    ) -> np.ndarray:
        count = len(tokens)
        rows = count if every_row else 1
        self._many.fill(tokens, start, every_row=every_row, padding=padding)
        self._many.shape(count, rows, profiles[count - 1])
        self._enqueue(self._many, rows)
        self._wait()
        return self._logits[:rows]

    def _enqueue(self, kind: RunContext, rows: int) -> None:
        """Integers to the device, the engine, logits back: on the stream, in this order."""
        kind.upload()
        if not kind.context.execute_async_v3(int(self._stream)):
            raise UserError(f"execute_async_v3 failed: {self._log.text}")
        self._download[rows - 1]()

    def _capture(self) -> Callable[[], None] | None:
        """The replay of a decode step captured as a CUDA graph; None, with a warning, where it can't be captured.

        The step runs once before: TensorRT leaves work to a context's first run that can't be captured. It writes
        token 0 to the cache's first row, which the first prompt overwrites.
        """
        token, cuda, api = self._token, self._cuda, self._cuda.api
        token.fill((0,), 0)
        token.shape(1, 1, self._profiles[0])
        self._enqueue(token, 1)
        self._wait()
        try:
            capturable = getattr(token.context, "is_stream_capturable", None)  # TensorRT-RTX's
            if capturable is not None and not capturable(int(self._stream)):
                raise UserError("is_stream_capturable says no")
            cuda("cudaStreamBeginCapture", self._stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                self._enqueue(token, 1)
            except UserError:
                api.cudaStreamEndCapture(self._stream)  # an error as well, which says less; it frees the stream
                raise
            graph = self._memory.keep("cudaGraphDestroy", cuda("cudaStreamEndCapture", self._stream))
            replay = self._memory.keep("cudaGraphExecDestroy", cuda("cudaGraphInstantiate", graph, 0))
        except UserError as error:
            warnings.warn(f"decode steps run without a CUDA graph, and slower: {error}", stacklevel=2)
            return None
        return cuda.checked("cudaGraphLaunch", replay, self._stream)

    def _allocate_logits(self, rows: int, vocab: int, addresses: dict[str, int]) -> np.ndarray:
        """Logits [rows, vocab] in pinned memory, their place on the device, and a copy for every number of rows."""
        size = 4 * vocab
        source = addresses[LOGITS] = self._memory.device(rows * size, "logits")
        to, view = self._memory.pinned(rows * size)
        back = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._download = [
            self._cuda.checked("cudaMemcpyAsync", to, source, count * size, back, self._stream)
            for count in range(1, rows + 1)
        ]
        return view.view(np.float32).reshape(rows, vocab)


def open_engine(
    folder: Path, manifest: Manifest, *, max_seq_len: int | None, prefill_chunk: int, check_hashes: bool
) -> EngineRunner:
    """A session on the first engine of the bundle that fits this machine.

    Raises UserError with what is missing, or with the reason for every engine that doesn't fit.
    """
    specs = read_engine_specs(folder)
    if not specs:
        raise UserError(f"{folder}: no engine in the bundle; {_REMEDY}")
    reasons = []
    for spec in specs:
        try:
            module = import_flavour(spec.flavour)
            cuda = open_cuda(spec.flavour)
            spec.require(
                manifest,
                flavour=spec.flavour,
                version=version_of(module),
                compute_capability=gpu_capability() or "unknown",
            )
        except UserError as error:
            reasons.append(str(error))
            continue
        _check_files(folder, manifest, spec, check_hashes)
        return EngineRunner(
            folder, manifest, spec, module=module, cuda=cuda, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk
        )
    raise UserError(f"{folder}: no engine that runs here: {'; '.join(dict.fromkeys(reasons))}; {_REMEDY}")


_REMEDY = "`--provider cpu` runs the same graph in ONNX Runtime, without a GPU"


def _check_files(folder: Path, manifest: Manifest, spec: EngineSpec, check_hashes: bool) -> None:
    """Compare the engine with its sidecar; where hashes count, both must be the manifest's.

    They do for a version-compatible engine always: loading it runs the code in it.
    """
    told, sidecar = FileSpec(spec.size, spec.sha256), Path(spec.file).with_suffix(".json").as_posix()
    if check_hashes or spec.version_compatible:
        for name in (sidecar, spec.file):
            if name not in manifest.files:
                raise BundleError(f"{folder / name}: the manifest doesn't list it; build the engine again")
        if manifest.files[spec.file] != told:
            raise BundleError(f"{folder / sidecar}: the manifest has another engine; build the engine again")
        if not check_hashes:
            check_file(folder, sidecar, manifest.files[sidecar], check_hashes=True)
    check_file(folder, spec.file, told, check_hashes=spec.version_compatible and not check_hashes, by="its sidecar")


def _set_budget(engine: Any, log: Any) -> None:
    """Have weights that the device has no room for beside the cache stay on the host.

    A streaming engine's own setting is that all are on the device. TensorRT takes another before there are contexts,
    and their scratch memory depends on it.
    """
    budget = engine.get_weight_streaming_automatic_budget()
    try:
        engine.weight_streaming_budget_v2 = budget
    except RuntimeError as error:
        raise UserError(f"weight_streaming_budget_v2={budget} failed: {log.text or error}") from None
    if engine.weight_streaming_budget_v2 != budget:
        raise UserError(f"weight_streaming_budget_v2={budget} failed: {log.text}")


def _read_engine(runtime: Any, path: Path, log: Any) -> Any:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BundleError(f"{path}: deserialize_cuda_engine failed: {log.text}; build the engine again")
    return engine


def _allocate_cache(memory: Memory, manifest: Manifest) -> dict[str, int]:
    """Addresses of the cache's inputs and outputs: past and present of a layer at the same one."""
    cache, addresses = manifest.cache, {}
    size = cache.kv_heads * cache.max_seq_len * cache.head_dim * DTYPE_BYTES[cache.dtype]
    for layer in range(cache.layers):
        for part in ("key", "value"):
            address = memory.device(size, "the cache")
            addresses[past_name(layer, part)] = addresses[present_name(layer, part)] = address
    return addresses
