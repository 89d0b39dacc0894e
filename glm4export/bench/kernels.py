"""How fast this machine multiplies a prompt's rows with weights in blocks and by rows: measured once, and kept."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from glm4export.bench.limits import matmul_peak
from glm4runtime.backends.prepare import machine_key

_WORTH = 1.2  # what int8 rows must gain in speed for the bytes they take


@dataclass(frozen=True)
class KernelSpeeds:
    """Operations a second, a multiplication and an addition being two, of ``int4`` in blocks and ``int8`` by rows."""

    int4: float
    int8: float

    @property
    def rows_are_faster(self) -> bool:
        """Whether prefill by rows is worth weights of its own."""
        return self.int8 >= _WORTH * self.int4


def kernel_speeds() -> KernelSpeeds:
    """What was measured on this CPU with this onnxruntime, or is now, in two seconds; kept in the user's cache."""
    name = f"kernels-{machine_key()[:16]}.json"
    with suppress(OSError, ValueError, TypeError, RuntimeError):  # not there, damaged, of another version, no home
        path = _cache_folder() / name
        kept = KernelSpeeds(**json.loads(path.read_text(encoding="utf-8")))
        if min(kept.int4, kept.int8) > 0:
            return kept
    speeds = KernelSpeeds(matmul_peak("int4"), matmul_peak("int8"))
    with suppress(OSError, RuntimeError):  # no home, or one that can't be written: measured again next time
        path = _cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(speeds), file)
        Path(file.name).replace(path)
    return speeds


def _cache_folder() -> Path:
    told = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(told) if Path(told).is_absolute() else Path.home() / ".cache") / "glm4export"
