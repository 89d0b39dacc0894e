"""The one place where TensorRT and TensorRT-RTX differ for the compiler.

Both come as a Python module with the same builder, parser and network classes. Full TensorRT times kernels on the GPU
at hand, so it builds for that GPU only. TensorRT-RTX compiles for named GPUs on any machine and leaves the choice of
kernels to the machine that runs the engine.

Full TensorRT has never run: docs/status.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.backends.trt_module import import_flavour
from glm4runtime.contract import UserError, installing
from glm4runtime.contract.engine_spec import FLAVOURS, Profile

MOST_TEXTS = 16  # in one run of a graph without a cache
MOST_ROWS = 16  # of logits that a run is asked for; the runtime's MAX_RUN, which a test compares

# TensorRT-RTX 1.7.1's compiler fails ("more than one op named attention_mask.1_iota") on some geometries, the embedded
# model's among them, when the most tokens that a profile allows is 2 to 64. More than asked for costs scratch memory.
_RTX_LEAST_WIDTH = 128


@dataclass(frozen=True)
class Flavour:
    """What one flavour of TensorRT can do; ``name`` is a key of FLAVOURS and the name of the pip extra."""

    name: str
    cross_compiles: bool  # builds without a GPU, for any compute capability that it knows
    times_kernels: bool  # measures on the GPU while it builds, so that a timing cache saves work
    version_compatible: bool  # can build engines that later versions load
    takes_plugins: bool  # so that --attention plugin has something to run it
    shares_weights: bool  # between the profiles of one engine; RTX 1.7.1 stores fp16 weights once for each profile

    def load(self) -> Any:
        """Its Python module. Raises UserError, naming the package and the pip command, where it isn't installed."""
        return import_flavour(self.name)

    def profiles(self, chunk: int, sequences: int = 1) -> tuple[Profile, ...]:
        """Optimization profiles for runs of 1 to ``chunk`` tokens of one sequence: a session has no more.

        Prefill asks for one row of logits, the verification of drafts for up to MOST_ROWS. With more ``sequences``,
        also for steps of one token of each of 1 to that many.
        """
        if self.shares_weights:
            steps = Profile("steps", (1, sequences, sequences), (1, 1, 1), (1, 1, 1))
            return (
                Profile("prefill", (1, 1, 1), (1, chunk, chunk), (1, 1, 1)),
                Profile("decode", (1, 1, 1), (1, 1, MOST_ROWS), (1, 1, MOST_ROWS)),
                *((steps,) if sequences > 1 else ()),
            )
        width = max(chunk, _RTX_LEAST_WIDTH)
        return (Profile("step", (1, 1, sequences), (1, 1, width), (1, 1, MOST_ROWS)),)

    def text_profiles(self, longest: int) -> tuple[Profile, ...]:
        """The profile of a graph without a cache: one to MOST_TEXTS texts of up to ``longest`` tokens."""
        width = longest if self.shares_weights else max(longest, _RTX_LEAST_WIDTH)
        return (Profile("texts", (1, 1, MOST_TEXTS), (1, width, width), (1, 1, 1)),)

    def capabilities(self, module: Any) -> dict[str, Any]:
        """What :attr:`cross_compiles` can build for: ``8.9`` and the module's name for it."""
        members = module.ComputeCapability.__members__.items()
        return {f"{name[2:-1]}.{name[-1]}": member for name, member in members if name.startswith("SM")}


TENSORRT = Flavour(
    "tensorrt",
    cross_compiles=False,
    times_kernels=True,
    version_compatible=True,
    takes_plugins=True,
    shares_weights=True,
)
TENSORRT_RTX = Flavour(
    "tensorrt-rtx",
    cross_compiles=True,
    times_kernels=False,
    version_compatible=False,
    takes_plugins=False,
    shares_weights=False,
)
BY_NAME = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def choose_flavour(name: str | None) -> Flavour:
    """The flavour called ``name``, or the installed one; full TensorRT where both are and there's a GPU.

    Raises UserError where none is installed.
    """
    if name is not None:
        BY_NAME[name].load()
        return BY_NAME[name]
    found = installed_flavours()
    if not found:
        raise UserError(
            f"neither tensorrt nor tensorrt_rtx is installed; {installing('tensorrt-rtx')} "
            "(or '.[tensorrt]', on the machine with the GPU)"
        )
    if TENSORRT in found and (len(found) == 1 or gpu_capability() is not None):
        return TENSORRT
    return found[-1]


def installed_flavours() -> list[Flavour]:
    """Flavours whose module can be found, without importing it."""
    return [flavour for flavour in BY_NAME.values() if find_spec(FLAVOURS[flavour.name]) is not None]
