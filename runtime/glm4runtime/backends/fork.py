"""Refuse sessions in a forked child: their threads don't exist there.

A forked child has the memory of its parent, and none of its threads. What runs on a library's threads can't be used
there, and not even be freed: ONNX Runtime waits, spinning, for threads that are not.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, NoReturn

from glm4runtime.contract import UserError

_guarded: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def refuse_in_children(thing: Any, *methods: str) -> None:
    """From a fork on, in the child: ``methods`` of ``thing`` raise UserError, and it's never freed."""
    _guarded[thing] = methods


def _in_child() -> None:
    for thing, methods in list(_guarded.items()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))  # even the interpreter's end doesn't free it now
        for name in methods:
            setattr(thing, name, _refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "this session was loaded before the process forked, and works in the parent only; load the bundle in the child"
    )


os.register_at_fork(after_in_child=_in_child)
