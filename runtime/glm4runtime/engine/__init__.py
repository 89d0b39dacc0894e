"""Many sequences at once on one bundle: what services embed.

>>> from glm4runtime import Engine, Request
>>> with Engine.load("glm-4-9b", slots=8, max_seq_len=4096) as engine:
...     for delta in engine.generate(Request(messages=[{"role": "user", "content": "Hello"}])):
...         print(delta.content, end="", flush=True)
"""

from glm4runtime.engine.engine import Engine
from glm4runtime.engine.handle import Handle, RequestFailed
from glm4runtime.engine.plan import QueueFull
from glm4runtime.engine.prepare import PromptTooLong
from glm4runtime.engine.request import Delta, Request, Result, Timing, Usage
from glm4runtime.engine.stats import EngineStats
from glm4runtime.engine.worker import EngineClosed

__all__ = [
    "Delta",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Handle",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "RequestFailed",
    "Result",
    "Timing",
    "Usage",
]
