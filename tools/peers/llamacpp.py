"""llama.cpp, driven at its lowest level: GGUF files quantized by its own quantizer, and only ``llama_decode`` timed.

Variants: any of llama.cpp's file types below, or one with ``-pure`` behind it (token embedding and output head
quantized like the rest, where the plain one keeps the head at Q6_K), or F32 (weights, cache and attention exact: what
the GGUF writer is proven with).
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Groups, needs

with needs("CMAKE_ARGS='-DGGML_NATIVE=ON' pip install llama-cpp-python gguf (compiles llama.cpp)"):
    import gguf
    import llama_cpp

QUANTIZED = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
WRITTEN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # by the GGUF writer, without quantizing
_SOURCE = "BF16"  # what is quantized: exact for bf16 checkpoints
_GGML_F32 = 0
_LOG_ERROR = 4


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, _: object) -> None:
    if level == _LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


llama_cpp.llama_log_set(_errors_only, None)  # it tells hundreds of lines about every file


def gguf_file(checkpoint: Path, work: Path, variant: str, threads: int) -> Path:
    """The GGUF of a checkpoint in a variant, made in ``work`` where it isn't there yet."""
    base, _, pure = variant.partition("-")
    if base not in QUANTIZED | WRITTEN or pure not in ("", "pure"):
        raise ValueError(f"unknown GGUF variant {variant!r}; known: {', '.join([*WRITTEN, *QUANTIZED])}, and -pure")
    path = work / f"{variant}.gguf"
    if path.is_file():
        return path
    work.mkdir(parents=True, exist_ok=True)
    if base in WRITTEN:
        with needs(f"only writing {path} takes it: pip install '.[compile]' gguf"):
            from peers.gguf_writer import write_gguf
        write_gguf(checkpoint, path, WRITTEN[base])
    else:
        _quantize(gguf_file(checkpoint, work, _SOURCE, threads), path, QUANTIZED[base], bool(pure), threads)
    return path


def _quantize(source: Path, path: Path, file_type: int, pure: bool, threads: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, file_type, pure
    params.max_buf_size = 1 << 30
    partial = path.with_suffix(".partial")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {path.name}")
    partial.rename(path)


def context_params(threads: int, tokens: int) -> Any:
    """llama.cpp's defaults with flash attention and a cache of at least so many tokens."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = -(-tokens // 256) * 256
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return params


def open_file(path: Path, params: Any) -> tuple[Any, Any]:
    """The model, its weights repacked, and a context."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = True  # repacking
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    context = model and llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot open {path}")
    return model, context


class LlamaCpp:
    """One GGUF file and one sequence; flash attention and weights repacked for the CPU, where it has kernels for them.

    The cache is f16, llama.cpp's default (f32, and attention exact, for the F32 variant).
    """

    def __init__(self, path: Path, threads: int, context: int, *, exact: bool = False) -> None:
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) {path.stem}"
        self.files_bytes = path.stat().st_size
        self.groups = _groups(path)
        params = context_params(threads, context)
        params.n_batch = params.n_ctx
        if exact:
            params.type_k = params.type_v = _GGML_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        attention = "exact attention, cache f32" if exact else "flash attention, cache f16"
        self.settings = f"{threads} threads, repacking, {attention}, built with {kernels()}"
        self._model, self._context = open_file(path, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        for index in range(params.n_batch):
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
        shape = (params.n_batch,)
        self._tokens = np.ctypeslib.as_array(self._batch.token, shape)
        self._positions = np.ctypeslib.as_array(self._batch.pos, shape)
        self._wanted = np.ctypeslib.as_array(self._batch.logits, shape)
        self._length = 0

    def start(self, ids: np.ndarray) -> np.ndarray:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._length = 0
        return self._decode(ids, every=False)[0]

    def step(self, token: int) -> np.ndarray:
        return self._decode(np.array([token]), every=False)[0]

    def every(self, ids: np.ndarray) -> np.ndarray:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._length = 0
        return self._decode(ids, every=True)

    def _decode(self, ids: np.ndarray, *, every: bool) -> np.ndarray:
        """Append tokens; logits of all of them or of the last, [n, vocab], in llama.cpp's own buffer."""
        count = len(ids)
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(self._length, self._length + count)
        self._wanted[:count] = every
        self._wanted[count - 1] = True
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += count
        llama_cpp.llama_synchronize(self._context)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (count if every else 1, self._vocab))


def kernels() -> str:
    """The instruction sets that this build of llama.cpp uses, such as ``AVX2 AVX512 AVX512_VNNI REPACK``."""
    told = llama_cpp.llama_print_system_info().decode()
    return " ".join(re.findall(r"(\w+) = 1", told))


def _groups(path: Path) -> Groups:
    """Stored bytes and parameters of the matrices, from the file's own table."""
    groups = {"blocks": (0, 0), "head": (0, 0), "embedding": (0, 0)}
    kinds = {"blk": "blocks", "output": "head", "token_embd": "embedding"}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            kind = kinds[tensor.name.split(".")[0]]
            size, count = groups[kind]
            groups[kind] = (size + int(tensor.n_bytes), count + int(tensor.n_elements))
    return groups
