"""An execution context of a TensorRT engine, and the inputs it reads at addresses that stay.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm4runtime.backends.cuda import ALIGNMENT, Cuda, Memory
from glm4runtime.backends.step import INTEGERS, RunInputs, Staircase, cache_shapes, input_shapes
from glm4runtime.contract import ATTENTION_MASK, BundleError, Manifest, UserError


class RunContext:
    """One execution context with the inputs it reads: a block of integers, filled on the host, and a mask.

    Nothing else refers to the context, so that :meth:`close` destroys it.
    """

    def __init__(self, cuda: Cuda, memory: Memory, stream: Any, manifest: Manifest, width: int, rows: int) -> None:
        """Allocate the inputs of runs of up to ``width`` tokens with logits of up to ``rows``."""
        self.context: Any = None
        self._stream = stream
        self._max_seq, self._cache = manifest.cache.max_seq_len, cache_shapes(manifest.cache)
        self._set = (0, 0, -1)  # tokens, rows of logits and profile that the context is set to
        shapes = input_shapes(width, rows, self._max_seq)
        offsets, size = _offsets({name: shapes[name] for name in INTEGERS})
        integers = memory.device(size, "inputs")
        pinned, view = memory.pinned(size)
        to = cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.upload = cuda.checked("cudaMemcpyAsync", integers, pinned, size, to, stream)

        def part(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return view[offsets[name] :][: 8 * math.prod(shape)].view(np.int64).reshape(shape)

        self._inputs = RunInputs(width, rows, part)
        mask = memory.device(width * self._max_seq, "mask")
        pitch = self._max_seq + 1

        def fill(first: int, bandwidth: int, height: int, value: bool) -> None:
            cuda("cudaMemset2DAsync", mask + first, pitch, int(value), bandwidth, height, stream)

        self._stairs = Staircase(width, self._max_seq, fill)
        first = self._stairs.first()
        cuda("cudaMemcpy", mask, first.ctypes.data, first.nbytes, to)
        self._addresses = {name: integers + offset for name, offset in offsets.items()} | {ATTENTION_MASK: mask}

    def open(
        self,
        engine: Any,
        module: Any,
        scratch: tuple[int, int],
        shared: Mapping[str, int],
        log: Any,
        *,
        captured: bool,
    ) -> None:
        """Make the context. scratch: address and size; shared: addresses of the cache and the logits, by name."""
        self.context = _create(engine, module, captured=captured)
        if self.context is None:
            raise UserError(f"create_execution_context failed: {log.text}")
        self.context.set_device_memory(*scratch)
        for name, address in {**shared, **self._addresses}.items():
            if not self.context.set_tensor_address(name, address):
                raise BundleError(f"the engine has no tensor {name!r}; build it again")

    def close(self) -> None:
        """Destroy the context."""
        self.context = None

    def fill(
        self, tokens: Sequence[int] | np.ndarray, start: int, *, every_row: bool = False, padding: int = 0
    ) -> None:
        """Ready the inputs of a run: integers on the host, the mask on the device."""
        self._inputs.fill(tokens, start, every_row=every_row, padding=padding)
        self._stairs.move(start, len(tokens))

    def shape(self, count: int, rows: int, profile: int) -> None:
        """Set the context to runs of ``count`` tokens with ``rows`` of logits, where it isn't."""
        if self._set == (count, rows, profile):
            return
        shapes, last = input_shapes(count, rows, self._max_seq), self._set[2]
        self._set = (0, 0, -1)  # until all is set: an interrupt may come between
        if last != profile:  # a change of profile forgets the shapes
            if not self.context.set_optimization_profile_async(profile, int(self._stream)):
                raise UserError(f"set_optimization_profile_async to profile {profile} failed")
            shapes |= self._cache
        for name, dims in shapes.items():
            if not self.context.set_input_shape(name, dims):
                raise BundleError(f"the engine refuses {name} of {list(dims)}; build it again")
        if missing := self.context.infer_shapes():
            raise BundleError(f"the engine has inputs that a step graph has not: {', '.join(missing)}; build it again")
        self._set = (count, rows, profile)


def _create(engine: Any, module: Any, *, captured: bool) -> Any:
    """An execution context whose scratch memory is given to it.

    TensorRT-RTX compiles kernels for a shape while others, slower ones, already run; a graph would hold on to those.
    The context that is captured waits for its kernels instead.
    """
    allocation = module.ExecutionContextAllocationStrategy.USER_MANAGED
    kernels = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)
    if kernels is None or not captured:
        return engine.create_execution_context(allocation)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(allocation)
    config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
    return engine.create_execution_context(config)


def _offsets(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """Where each int64 tensor begins in a block that holds them all, in bytes, and the block's size."""
    offsets, size = {}, 0
    for name, shape in shapes.items():
        offsets[name] = size
        size += -(-8 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, size
