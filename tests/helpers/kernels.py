"""Builds of the embedded model in which every kernel of decoding and prefill gets its turn."""

from __future__ import annotations

from typing import Any

from tests.helpers.heldout import HELDOUT

# Options of the build, by name; the target is cpu where they name none.
KERNELS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4, prefill in int8": {"precision": "int4", "prefill_precision": "int8"},
    "int4, blocks of 32, 4-bit head": {"precision": "int4", "block_size": 32, "head_bits": 4},
    "int4 with an int8 cache": {"precision": "int4", "kv_cache": "int8", "calibrate": HELDOUT},
    "a step graph": {"precision": "int4", "target": "tensorrt", "max_seq_len": 256},
}
