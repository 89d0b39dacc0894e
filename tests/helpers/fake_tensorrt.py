"""A stand-in for a GPU: TensorRT, and in ``fake_cuda.py`` CUDA's runtime, as sessions call them, over host memory.

It has no mercy: device memory starts as NaN, work waits on its stream until that is synchronized, a captured graph
replays the addresses and shapes it was captured with, addresses must lie in what was allocated, on the right side of a
copy. An engine is a file that names a step graph, which ONNX Runtime runs. Every name here is one of the real packages
(``tests/runtime/trt/test_names.py``); how real devices behave beyond that, it doesn't know.

What their docstrings ask for is asked for here too: 256-byte aligned scratch memory as large as the engine says *after*
its streaming budget is set; no budget beyond an engine that streams, nor with contexts; shapes within the profile, set
again behind a change of profile; every address before a run; no host code unless allowed; nothing freed under a
context, a graph or work that may still use it. Rules broken where an exception would be lost, in finalizers, are
collected in ``FakeCuda.broken_rules``.
"""

from __future__ import annotations

import ctypes
import types
import weakref
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.helpers.fake_cuda import ALIGNMENT, FakeCuda, Graph

_DEVICE_BYTES = 500_000
_TYPES: dict[str, type] = {
    "tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(float)": np.float32, "tensor(int8)": np.int8,
}  # fmt: skip


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class ExecutionContextAllocationStrategy(IntEnum):
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    EAGER = 1


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class IExecutionContext:
    """One set of addresses, shapes and a profile."""

    def __init__(self, engine: ICudaEngine, config: Any) -> None:
        strategy = config._strategy if isinstance(config, IRuntimeConfig) else config
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "set_device_memory is for USER_MANAGED"
        self._captured: Any = None
        self._engine, self._config = engine, config
        self._profile, self._shapes, self._addresses, self._scratch = 0, {}, {}, (0, 0)
        self._number = len(engine._cuda.contexts)
        engine._cuda.contexts.add(self)

    def __del__(self) -> None:
        cuda = self._engine._cuda
        if any(isinstance(held, Graph) and self._captured in held.work for held in cuda.handles):
            cuda.broken_rules.append("a context destroyed before the graph that was captured of it")

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0 and size >= self._engine.device_memory_size_v2
        self._engine._cuda.require("device", memory, size)
        self._scratch = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % ALIGNMENT == 0
        self._addresses[name] = memory
        return name in self._engine._inputs or name in self._engine._outputs

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._engine._cuda.calls.append(("set_optimization_profile_async", profile_index))
        assert stream_handle in self._engine._cuda.handles
        self._profile, self._shapes = profile_index, {}
        return profile_index < len(self._engine._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._engine._cuda.calls.append(("set_input_shape", name, tuple(shape)))
        if not self._engine._allows(self._profile, name, tuple(shape)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine._capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._engine._cuda
        cuda.calls.append(("execute_async_v3", dict(self._shapes)))
        assert self._scratch[0] and stream_handle in cuda.handles
        missing = {*self._engine._inputs, *self._engine._outputs} - set(self._addresses)
        assert not missing, f"no address for {missing}"
        if self._engine._broken or self.infer_shapes():
            return False
        work = partial(self._engine._run, dict(self._shapes), dict(self._addresses))
        self._captured = self._captured if cuda.captured is None else work
        cuda.submit(work)
        return True


class ICudaEngine:
    """A step graph in ONNX Runtime, reading and writing at addresses."""

    streamable_weights_size = 10_000

    def __init__(self, cuda: FakeCuda, graph: Path, profiles: Any) -> None:
        self._streams, self._budget = False, self.streamable_weights_size
        self._cuda, self._profiles = cuda, profiles
        self._broken, self._capturable = False, True
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    @property
    def device_memory_size_v2(self) -> int:
        """More where weights come and go through it."""
        return 1000 if self._budget >= self.streamable_weights_size else 3000

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        self._cuda.calls.append(("weight_streaming_budget_v2", budget))
        if not self._streams or self._cuda.contexts or budget < 0:
            raise RuntimeError("the budget can't be set")
        self._budget = budget

    def get_weight_streaming_automatic_budget(self) -> int:
        """Some of what the device has left."""
        return max(0, _DEVICE_BYTES - sum(self._cuda.memory["device"].values())) // 100

    def create_execution_context(self, config: Any) -> IExecutionContext:
        return IExecutionContext(self, config)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def _allows(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        ranges, declared = self._profiles[profile], self._inputs[name].shape
        return len(declared) == len(shape) and all(
            size == dim if isinstance(dim, int) else getattr(ranges, dim)[0] <= size <= getattr(ranges, dim)[2]
            for size, dim in zip(shape, declared, strict=True)
        )

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for name, shape in shapes.items():
            feed[name] = self._view(addresses[name], shape, _TYPES[self._inputs[name].type])
        for name, value in zip(self._outputs, self._session.run(self._outputs, feed), strict=True):
            self._view(addresses[name], value.shape, value.dtype)[...] = value

    def _view(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._cuda.require("device", address, size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class FakeTensorRT(types.SimpleNamespace):
    """The module: reads an "engine" whose bytes are the path of a step graph.

    ``engine`` and ``runtime``: the last ones, while they live.
    """

    def __init__(self, cuda: FakeCuda, profiles: Any, *, flavour: str = "tensorrt_rtx") -> None:
        super().__init__(
            __version__="1.7.1",
            ILogger=ILogger,
            ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
            engine=None,
            runtime=None,
            host_code=False,  # that its engines hold code for the host
            streams=False,  # that they were built for weight streaming
            broken=False,  # that its engines refuse to run
            capturable=True,
        )
        if flavour == "tensorrt_rtx":
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        module = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self._logger = logger
                self.engine_host_code_allowed = False
                self._engine: Callable[[], Any] = lambda: None
                module.runtime = weakref.proxy(self)

            def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
                text = bytes(serialized_engine).decode()
                if not text.endswith(".onnx"):
                    self._logger.log(Severity.WARNING, "a warning")
                    self._logger.log(Severity.ERROR, "not an engine\nat all")
                    return None
                if module.host_code and not self.engine_host_code_allowed:
                    self._logger.log(Severity.ERROR, "engine_host_code_allowed is False")
                    return None
                engine = ICudaEngine(cuda, Path(text), profiles)
                engine._streams, engine._broken, engine._capturable = module.streams, module.broken, module.capturable
                module.engine, self._engine = weakref.proxy(engine), weakref.ref(engine)
                return engine

            def __del__(self) -> None:
                if self._engine() is not None:
                    cuda.broken_rules.append("a runtime destroyed before its engine")

        self.Runtime = Runtime
