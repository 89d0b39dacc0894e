"""A TensorRT engine on the device: its stream, its contexts, the logits it writes, all freed in the one right order.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.cuda import Cuda, Memory
from glm4runtime.backends.trt_context import RunContext, Shapes
from glm4runtime.backends.trt_module import error_log
from glm4runtime.contract import LOGITS, BundleError, UserError
from glm4runtime.contract.engine_spec import EngineSpec


class DeviceEngine:
    """An engine that was read, and what runs of it need. :meth:`close`, or the last reference, frees everything.

    Whoever makes one allocates caches and inputs from ``memory`` first, then calls :meth:`reserve_scratch`, then opens
    contexts: what a streaming engine keeps on the device depends on what is left there, and its scratch memory on that.
    """

    def __init__(self, path: Path, spec: EngineSpec, module: Any, cuda: Cuda) -> None:
        """Read the engine. module: the flavour's, as :func:`glm4runtime.backends.trt_module.import_flavour` gives it.

        Raises UserError where the device refuses, BundleError for an engine that can't be read.
        """
        self.cuda, self.memory = cuda, Memory(cuda)
        self.close = weakref.finalize(self, self.memory.close)
        nonblocking = cuda.api.cudaStreamNonBlocking
        self.stream = self.memory.keep("cudaStreamDestroy", cuda("cudaStreamCreateWithFlags", nonblocking))
        self.wait = cuda.checked("cudaStreamSynchronize", self.stream)
        self._module, self._log, self._spec = module, error_log(module), spec
        # Contexts, engine and runtime go in this order, before the stream and the memory they were given, and after the
        # graph that holds a context's state.
        self._owned: list[Any] = [module.Runtime(self._log)]
        self.memory.at_close(self._owned.clear)
        if spec.version_compatible:  # it holds code for the host, which is why its hash was compared: trt_choice
            self._owned[0].engine_host_code_allowed = True
        self._owned.append(read_engine(self._owned[0], path, self._log))
        self.memory.at_close(self._owned.pop)
        self._scratch = 0, 0  # address and size

    def reserve_scratch(self) -> None:
        """Allocate what all contexts share, one run at a time; of what is left, keep weights on the device."""
        engine = self._owned[1]
        if self._spec.weight_streaming:
            _set_budget(engine, self._log)
        size = engine.device_memory_size_v2
        self._scratch = self.memory.device(size, "scratch memory"), size

    def context(self, addresses: Mapping[str, int], *, captured: bool) -> RunContext:
        """A context over tensors at ``addresses``, by name. captured: for one run, which is to be captured."""
        context = RunContext(self.stream)
        self.memory.at_close(context.close)
        context.open(self._owned[1], self._module, self._scratch, self._log, captured=captured)
        context.place(addresses)
        return context

    def enqueue(self, context: RunContext, upload: Callable[[], None], download: Callable[[], None]) -> None:
        """Inputs to the device, the engine, logits back: on the stream, in this order."""
        upload()
        if not context.context.execute_async_v3(int(self.stream)):
            raise UserError(f"execute_async_v3 failed: {self._log.text}")
        download()

    def captured(
        self, context: RunContext, shapes: Shapes, profile: int, run: Callable[[], None]
    ) -> Callable[[], None]:
        """A run with these shapes as a CUDA graph to be replayed; where it can't be captured, ``run`` and a warning.

        It runs once before: TensorRT leaves work to a context's first run that can't be captured. What it then writes
        to the cache must harm nobody.
        """
        cuda, api = self.cuda, self.cuda.api
        context.shape(shapes, profile)
        run()
        self.wait()
        try:
            capturable = getattr(context.context, "is_stream_capturable", None)  # TensorRT-RTX's
            if capturable is not None and not capturable(int(self.stream)):
                raise UserError("is_stream_capturable says no")
            cuda("cudaStreamBeginCapture", self.stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                run()
            except UserError:
                api.cudaStreamEndCapture(self.stream)  # an error as well, which says less; it frees the stream
                raise
            graph = self.memory.keep("cudaGraphDestroy", cuda("cudaStreamEndCapture", self.stream))
            replay = self.memory.keep("cudaGraphExecDestroy", cuda("cudaGraphInstantiate", graph, 0))
        except UserError as error:
            warnings.warn(f"decode steps run without a CUDA graph, and slower: {error}", stacklevel=2)
            return run
        return cuda.checked("cudaGraphLaunch", replay, self.stream)


class DeviceLogits:
    """Logits [rows, vocab], float32: ``array`` in pinned host memory, and where the engine writes them."""

    def __init__(self, engine: DeviceEngine, rows: int, vocab: int) -> None:
        cuda, size = engine.cuda, 4 * vocab
        source = engine.memory.device(rows * size, "logits")
        to, view = engine.memory.pinned(rows * size)
        back = cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.addresses = {LOGITS: source}
        self.array: np.ndarray = view.view(np.float32).reshape(rows, vocab)
        self._downloads = [
            cuda.checked("cudaMemcpyAsync", to, source, count * size, back, engine.stream)
            for count in range(1, rows + 1)
        ]

    def download(self, rows: int) -> Callable[[], None]:
        """What puts the copy of the first rows on the stream."""
        return self._downloads[rows - 1]


def read_engine(runtime: Any, path: Path, log: Any) -> Any:
    """The engine in a file. Raises BundleError, in TensorRT's words, where there's none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BundleError(f"{path}: deserialize_cuda_engine failed: {log.text}; build the engine again")
    return engine


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
