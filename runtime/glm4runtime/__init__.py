"""Run a compiled GLM-4 bundle. No torch, no onnx.

>>> from glm4runtime import SamplingParams, load
>>> session = load("glm-4-9b-fp16")
>>> for piece in session.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=64)):
...     print(piece, end="", flush=True)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.32 writes a device id under HOME when it's imported and sends what it ran from then on; its own
# disable_telemetry_events() comes too late for both. onnxruntime-genai obeys the same variable. What a machine runs is
# its owner's business, so this is set before anything can import either: glm4export's and tests' first line is us.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from glm4runtime.contract import BundleError, UserError
    from glm4runtime.encoder import Classification, Encoder, load_encoder
    from glm4runtime.engine import Delta, Engine, Request
    from glm4runtime.generation import Generation
    from glm4runtime.sampling import SamplingParams
    from glm4runtime.session import Session, load
    from glm4runtime.text.spans import Span
    from glm4runtime.text.stream import TextStream

__all__ = [
    "BundleError",
    "Classification",
    "Delta",
    "Encoder",
    "Engine",
    "Generation",
    "Request",
    "SamplingParams",
    "Session",
    "Span",
    "TextStream",
    "UserError",
    "load",
    "load_encoder",
]

_MODULES = {
    "BundleError": "contract",
    "UserError": "contract",
    "Classification": "encoder",
    "Encoder": "encoder",
    "load_encoder": "encoder",
    "Delta": "engine",
    "Engine": "engine",
    "Request": "engine",
    "Generation": "generation",
    "SamplingParams": "sampling",
    "Session": "session",
    "Span": "text.spans",
    "TextStream": "text.stream",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the compiler needs the contract alone, the command line handles signals before it imports
    anything else, and onnxruntime may not be installed."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
