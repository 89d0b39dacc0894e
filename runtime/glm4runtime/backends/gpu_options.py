"""Which GPU a session in ONNX Runtime uses, and how much of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glm4runtime.contract import UserError, shown


@dataclass(frozen=True)
class GpuOptions:
    """``device_id``: as CUDA counts the visible GPUs. ``mem_limit``: GB that may be taken; None: what there is."""

    device_id: int = 0
    mem_limit: float | None = None

    def cuda(self, cache_bytes: int = 0, sessions: int = 1) -> dict[str, str]:
        """Options of ONNX Runtime's provider ``cuda`` for each of ``sessions`` beside a cache of so many bytes.

        Memory is taken as it is asked for; by default what is taken doubles each time. Raises UserError where the cache
        alone takes the limit.
        """
        options = {"device_id": str(self.device_id), "arena_extend_strategy": "kSameAsRequested"}
        if self.mem_limit is not None:
            left = int(self.mem_limit * 1e9) - cache_bytes
            if left < sessions:
                raise UserError(
                    f"gpu_mem_limit={self.mem_limit:g} GB: the cache alone takes {cache_bytes / 1e9:.2f} GB; give "
                    "more, or open the bundle with a smaller max_seq_len"
                )
            options["gpu_mem_limit"] = str(left // sessions)
        return options


ANY_GPU = GpuOptions()


def gpu_options(device_id: Any, gpu_mem_limit: Any, provider: str) -> GpuOptions:
    """Check :func:`glm4runtime.load`'s arguments.

    Raises UserError for values that no GPU has, and for a provider that would pass them over.
    """
    if isinstance(device_id, bool) or not isinstance(device_id, int) or device_id < 0:
        raise UserError(f"device_id={shown(device_id)} is not a whole number from 0 on")
    if device_id and provider not in ("cuda", "tensorrt"):
        mend = "leave it out" if provider == "cpu" else f"set CUDA_VISIBLE_DEVICES={device_id} in the environment"
        raise UserError(f"device_id={device_id} is for cuda and tensorrt, this session runs on {provider}; {mend}")
    if gpu_mem_limit is None:
        return GpuOptions(device_id)
    if isinstance(gpu_mem_limit, bool) or not isinstance(gpu_mem_limit, int | float) or not 0 < gpu_mem_limit < 1e6:
        raise UserError(f"gpu_mem_limit={shown(gpu_mem_limit)} is not a number of GB above 0")
    if provider != "cuda":
        raise UserError(f"gpu_mem_limit is for cuda, this session runs on {provider}; leave it out")
    return GpuOptions(device_id, gpu_mem_limit)
