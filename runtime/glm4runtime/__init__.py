"""Run a compiled GLM-4 bundle. No torch, no onnx.

>>> from glm4runtime import SamplingParams, load
>>> session = load("glm-4-9b-fp16")
>>> for piece in session.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=64)):
...     print(piece, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4runtime.contract import BundleError, UserError
    from glm4runtime.generate import Generation
    from glm4runtime.sampling import SamplingParams
    from glm4runtime.session import Session, load
    from glm4runtime.stream import TextStream

__all__ = ["BundleError", "Generation", "SamplingParams", "Session", "TextStream", "UserError", "load"]

_MODULES = {
    "BundleError": "contract",
    "UserError": "contract",
    "Generation": "generate",
    "SamplingParams": "sampling",
    "Session": "session",
    "TextStream": "stream",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the compiler needs the contract alone, the command line handles signals before it imports
    anything else, and onnxruntime may not be installed."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
