"""What building an engine takes, told before it starts, from the graph's stored tensors alone.

What was seen of TensorRT-RTX 1.7.1, which builds alike on every machine (``tools/engine_memory.py`` measures it):

- The weights file is mapped: resident while it's read, but the kernel takes those pages back when memory is short.
- While it compiles, TensorRT makes a rearranged copy of some weights, for the whole model, and keeps it to the end: the
  packed query, key and value projection and gate_up_proj (whose halves its gated kernel interleaves) and the head in
  floating point; every int4 matrix; no int8 matrix.
- Then it gathers all weights in one piece while those copies are still there: the peak.
- The engine is written from that piece in 64 MiB parts. ``build_serialized_network`` would make another copy of it, and
  a second optimization profile stores fp16 weights again; neither is used here.

So the process's own memory peaks at the weights, plus the rearranged ones, plus 2% and 0.25 GB for the compiler. Seen
and estimated, GB: GLM-4-9B's geometry with 10 layers, int4 4.19 and 4.28, fp16 9.42 and 10.88; with 2 layers and a
vocabulary of 8192, int4 0.65 and 0.78, int8 0.71 and 0.77, fp16 1.65 and 1.82; 2 layers, fp16 and bf16 5.09 and 5.42.
So it's up to 20% high, and never seen to be low.

Builder flags, optimisation level, tiling level, number of threads, workspace and ``load_initializer`` with mapped
memory changed none of it; STRIP_PLAN and REFIT need a GPU.

Full TensorRT was not measured; the same formula is used for it, and GPU memory for timing kernels comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glm4runtime.backends.memory import memory_bytes
from glm4runtime.contract import UserError
from glm4runtime.contract.onnxfile import read_graph

_REARRANGED = ("qkv_proj", "gate_up_proj", "lm_head")  # module names, where the weight is in floating point
_COMPILER_BYTES = 250_000_000
_COMPILER_SHARE = 50  # one in so many bytes

Weights = Mapping[str, tuple[str, int]]  # dtype in ONNX's spelling such as ``float16``, and bytes


def stored_weights(graph: Path) -> Weights:
    """The weights of a written step graph. Raises BundleError where it can't be read."""
    return {name: (tensor.dtype, tensor.nbytes) for name, tensor in read_graph(graph).stored.items()}


def peak_bytes(weights: Weights) -> int:
    """The most memory of its own that building an engine of these weights takes; see above for the formula."""
    stored = sum(nbytes for _, nbytes in weights.values())
    rearranged = sum(nbytes for name, (dtype, nbytes) in weights.items() if _is_rearranged(name, dtype))
    needed = stored + rearranged
    return needed + needed // _COMPILER_SHARE + _COMPILER_BYTES


def require_memory(weights: Weights) -> int:
    """Estimate a build and compare it with what this machine has free; returns the estimate in bytes.

    Raises UserError where it won't fit: now, instead of being killed after minutes.
    """
    need = peak_bytes(weights)
    total, free = memory_bytes()
    if need > free:
        remedy = "Free some memory, or build" if need <= total else "Build"
        raise UserError(
            f"building this engine takes about {need / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB of "
            f"{total / 1e9:.1f} GB are free. {remedy} on a machine with more (`glm4export engine` builds from the "
            "finished bundle alone), or choose --precision int8 or int4"
        )
    return need


def _is_rearranged(name: str, dtype: str) -> bool:
    if dtype == "int4":
        return True
    return dtype in ("float32", "float16", "bfloat16") and any(f".{m}.weight" in f".{name}" for m in _REARRANGED)
