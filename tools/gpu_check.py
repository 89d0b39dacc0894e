"""What could not be checked without a GPU: run this on one, and send back the folder that it writes.

    python tools/gpu_check.py -o gpu-check
    python tools/gpu_check.py -o gpu-check-9b --model zai-org/GLM-4-9B-0414

Needs a CUDA build of torch, and triton. First every kernel of the attention plugin, as TensorRT gets it, against
PyTorch; then its speed: bytes of cache read per second while decoding, beside a plain copy's, and arithmetic per second
in prefill, beside torch's scaled_dot_product_attention. Then, for each installed TensorRT, engines of a model (the
embedded one unless told otherwise) in every precision and with either attention: built, loaded, compared with PyTorch
as `glm4export verify` does, and timed. Writes report.txt and report.json. Exit status 1 where a result is wrong, 2
without a GPU.
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

from glm4export import cli
from glm4export.sources.checkpoint import locate
from glm4export.tensorrt.flavour import installed_flavours
from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.tensorrt.plugin.tiles import decode_tiles, prefill_tiles
from glm4export.verification.verify import verify
from glm4runtime import Session, load
from glm4runtime.contract import UserError

TOLERANCE = {"float16": 3e-3, "bfloat16": 2e-2}  # of values of size 1
GROUPS = ((1, 2), (3, 2), (6, 8), (16, 2), (24, 2))  # query heads per kv head, kv heads
SEQUENCES = (((0, 150, 31), 1), ((900, 3), 5), ((0, 40), 130), ((1000, 0, 1), 1))  # pasts, new tokens
COLD_BYTES = 1 << 29  # what a round of decoding reads at least, several times the largest L2 cache
REPEATS = 20
DECODED = 128  # tokens that an engine's speed is taken from


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


def engines(model: str | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Each engine's largest mean KL from PyTorch and its decoding speed; what could not be built or run says why."""
    kinds = [("standard", precision) for precision in ("fp16", "bf16", "fp8", "int8", "int4")]
    for flavour in installed_flavours():
        plugins = (
            [("plugin", precision) for precision in ("fp16", "bf16", "int8", "int4")] if flavour.takes_plugins else []
        )
        for attention_kind, precision in [*kinds, *plugins]:
            bundle = folder / f"{flavour.name}-{precision}-{attention_kind}"
            command = ["build", *([model] if model else []), "-o", str(bundle), "--target", "tensorrt"]
            command += ["--precision", precision, "--attention", attention_kind, "--engine", flavour.name]
            command += ["--max-seq-len", "2048"]
            if precision == "fp8":
                command += ["--calibrate", str(locate(None).folder / "heldout.txt")]
            case = {"case": f"{flavour.name}, {precision}, {attention_kind} attention"}
            if status := cli.main(command):
                yield {**case, "ok": False, "error": f"glm4export build ended with status {status}"}
                continue
            try:
                session = load(bundle, provider="engine")
                found = verify(session, checkpoint=model)
                tokens = decode_speed(session)
            except UserError as error:
                yield {**case, "ok": False, "error": str(error)}
            else:
                worst = max(phase.mean_kl for phase in found.phases)
                yield {**case, "ok": not found.failures, "mean_kl": worst, "tokens_per_second": tokens}


def decode_speed(session: Session) -> float:
    """Tokens a second, greedy, after a prompt of 512 tokens."""
    runner = session.runner
    runner.rewind()
    token = int(runner.prefill(range(512)).argmax())
    start = time.perf_counter()
    for _ in range(DECODED):
        token = int(runner.decode(token).argmax())
    return DECODED / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-check"), help="default: %(default)s")
    parser.add_argument("--model", metavar="MODEL", help="for the engines; default: the embedded one")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError(f"no GPU: torch {torch.__version__} finds no CUDA device; run this where there is one")
    torch.zeros(1, device="cuda")  # makes torch's context the current one, which the kernels are loaded into
    properties = torch.cuda.get_device_properties(0)
    capability, programs = 10 * properties.major + properties.minor, 2 * properties.multi_processor_count
    report: dict[str, Any] = {
        "device": properties.name, "capability": capability, "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip
    lines = [", ".join(f"{key} {value}" for key, value in report.items())]
    arguments.output.mkdir(parents=True, exist_ok=True)

    def note(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    report["checks"] = []
    for result in check(capability, programs):
        report["checks"].append(result)
        if not result["ok"]:
            note(f"WRONG  {result['case']}: attended off by {result['error']:.2g}, cache by {result['cache']:.2g}")
    right = sum(result["ok"] for result in report["checks"])
    note(f"{right} of {len(report['checks'])} cases agree with PyTorch")
    for part in (decoding, prefill):
        report[part.__name__] = []
        for result in part(capability, programs):
            report[part.__name__].append(result)
            figures = ", ".join(f"{key} {value:.3g}" for key, value in result.items() if key != "case")
            note(f"{result['case']}: {figures}")
    report["engines"] = []
    for result in engines(arguments.model, arguments.output / "bundles"):
        report["engines"].append(result)
        note(f"{'' if result['ok'] else 'WRONG  '}{', '.join(f'{key} {value}' for key, value in result.items())}")
    right_engines = sum(result["ok"] for result in report["engines"])
    note(f"{right_engines} of {len(report['engines'])} engines agree with PyTorch")
    (arguments.output / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if right == len(report["checks"]) and right_engines == len(report["engines"]) else 1


if __name__ == "__main__":
    try:
        status = main()
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
