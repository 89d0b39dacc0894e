"""Which GPU a session in ONNX Runtime uses, and how much of its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glm4runtime.contract import UserError, shown


@dataclass(frozen=True)
class GpuOptions:
    """``device_id``: as CUDA counts the visible GPUs. ``mem_limit``: GB that may be taken; None: what there is.

    ``stages``: where a bundle's stages are on several GPUs, that of each; the first is ``device_id`` then.
    """

    device_id: int = 0
    mem_limit: float | None = None
    stages: tuple[int, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """Every GPU that is used, once."""
        return tuple(dict.fromkeys(self.stages or (self.device_id,)))

    def of_stage(self, index: int) -> int:
        """The GPU of a stage; stage 0 is all of a bundle without them."""
        return self.stages[index] if self.stages else self.device_id

    def on(self, device_id: int) -> GpuOptions:
        """The same for that one alone."""
        return GpuOptions(device_id, self.mem_limit)

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


def gpu_options(device_id: Any, gpu_mem_limit: Any, provider: str, stages: tuple[int, ...] | None = None) -> GpuOptions:
    """Check :func:`glm4runtime.load`'s arguments. stages: the manifest's.

    Raises UserError for values that no GPU has, and for a provider or a bundle that would pass them over.
    """
    if isinstance(device_id, list | tuple):
        return _several(device_id, gpu_mem_limit, provider, stages)
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


def _several(ids: Sequence[Any], limit: Any, provider: str, stages: tuple[int, ...] | None) -> GpuOptions:
    """One GPU for each stage of a bundle."""
    if provider != "cuda":
        raise UserError(f"device_id={shown(list(ids))}: several devices are for cuda, this session runs on {provider}")
    if stages is None:
        raise UserError(
            f"device_id={shown(list(ids))}: the bundle has no stages, so it runs on one device; give one number, or "
            f"build it with --stages {max(2, len(ids))}"
        )
    if len(ids) != len(stages):
        raise UserError(
            f"device_id={shown(list(ids))}: the bundle has {len(stages)} stages; give a device for each, or one for all"
        )
    checked = [gpu_options(device_id, limit, provider) for device_id in ids]
    devices = tuple(options.device_id for options in checked)
    return checked[0] if len(set(devices)) == 1 else GpuOptions(devices[0], checked[0].mem_limit, devices)
