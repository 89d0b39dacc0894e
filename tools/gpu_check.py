"""What could not be checked without a GPU: run this on one, and send back the folder that it writes.

    python tools/gpu_check.py -o gpu-check
    python tools/gpu_check.py -o gpu-check-9b --model zai-org/GLM-4-9B-0414

With torch and triton alone: every kernel of the attention plugin, as TensorRT gets it, against PyTorch, and its speed:
bytes of cache read per second while decoding, beside a plain copy's, and arithmetic per second in prefill, beside
torch's scaled_dot_product_attention. With the project installed too: bundles for cuda in every precision, of the
embedded model unless told otherwise, compared with PyTorch as `glm4export verify` does, timed beside what a copy
reaches and beside transformers, their steps as CUDA graphs, eight requests at once beside each alone; tokens chosen
among a row's most probable ones beside whole rows; int4 with onnxruntime's fused kernels and without; and for each
installed TensorRT, engines in every precision, with either attention and, for the plugin, either way of updating the
cache and an int8 cache.

Without a GPU it runs what a CPU can, and says what it skipped. Writes report.md and report.json, and begins nothing
more after ten minutes. Exit status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plugin_runs.driver import Compiled
from plugin_runs.launch import attention
from plugin_runs.reference import Case
from torch.nn.functional import scaled_dot_product_attention

from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.tensorrt.plugin.tiles import decode_tiles, prefill_tiles
from glm4runtime.contract import UserError

TOLERANCE = {"float16": 3e-3, "bfloat16": 2e-2}  # of values of size 1
GROUPS = ((1, 2), (3, 2), (6, 8), (16, 2), (24, 2))  # query heads per kv head, kv heads
SEQUENCES = (((0, 150, 31), 1), ((900, 3), 5), ((0, 40), 130), ((1000, 0, 1), 1))  # pasts, new tokens
COLD_BYTES = 1 << 29  # what a round of decoding reads at least, several times the largest L2 cache
REPEATS = 20


def geometry(group: int, kv_heads: int, head_dim: int, max_seq: int, dtype: str, cache: str) -> Geometry:
    return Geometry(group * kv_heads, kv_heads, head_dim, head_dim // 2, max_seq, head_dim**-0.5, dtype, cache)


def check(capability: int, programs: int) -> Iterator[dict[str, Any]]:
    """Each case's largest difference from PyTorch in float32, and whether it's allowed."""
    kinds = (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "int8"))
    for (group, kv_heads), head_dim, (dtype, cache) in itertools.product(GROUPS, (64, 128), kinds):
        shape = geometry(group, kv_heads, head_dim, 1024, dtype, cache)
        launches = {tiles: Compiled(shape, capability, tiles(shape)) for tiles in (decode_tiles, prefill_tiles)}
        for (tiles, launch), (starts, seq) in itertools.product(launches.items(), SEQUENCES):
            case = Case.random(shape, starts, seq, seed=seq)
            device = case.to("cuda")
            attended = attention(launch, device, programs=programs)
            wanted, keys, values = case.expected()
            error = float((attended.cpu().float() - wanted).abs().max())
            unit = 1.0 if cache == "int8" else 4 * TOLERANCE[dtype]
            wrong = max(
                float((found.cpu().float() - expected.float()).abs().max())
                for found, expected in ((device.keys, keys), (device.values, values))
            )
            name = f"{group}x{kv_heads} heads of {head_dim}, {dtype}, cache {cache}, {tiles.__name__}, {starts} + {seq}"
            # A NaN is not below any tolerance
            yield {"case": name, "error": error, "cache": wrong, "ok": error < TOLERANCE[dtype] and wrong <= unit}


def seconds(run: Callable[[], object]) -> float:
    """Median time of a run, replayed from a CUDA graph so that launching it takes no time of the CPU's."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[REPEATS // 2]


def attend(launch: Compiled, layers: Sequence[Case], programs: int) -> None:
    for layer in layers:
        attention(launch, layer, programs=programs)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COLD_BYTES / seconds(lambda: target.copy_(source))


def decoding(capability: int, programs: int) -> Iterator[dict[str, Any]]:
    """One new token for each sequence, in as many layers as it takes to read the cache from memory, not from L2."""
    peak = copy_bandwidth()
    for (group, length), batch, cache in itertools.product(
        itertools.product((16, 24), (1024, 4096, 32768)), (1, 8), ("float16", "int8")
    ):
        shape = geometry(group, 2, 128, length, "float16", cache)
        case = Case.random(shape, (length - 1,) * batch, 1)
        read = 2 * case.keys.numel() * case.keys.element_size()
        layers = [case.to("cuda") for _ in range(max(1, -(-COLD_BYTES // read)))]
        launch = Compiled(shape, capability, decode_tiles(shape))
        time = seconds(partial(attend, launch, layers, programs)) / len(layers)
        yield {
            "case": f"decode, {2 * group} heads on 2, batch {batch}, {length} tokens, cache {cache}",
            "microseconds": time * 1e6, "gigabytes_per_second": read / time / 1e9, "of_copy": read / time / peak,
        }  # fmt: skip


def prefill(capability: int, programs: int) -> Iterator[dict[str, Any]]:
    """A prompt from nothing, beside torch's attention alone, without rotary and cache."""
    for group, seq in itertools.product((16, 24), (512, 2048, 8192)):
        shape = geometry(group, 2, 128, seq, "float16", "float16")
        case = Case.random(shape, (0,), seq).to("cuda")
        launch = Compiled(shape, capability, prefill_tiles(shape))
        time = seconds(partial(attend, launch, [case], programs))
        query = torch.randn(1, 2 * group, seq, 128, dtype=torch.float16, device="cuda")
        key = torch.randn(1, 2, seq, 128, dtype=torch.float16, device="cuda")
        theirs = seconds(partial(scaled_dot_product_attention, query, key, key, is_causal=True, enable_gqa=True))
        operations = 4 * 128 * 2 * group * seq * (seq + 1) / 2  # two products, over the pairs that are seen
        yield {
            "case": f"prefill, {2 * group} heads on 2, {seq} tokens",
            "microseconds": time * 1e6, "teraflops": operations / time / 1e12, "torch_over_ours": theirs / time,
        }  # fmt: skip


def steps(arguments: argparse.Namespace) -> Iterator[tuple[str, Iterator[dict[str, Any]] | str]]:
    """Each step's name and its results, or why it's skipped here."""
    peak = None
    no_gpu = "--cpu was given" if arguments.cpu else f"torch {torch.__version__} finds no CUDA device"
    if arguments.cpu or not torch.cuda.is_available():
        for name in ("kernels", "decoding", "prefill", "engines", "cuda graphs", "fused int4", "transformers"):
            yield name, no_gpu
        provider = "cpu"
    else:
        properties = torch.cuda.get_device_properties(0)
        capability, programs = 10 * properties.major + properties.minor, 2 * properties.multi_processor_count
        peak, provider = copy_bandwidth(), "cuda"
        yield "kernels", check(capability, programs)
        yield "decoding", decoding(capability, programs)
        yield "prefill", prefill(capability, programs)
    try:
        from gpu_runs import bundles, choices
    except ImportError as error:
        yield "bundles", f"{error.name} is not installed: only kernels are checked; pip install '.[dev,gpu]' for all"
        return
    folder = arguments.output / "bundles"
    wanted = arguments.precision or ("fp16", "int4", "int8", "bf16")
    able = [precision for precision in wanted if provider == "cuda" or precision != "bf16"]
    if len(able) < len(wanted):
        yield "cuda bundle, bf16", "onnxruntime's CPU kernels take no bf16"
    yield "cuda bundles", bundles.cuda_bundles(arguments.model, folder, able, provider=provider, peak=peak)
    if "fp16" in able:
        yield "top logits", choices.top_logits(arguments.model, folder, provider)
    if provider == "cuda":
        if "int4" in able:
            yield "fused int4", choices.fused_int4(arguments.model, folder)
        yield "transformers", bundles.transformers_speed(arguments.model)
        yield "engines", bundles.engines(arguments.model, folder)


def to_its_end(name: str, found: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A step's results, and what ended it before its time: the report is for finding out, and others may run."""
    try:
        yield from found
    except Exception as error:
        yield {"case": f"the rest of {name}", "ok": False, "error": f"{type(error).__name__}: {error}"}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every step's results by its name, and what was skipped or not reached in time, with the reason."""
    report: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "results": {}, "skipped": {}}
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # makes torch's context the current one, which the kernels are loaded into
        report["device"] = torch.cuda.get_device_properties(0).name
    end = time.monotonic() + 60 * arguments.minutes
    for name, found in steps(arguments):
        if isinstance(found, str):
            report["skipped"][name] = found
            print(f"skipped  {name}: {found}", flush=True)
            continue
        results = report["results"][name] = []
        for result in to_its_end(name, found):
            results.append(result)
            wrong = result.get("ok", True) is False
            if wrong or name != "kernels":  # there are hundreds
                print(f"{'WRONG  ' if wrong else ''}{line_of(result)}", flush=True)
            if time.monotonic() > end:
                report["skipped"][f"the rest of {name}"] = f"{arguments.minutes:g} minutes were over"
                break
    return report


def line_of(result: dict[str, Any]) -> str:
    figures = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items())
    return ", ".join(figures)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: what was run, and what was not."""
    lines = [f"# {report.get('device', 'no GPU')}, torch {report['torch']}, CUDA {report['cuda']}"]
    for name, results in report["results"].items():
        wrong = [result for result in results if result.get("ok", True) is False]
        lines += ["", f"## {name}: {len(results) - len(wrong)} of {len(results)} right", ""]
        lines += [f"- {line_of(result)}" for result in (wrong if name == "kernels" else results)]
    lines += ["", "## Skipped", ""]
    lines += [f"- {name}: {why}" for name, why in report["skipped"].items()] or ["- nothing"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-check"), help="default: %(default)s")
    parser.add_argument("--model", metavar="MODEL", help="for bundles and engines; default: the embedded one")
    parser.add_argument("--cpu", action="store_true", help="what runs without a GPU; the default where there's none")
    parser.add_argument("--precision", action="append", choices=("fp16", "bf16", "int8", "int4"), help="default: all")
    parser.add_argument("--minutes", type=float, default=10, help="begin nothing more then; default: %(default)g")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = run(arguments)
    (arguments.output / "report.md").write_text(markdown(report), encoding="utf-8")
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(result.get("ok", True) is False for results in report["results"].values() for result in results))


if __name__ == "__main__":
    try:
        status = main()
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
