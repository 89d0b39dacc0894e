"""Eight bits for the activations of int8 prefill, where this machine's kernels can take them.

A graph of ``--prefill-precision int8`` rounds activations to 7 bits, which no kernel sums up wrongly. Without VNNI,
x86 adds two products of uint8 and int8 in 16 bits, and 255 * 127 * 2 doesn't fit; elsewhere it does, and 8 bits halve
the error of every such matmul in the same time. Both numbers that differ are initializers, which a session may replace.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort

from glm4runtime.backends.matmul_model import matmul_model
from glm4runtime.contract import ACTIVATION_STEP, ACTIVATION_ZERO

_RUNS = (1, 2, 3, 64)  # rows: kernels for one row, few and many
_DEPTH, _COLUMNS = 64, 48


def use_eight_bits(settings: Any) -> None:
    """Have the session that is opened with ``settings`` round to 8 bits where that's exact; other graphs ignore it."""
    if sums_are_exact():
        for name, value in _eight_bits().items():
            settings.add_initializer(name, value)


@cache
def sums_are_exact() -> bool:
    """Whether onnxruntime's kernels on this CPU add products of uint8 and int8 without saturating: tried, once."""
    for weight in (127, -127):
        model = matmul_model(np.full((_DEPTH, _COLUMNS), weight, np.int8))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for rows in _RUNS:
            (sums,) = session.run(None, {"A": np.full((rows, _DEPTH), 255, np.uint8)})
            if (np.asarray(sums) != 255 * weight * _DEPTH).any():
                return False
    return True


@cache  # a session reads them where they are: they're never freed
def _eight_bits() -> dict[str, Any]:
    values = {ACTIVATION_STEP: np.array(1 / 127, np.float32), ACTIVATION_ZERO: np.array(128, np.uint8)}
    return {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
