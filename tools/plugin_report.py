"""What the attention plugin's kernels take of each device: shared memory, registers, spills. Needs no GPU.

python tools/plugin_report.py                     # every device, GLM-4's geometries, all kinds of cache: minutes
python tools/plugin_report.py --capability 89     # one device
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from glm4export.tensorrt.plugin.aot import Kernel, append_kernel, attend_kernel, combine_kernel
from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.tensorrt.plugin.tiles import CAPABILITIES, DEVICE_SHARED, SHARED_LIMIT, decode_tiles, prefill_tiles

MODELS = {
    "9B": Geometry(32, 2, 128, 64, 32768, 128**-0.5),
    "32B": Geometry(48, 2, 128, 64, 32768, 128**-0.5),
    "Rumination": Geometry(48, 8, 128, 64, 131072, 128**-0.5),
    "demo": Geometry(6, 2, 64, 32, 2048, 64**-0.5),
}
TYPES = (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "int8"))


def kernels(geometry: Geometry, capability: int) -> Iterator[tuple[str, Kernel]]:
    """Each kernel by its use."""
    yield "append", append_kernel(geometry, capability)
    yield "decode", attend_kernel(geometry, capability, decode_tiles(geometry))
    yield "prefill", attend_kernel(geometry, capability, prefill_tiles(geometry))
    yield "combine", combine_kernel(geometry, capability)


def registers(kernel: Kernel) -> tuple[int, int]:
    """Registers per thread, and bytes per thread of local memory: spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append", help="default: all")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    arguments = parser.parse_args()
    print(f"No kernel may take more than {SHARED_LIMIT} bytes of shared memory a block.")
    head = f"{'device':8}{'allows':>8}  {'model':11}{'types':19}{'kernel':9}{'tile':18}"
    print(f"{head}{'shared':>7}{'registers':>10}{'spilled':>8}")
    for capability in arguments.capability or CAPABILITIES:
        for model in arguments.model or MODELS:
            for dtype, cache in TYPES:
                shape = MODELS[model]
                geometry = Geometry(**{**vars(shape), "dtype": dtype, "cache_dtype": cache})
                for use, kernel in kernels(geometry, capability):
                    tile = kernel.tile
                    size = "" if tile is None else f"{tile.block_m}x{tile.block_n}, {tile.warps} warps, {tile.stages}"
                    used, spilled = registers(kernel)
                    print(
                        f"sm_{capability:<5}{DEVICE_SHARED[capability]:>8}  {model:11}{f'{dtype}, {cache}':19}"
                        f"{use:9}{size:18}"
                        f"{kernel.shared:>7}{used:>10}{spilled:>8}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
