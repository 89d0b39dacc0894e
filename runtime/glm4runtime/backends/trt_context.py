"""An execution context of a TensorRT engine: where its tensors are, and which shapes it is set to.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4runtime.contract import BundleError, UserError

Shapes = Mapping[str, tuple[int, ...]]


class RunContext:
    """One execution context. Nothing else refers to it, so that :meth:`close` destroys it."""

    def __init__(self, stream: Any) -> None:
        self.context: Any = None
        self._stream = stream
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}  # that it is set to

    def open(self, engine: Any, module: Any, scratch: tuple[int, int], log: Any, *, captured: bool) -> None:
        """Make the context. scratch: address and size of memory that it shares with others."""
        self.context = _create(engine, module, captured=captured)
        if self.context is None:
            raise UserError(f"create_execution_context failed: {log.text}")
        self.context.set_device_memory(*scratch)

    def place(self, addresses: Mapping[str, int]) -> None:
        """From now on these tensors are at these addresses."""
        for name, address in addresses.items():
            if not self.context.set_tensor_address(name, address):
                raise BundleError(f"the engine has no tensor {name!r}; build it again")

    def close(self) -> None:
        """Destroy the context."""
        self.context = None

    def shape(self, shapes: Shapes, profile: int) -> None:
        """Set the inputs' shapes, all of them, and the profile; nothing is called for what is set already."""
        if self._profile != profile:  # a change forgets the shapes
            self._profile, self._shapes = -1, {}  # until it's made: an interrupt may come between
            if not self.context.set_optimization_profile_async(profile, int(self._stream)):
                raise UserError(f"set_optimization_profile_async to profile {profile} failed")
            self._profile = profile
        changed = {name: dims for name, dims in shapes.items() if self._shapes.get(name) != dims}
        if not changed:
            return
        for name, dims in changed.items():
            self._shapes.pop(name, None)
            if not self.context.set_input_shape(name, dims):
                raise BundleError(f"the engine refuses {name} of {list(dims)}; build it again")
        if missing := self.context.infer_shapes():
            raise BundleError(f"the engine has inputs that a step graph has not: {', '.join(missing)}; build it again")
        self._shapes |= changed


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
